"""Runs a plan on this machine: as many stages at once as cores, memory and GPUs allow.

Long-lived workers (evaluate/worker.py) take one stage at a time, the stage with the longest chain
behind it first. The executor itself imports nothing heavy, so a plan that is done is recognised at
once. Any process may be killed at any moment: what finished is recorded, stages continue their own
work, and the same command run again ends with the same tables. No two executors work on one run
folder: workers inherit the lock, so even orphans keep a second one out until they are gone. In a folder that
was submitted to a cluster each stage is claimed as its jobs do: one that starts meanwhile waits and finds it done.
"""

import contextlib
import selectors
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

from candor.errors import UserError
from evaluate.checkpoints import refuse_absent
from evaluate.cluster_folder import claim, submissions, working
from evaluate.crew import Answer, Machine, Worker, hire, locked
from evaluate.stages import Changed, Records, Stage, critical_minutes, write_config
from train.claim import claimed

_HEARTBEAT_SECONDS = 30.0


class Executor:
    """One execution of a plan. ``say`` receives one line of progress at a time."""

    def __init__(self, stages: Sequence[Stage], run: Path, machine: Machine, say: Callable[[str], None]) -> None:
        """Prepare; nothing starts yet."""
        self.stages = {stage.id: stage for stage in stages}
        self.run_folder, self.machine, self.say = run, machine, say
        self.records = Records(run)
        self.rank = critical_minutes(stages)
        self.done: set[str] = set()
        self.failures: dict[str, Answer] = {}
        self.workers: list[Worker] = []
        self.selector = selectors.DefaultSelector()
        self.times: dict[str, list[float]] = defaultdict(list)  # seconds of finished stages by module
        self.began = time.monotonic()
        self.lock: int | None = None
        self.submitted = False  # to a cluster, whose jobs may still come
        self.claims: dict[str, contextlib.ExitStack] = {}  # of the stages that run, against those jobs

    def find_done(self) -> set[str]:
        """Ids of the stages that are done already; UserError listing those made from something else."""
        changed: list[str] = []
        for stage in self.stages.values():
            if self.done.issuperset(stage.after):
                try:
                    if self.records.is_done(stage):
                        self.done.add(stage.id)
                except Changed as error:
                    changed.append(str(error))
        if changed:
            more = f"\n  and {len(changed) - 5} more" if len(changed) > 5 else ""
            raise UserError(
                "the experiment differs from what this run folder holds:\n  "
                + "\n  ".join(changed[:5])
                + more
                + "\nChoose another folder (output=...), or delete those outputs and everything made from them."
            )
        return self.done

    def execute(self, refuse: Callable[[Sequence[Stage]], None] = lambda todo: None) -> None:
        """Run what is not done, unless ``refuse`` raises when it sees it; UserError at the end when a stage failed."""
        with locked(self.run_folder) as self.lock:
            if busy := working(self.run_folder):
                more = f" and {len(busy) - 3} more" if len(busy) > 3 else ""
                raise UserError(
                    f"{self.run_folder} is in use by jobs of a cluster, which make {', '.join(busy[:3])}{more}. Wait "
                    "for them, or end them with scancel; what a job or a run left that died counts for two minutes."
                )
            self.submitted = bool(submissions(self.run_folder))
            self.find_done()
            todo = [stage for stage in self.stages.values() if stage.id not in self.done]
            for stage in todo:
                if self.records.read(stage) is None:  # one that was made once may turn out to be done still
                    self._refuse_few_gpus(stage)
            refuse(todo)
            if self.done:
                self.say(f"{len(self.done)} of {len(self.stages)} stages are done already")
            try:
                self._loop()
            finally:
                for worker in list(self.workers):
                    self._dismiss(worker)
                self.selector.close()
                for name in list(self.claims):
                    self.claims.pop(name).close()
        if self.failures:
            left = len(self.stages) - len(self.done) - len(self.failures)
            told = "\n".join(self._explain(name, answer) for name, answer in self.failures.items())
            raise UserError(f"{told}\n{left} more stages were not run." if left else told)

    def _loop(self) -> None:
        """Start what fits, wait for an answer, repeat until nothing runs and nothing can start."""
        while True:
            while not self.failures and self._start_next():
                pass
            busy = [w for w in self.workers if w.stage]
            if not busy:
                break
            events = self.selector.select(timeout=_HEARTBEAT_SECONDS)
            for key, _ in events:
                worker: Worker = key.data
                answer = worker.answer()
                if answer is not None:
                    self._finish(worker, answer)
            if not events:
                now = time.monotonic()
                self.say("running: " + ", ".join(f"{w.stage.id} ({now - w.started:.0f} s)" for w in busy if w.stage))

    def _start_next(self) -> bool:
        """Start (or find done) the most urgent stage that fits; False when there is none."""
        busy = [w for w in self.workers if w.stage]
        running = {w.stage.id: w.stage for w in busy if w.stage}
        waiting = [s for s in self.stages.values() if s.id not in self.done and s.id not in running]
        ready = [s for s in waiting if self.done.issuperset(s.after)]
        for stage in sorted(ready, key=lambda s: -self.rank[s.id]):
            if self._found_done(stage):
                return True
            if stage.id in self.failures:
                return False
            if self._fits(stage, list(running.values()), len(self._free_gpus())):
                self._start(stage)
                return True
        return False

    def _found_done(self, stage: Stage) -> bool:
        """Whether a stage whose inputs were only now made again was done all along."""
        try:
            found = self.records.is_done(stage)
        except Changed as error:
            remedy = "Delete that output to make it anew, or choose another folder (output=...)."
            self.failures[stage.id] = Answer(False, f"{error}. {remedy}", user_error=True)
            return False
        if found:
            self.done.add(stage.id)
            self.say(self._line(stage, "was done"))
        return found

    def _fits(self, stage: Stage, running: list[Stage], free_gpus: int) -> bool:
        """Whether the stage can run beside those that run; alone, a stage may always try."""
        if not running:
            return True
        cores = sum(s.cores for s in running) + stage.cores
        memory = sum(s.memory_gb for s in running) + stage.memory_gb
        return cores <= self.machine.workers and memory <= self.machine.memory_gb and stage.gpus <= free_gpus

    def _free_gpus(self) -> list[str]:
        """GPUs no running stage holds."""
        held = {gpu for worker in self.workers for gpu in worker.gpus}
        return [gpu for gpu in self.machine.gpus if gpu not in held]

    def _refuse_few_gpus(self, stage: Stage) -> None:
        """UserError when the machine has fewer GPUs than a stage needs."""
        if stage.gpus > len(self.machine.gpus):
            raise UserError(
                f"{stage.id} needs {stage.gpus} GPUs; this machine shows {len(self.machine.gpus)}. GPUs are counted in "
                "CUDA_VISIBLE_DEVICES where it is set, else by NVIDIA's driver; where that lists none (WSL2, ROCm), "
                "set it, e.g. to 0. How many a stage takes: the key 'needs'."
            )

    def _start(self, stage: Stage) -> None:
        """Give the stage to an idle worker, or to a new one."""
        try:
            self._refuse_few_gpus(stage)
            refuse_absent(stage.inputs)
            if self.submitted:
                claims = self.claims[stage.id] = contextlib.ExitStack()
                claims.enter_context(claimed(claim(self.run_folder, stage.id), wait=False))
                # a job may have made it between the look at its record and the claim
                if self._found_done(stage) or stage.id in self.failures:
                    self.claims.pop(stage.id).close()
                    return
        except UserError as error:
            self.failures[stage.id] = Answer(False, str(error), user_error=True)
            return
        if stage.remake:
            self.records.forget(stage)
        self.records.begin(stage)
        private = stage.gpus > 0 or stage.cores > 1 or not stage.share
        idle = [w for w in self.workers if not w.stage and not w.private]
        gpus = tuple(self._free_gpus()[: stage.gpus])
        worker = idle[0] if idle and not private else self._hire(private, stage.cores, gpus)
        worker.give(stage, write_config(self.run_folder, stage), self._log(stage.id))

    def _hire(self, private: bool, cores: int, gpus: tuple[str, ...]) -> Worker:
        """Start a worker and listen to it."""
        assert self.lock is not None
        worker = hire(private=private, cores=cores, gpus=gpus, lock=self.lock)
        self.workers.append(worker)
        assert worker.process.stdout is not None
        self.selector.register(worker.process.stdout, selectors.EVENT_READ, worker)
        return worker

    def _finish(self, worker: Worker, answer: Answer) -> None:
        """Note what became of a worker's stage."""
        stage, seconds = worker.stage, time.monotonic() - worker.started
        if stage is None or worker.private or not answer.ok:
            self._dismiss(worker)  # after a failure its memory is not trusted
        if stage is None:
            return  # an idle worker died; another is hired when needed
        worker.stage, worker.gpus = None, ()
        if answer.ok:
            try:
                self.records.write(stage, seconds)
            except UserError as error:
                answer = Answer(False, str(error), user_error=True)
        self.claims.pop(stage.id, contextlib.ExitStack()).close()
        if answer.ok:
            self.done.add(stage.id)
            self.times[stage.module].append(seconds)
            self.say(self._line(stage, f"{seconds:.0f} s"))
        else:
            self.failures[stage.id] = answer
            self.say(self._line(stage, f"FAILED after {seconds:.0f} s"))
            rest = [w.stage.id for w in self.workers if w.stage]
            if rest:
                self.say(f"waiting for {', '.join(rest)} to finish")

    def _dismiss(self, worker: Worker) -> None:
        """End a worker that nobody needs or trusts any more."""
        assert worker.process.stdout is not None
        self.workers.remove(worker)
        self.selector.unregister(worker.process.stdout)
        worker.end()

    def _log(self, name: str) -> Path:
        """Where a stage's output goes."""
        return self.run_folder / "logs" / f"{name}.log"

    def _explain(self, name: str, answer: Answer) -> str:
        """A failure in words: a person's error as it is, anything else with the end of the log."""
        if answer.user_error:
            return f"{name}: {answer.message}"
        log = self._log(name)
        tail = log.read_text(encoding="utf-8", errors="replace").splitlines()[-12:] if log.is_file() else []
        return f"{name}: {answer.message}\n  the end of {log}:" + "".join(f"\n  | {line}" for line in tail)

    def _line(self, stage: Stage, what: str) -> str:
        """One line of progress: how many stages are done, which one, how long, how much is left."""
        n, elapsed = len(self.stages), time.monotonic() - self.began
        left = self._seconds_left()
        tail = f", about {_clock(left)} left" if left else ""
        return f"[{len(self.done):{len(str(n))}d}/{n}] {stage.id} ... {what} (elapsed {_clock(elapsed)}{tail})"

    def _seconds_left(self) -> float:
        """Work that remains, from the mean time of stages of the same kind, spread over the workers."""
        means = {module: sum(t) / len(t) for module, t in self.times.items()}
        rest = [s for s in self.stages.values() if s.id not in self.done]
        total = sum(means.get(s.module, s.minutes * 60) for s in rest)
        return total / max(1, min(self.machine.workers, len(rest)))


def _clock(seconds: float) -> str:
    """Seconds as minutes and seconds."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d} min"
