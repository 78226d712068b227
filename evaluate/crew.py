"""What the executor works with: the machine's limits, the run folder's lock, and worker processes."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from candor.errors import UserError
from evaluate.cgroup import cpu_limit, memory_left
from evaluate.stages import Stage
from train.claim import flocked

_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")
_LOCK_PATIENCE_SECONDS = 3.0  # workers of a killed executor need a moment to notice


@dataclass(frozen=True, slots=True)
class Machine:
    """What the stages of a plan may use together."""

    workers: int
    memory_gb: float
    gpus: tuple[str, ...] = ()  # ids, as in CUDA_VISIBLE_DEVICES


def this_machine(workers: int | None, memory_gb: float | None) -> Machine:
    """The given limits, or else the cores this process may use and the memory that is free now."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        found = Path("/proc/driver/nvidia/gpus")
        visible = ",".join(str(i) for i, _ in enumerate(found.iterdir())) if found.is_dir() else ""
    return Machine(
        workers=workers or available_cores(),
        memory_gb=memory_gb or _free_memory_gb(),
        gpus=tuple(g.strip() for g in visible.split(",") if g.strip() not in ("", "-1")),
    )


def available_cores() -> int:
    """Cores this process may run on (a Slurm job or container often has fewer than the machine)."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    limit = cpu_limit()
    return cores if limit is None else max(1, min(cores, int(limit)))


def _free_memory_gb() -> float:
    """Memory that can be used without swapping, or being killed in a container; 'plenty' where no system says."""
    free, left = 1e6, memory_left()
    with contextlib.suppress(OSError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                free = int(line.split()[1]) / 2**20
    return free if left is None else max(0.1, min(free, left / 2**30))


@contextlib.contextmanager
def locked(run: Path) -> Iterator[int]:
    """Hold RUN/lock and give its file descriptor; UserError naming the process when another holds it."""
    run.mkdir(parents=True, exist_ok=True)
    path = run / "lock"
    with contextlib.ExitStack() as stack:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        stack.callback(os.close, file)
        deadline = time.monotonic() + _LOCK_PATIENCE_SECONDS
        while True:
            try:
                stack.enter_context(flocked(file, run))
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    holder = path.read_text().strip() or "unknown"
                    raise UserError(
                        f"{run} is in use by another executor (process {holder}) or by its last workers. "
                        "Wait for it, or stop it, then run again."
                    ) from None
                time.sleep(0.1)
        os.ftruncate(file, 0)
        os.pwrite(file, f"{os.getpid()}\n".encode(), 0)
        yield file


@dataclass(frozen=True, slots=True)
class Answer:
    """What became of a stage."""

    ok: bool
    message: str = ""
    user_error: bool = False  # the message says it all; otherwise the end of the log is shown too


@dataclass(eq=False, slots=True)
class Worker:
    """One worker process and the stage it is busy with."""

    process: subprocess.Popen[bytes]
    private: bool  # made for one stage; ends after it
    stage: Stage | None = None
    gpus: tuple[str, ...] = ()
    started: float = 0.0
    received: bytearray = field(default_factory=bytearray)

    def give(self, stage: Stage, config: Path, log: Path) -> None:
        """Hand the worker its next stage."""
        self.stage, self.started = stage, time.monotonic()
        task = {"module": stage.module, "config": str(config), "log": str(log)}
        assert self.process.stdin is not None
        # a worker that died while idle is noticed when its answer is awaited
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps(task).encode() + b"\n")
            self.process.stdin.flush()

    def answer(self) -> Answer | None:
        """What became of the stage, a dead worker included; None while the answer is still arriving."""
        assert self.process.stdout is not None
        piece = os.read(self.process.stdout.fileno(), 65536)
        self.received += piece
        if self.received.endswith(b"\n"):
            reply = Answer(**json.loads(self.received))
            self.received.clear()
            return reply
        if piece:
            return None
        code = self.process.wait()
        reason = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
        hint = " (often a sign that memory ran out)" if code == -signal.SIGKILL else ""
        return Answer(
            False, f"its worker process {self.process.pid} {reason}{hint}. Run the same command again to continue."
        )

    def end(self) -> None:
        """Kill the process and what it started; stages may be killed at any moment, so nothing is waited for."""
        assert self.process.stdout is not None and self.process.stdin is not None
        if self.process.poll() is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, signal.SIGKILL)  # it leads its own session
        self.process.kill()
        self.process.wait()
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.stdout.close()


def hire(*, private: bool, cores: int, gpus: tuple[str, ...], lock: int) -> Worker:
    """Start a worker process that may use these cores and GPUs and holds the run folder's lock."""
    environment = {**os.environ, **dict.fromkeys(_THREADS, str(cores)), "TOKENIZERS_PARALLELISM": "false"}
    if gpus:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
    process = subprocess.Popen(
        [sys.executable, "-m", "evaluate.worker", str(os.getpid())],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment,
        pass_fds=(lock,),
        start_new_session=True,  # Ctrl-C reaches the executor alone, which stops the workers
    )
    return Worker(process, private, gpus=gpus)
