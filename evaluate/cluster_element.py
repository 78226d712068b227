"""One element of a job array: runs its stages on a node, to be killed and run again at any moment.

    python -m evaluate.cluster_element RUN/slurm/0001 train-1 3     # from element.sh; not by people

A stage runs as the local executor runs it (a worker process, the same module and config file, the
same record at the end). Around it stands what a cluster needs: a claim, so that two jobs never make
one stage and one that died is succeeded; the inputs compared with those of the submission; SIGUSR1
before a time limit, on which training writes a state to continue from; a state for status.py to read.

Ends with 0 when all is done, 1 when a stage failed, 75 when it was told to stop and wants to be
requeued, 143 when Slurm ends it (a preemption, scancel) and decides itself what comes next.
"""

import contextlib
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType

from candor.errors import UserError, told
from candor.hashing import sha256_json
from evaluate.checkpoints import refuse_absent
from evaluate.cluster_folder import (
    State,
    claim,
    read,
    read_element,
    read_marks,
    read_state,
    state_path,
    write_marks,
    write_state,
)
from evaluate.crew import Answer, Worker, hire
from evaluate.stages import Changed, Records, Stage, own_inputs, write_config
from train.claim import Lost, claimed
from train.unfinished import partial_folder

DONE, FAILED, REQUEUE, ENDED = 0, 1, 75, 143
_LOOK_SECONDS = 1.0
_VISIBLE_SECONDS = 30.0  # until a file that another node wrote is seen here (attribute caches of NFS)


class _Told(Exception):
    """A signal came while the claim of another job was waited for, or a large file was read."""


class Element:
    """One run of one element."""

    def __init__(self, folder: Path, job: str, index: int) -> None:
        self.folder = folder
        self.about = read(folder / "about.json")
        self.run = Path(self.about["run"])
        self.job, self.kind = job, job.partition("-")[0]
        self.stages = read_element(folder, job, index)
        self.marks = read_marks(folder)
        self.records = Records(self.run, self.marks)
        self.name = "_".join((os.environ.get("SLURM_ARRAY_JOB_ID", "0"), str(index)))
        self.node = os.environ.get("SLURMD_NODENAME", os.uname().nodename)
        self.restarts = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
        self.worker: Worker | None = None
        self.kept, self.stalled = "", 0  # of the stage at hand: see State
        self.signal: int | None = None  # that told us to stop
        self.waiting = False

    def execute(self) -> int:
        """Every stage in turn; how it ended."""
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._told)
        try:
            for stage in self.stages:
                code = self._make(stage)
                if code != DONE:
                    return code
            return self._mark_large() if self.kind == "prepare" else DONE
        finally:
            if self.worker:
                self.worker.end()

    def _mark_large(self) -> int:
        """Hash what was too large for the login node, once for all jobs; how it ended. Each file is noted at once."""
        large = [Path(name) for name in self.about["large"]]
        if self.restarts > self.about["requeues"] + len(large):  # each turn that noted a file was one forward
            self._say(
                f"was requeued {self.restarts} times and could not read {large}: its time is too short for one file"
            )
            return FAILED
        for path in large:
            if path in self.marks:
                continue
            try:
                self.waiting = True
                if self.signal:
                    raise _Told
                self.marks[path] = self.records.mark(path)
            except _Told:
                self.waiting = False
                self._say(f"stopped while it read {path}")
                return REQUEUE if self.signal == signal.SIGUSR1 else ENDED
            finally:
                self.waiting = False
            write_marks(self.folder, self.marks)
        return DONE

    def _told(self, number: int, frame: FrameType | None) -> None:
        """Remember the first signal; wake up where we wait for another job's claim or read a large file."""
        self.signal = self.signal or number
        if self.waiting:
            raise _Told

    def _make(self, stage: Stage) -> int:
        """One stage, unless it is done or is being made by somebody else, who is waited for."""
        self.kept, self.stalled = self._progress(stage)
        with contextlib.ExitStack() as stack:
            try:
                self.waiting = True
                check = stack.enter_context(claimed(claim(self.run, stage.id), wait=True))
                self.waiting = False
                if self.signal:
                    return self._stopped(stage)
                if self.records.is_done(stage):
                    state_path(self.run, stage.id).unlink(missing_ok=True)
                    self._say(f"{stage.id} was done")
                    return DONE
                if self.stalled > self.about["requeues"]:
                    return self._failed(stage, f"was requeued {self.stalled} times in a row and came no further")
                self._refuse(stage)
                return self._run(stage, check)
            except _Told:
                return self._stopped(stage)
            except Lost as error:
                return self._stopped(stage, str(error))
            except Changed as error:
                return self._failed(stage, f"{error}. Delete that output to make it anew.")
            except UserError as error:
                return self._failed(stage, str(error))
            except OSError as error:
                return self._failed(stage, told(error) or repr(error))
            finally:
                self.waiting = False

    def _progress(self, stage: Stage) -> tuple[str, int]:
        """Hash of the names of what the stage has made so far, and how many turns in a row added nothing to it.

        States, shards and answers are written once and never changed, so that new ones have new names.
        """
        folders = [folder for output in stage.outputs for folder in (output, partial_folder(output))]
        folders += [Path(stage.config["store"])] if stage.config.get("store") else []
        names = sorted(str(p) for f in folders for p in f.rglob("*") if not p.name.startswith("."))
        kept, before = sha256_json(names), read_state(self.run, stage.id)
        if before is None or before.job != self.name or before.kept != kept:
            return kept, 0
        return kept, before.stalled + self.restarts - before.restarts

    def _refuse(self, stage: Stage) -> None:
        """UserError when the stage cannot start: a stage before it is not done, or an input is another by now."""
        deadline = time.monotonic() + _VISIBLE_SECONDS
        for earlier in stage.after:
            while not (self.run / "stages" / f"{earlier}.json").is_file():
                if time.monotonic() > deadline:
                    raise UserError(f"it waits for {earlier}, which is not done")
                time.sleep(_LOOK_SECONDS)
        refuse_absent(stage.inputs)
        for path in own_inputs([stage], self.run):
            mark = self.marks.get(path)
            if mark is not None and not mark.is_of(path):
                raise UserError(
                    f"{path} changed since the study was submitted. Put it back or not, then add --resubmit-failed"
                )

    def _run(self, stage: Stage, check: Callable[[], None]) -> int:
        """Run the stage in a worker, listening for signals, and record it."""
        self._note(stage, "running")
        started = time.monotonic()
        if stage.remake:
            self.records.forget(stage)
        self.records.begin(stage)
        config = write_config(self.run, stage)
        log = self.run / "logs" / f"{stage.id}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        launcher = self.about["launcher"] if stage.module == "train.sft" else None
        if launcher:
            answer = self._launch(stage, [*launcher, "-m", stage.module, str(config)], log, check)
        else:
            answer = self._in_worker(stage, config, log, check)
        if answer is None or (self.signal and not answer.ok):
            return self._stopped(stage)
        if not answer.ok:
            tail = "" if answer.user_error else f" (the end of {log} says more)"
            return self._failed(stage, answer.message + tail, log)
        self.records.write(stage, time.monotonic() - started)
        state_path(self.run, stage.id).unlink(missing_ok=True)
        self._say(f"{stage.id} ... {time.monotonic() - started:.0f} s")
        return DONE

    def _in_worker(self, stage: Stage, config: Path, log: Path, check: Callable[[], None]) -> Answer | None:
        """The stage in a worker process, which later stages of the element use too; None when it was told to stop."""
        if self.worker is None:
            keep = os.open(os.devnull, os.O_RDONLY)  # in place of the local executor's lock
            self.worker = hire(private=False, cores=self.about["cores"][self.job], gpus=(), lock=keep)
            os.close(keep)
        worker = self.worker
        worker.give(stage, config, log)
        assert worker.process.stdout is not None
        until: float | None = None
        with selectors.DefaultSelector() as selector:
            selector.register(worker.process.stdout, selectors.EVENT_READ)
            while True:
                if selector.select(timeout=_LOOK_SECONDS):
                    answer = worker.answer()
                    if answer is not None:
                        return answer
                check()
                if self.signal and until is None:
                    until = time.monotonic() + self._patience()
                    # a stage that cannot save itself dies of it, which no stage minds
                    worker.process.send_signal(signal.SIGUSR1)
                if until is not None and time.monotonic() > until:
                    return None

    def _launch(self, stage: Stage, command: Sequence[str], log: Path, check: Callable[[], None]) -> Answer | None:
        """The stage in several processes, started by srun on every node of the job; None when told to stop."""
        self.waiting = True
        for output in stage.outputs:
            # several processes do not wait for a claim (train/sft.py), and that of a turn whose node died lasts on
            with claimed(output, wait=True):
                pass
        self.waiting = False
        with log.open("ab") as file:
            begins = file.tell()
            process = subprocess.Popen(command, stdout=file, stderr=file)
            while process.poll() is None:
                time.sleep(_LOOK_SECONDS)
                check()
                if self.signal:
                    process.send_signal(self.signal)  # which srun hands on to every node
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.wait(self._patience())
                    process.kill()
                    process.wait()
        code = process.returncode
        if code and self.signal:
            return None
        if code and (reason := _told_in(log, begins)):
            return Answer(False, reason, user_error=True)
        return Answer(code == 0, f"{command[0]} ended with status {code}")

    def _patience(self) -> float:
        """Seconds that a stage has to save itself."""
        return float(self.about["signal_seconds"]) * 0.8 if self.signal == signal.SIGUSR1 else 20.0

    def _stopped(self, stage: Stage, why: str = "") -> int:
        """Told to stop, or out of the race for the stage: say what should come next."""
        if self.worker:
            self.worker.end()
            self.worker = None
        requeue = bool(why) or self.signal == signal.SIGUSR1
        why = why or ("its time was nearly over" if requeue else "Slurm ended the job")
        self._note(stage, "stopped", why)
        self._say(f"{stage.id} stopped: {why}")
        return REQUEUE if requeue else ENDED

    def _failed(self, stage: Stage, why: str, log: Path | None = None) -> int:
        """A failure that running again would not mend by itself."""
        self._say(f"{stage.id} FAILED: {why}")
        self._note(stage, "failed", why, str(log or ""))
        return FAILED

    def _note(self, stage: Stage, status: str, why: str = "", log: str = "") -> None:
        """Write the state; a full disk must not hide the failure that it is."""
        state = State(
            status=status,
            job=self.name,
            node=self.node,
            restarts=self.restarts,
            when=time.time(),
            why=why,
            log=log,
            kept=self.kept,
            stalled=self.stalled,
        )
        with contextlib.suppress(OSError):
            write_state(self.run, stage.id, state)

    def _say(self, line: str) -> None:
        """One line into the job's own log."""
        with contextlib.suppress(OSError):
            sys.stderr.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {self.node} {line}\n")
            sys.stderr.flush()


def _told_in(log: Path, begins: int) -> str:
    """What the first of a stage's processes that a person's mistake ended said of it (candor/errors.py); or nothing."""
    with log.open("rb") as file:
        file.seek(begins)
        for line in file.read().decode(errors="replace").splitlines():
            if line.startswith("error: "):
                return line.removeprefix("error: ")
    return ""


def main(argv: list[str]) -> None:
    """Run one element and end with the status that element.sh understands."""
    folder, job, index = argv
    os.chdir(read(Path(folder) / "about.json")["from"])  # a container may begin elsewhere
    sys.exit(Element(Path(folder), job, int(index)).execute())


if __name__ == "__main__":
    main(sys.argv[1:])
