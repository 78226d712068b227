"""What happens beside the training steps: the log, the states to continue from, the adapters kept, the probe.

TRL's trainer calls these after each optimizer step, in the order log, probe, adapters and states,
so that a state's log is complete when the state is written. None of them draws random numbers or
moves a weight: a run with all of them ends in the same bytes as a run with none (tests/train).
"""

import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from candor.errors import UserError
from train.chain import EARLIER
from train.config import ProbeConfig
from train.probe import Probe
from train.stopping import Stopped, requested
from train.unfinished import KEPT, discard, mark_whole, truncate_log

LOG, PROBES = "train_log.jsonl", "probes.jsonl"
_KEPT_KEYS = ("loss", "learning_rate", "grad_norm", "epoch")
DIVERGED = "Lower sft.learning_rate, or add sft.warmup_steps and sft.max_grad_norm."


class _Clock:
    """Seconds spent in training steps, with what is done beside them left out."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._since = time.perf_counter()

    def start(self) -> None:
        """Count from now on."""
        self._since = time.perf_counter()

    def lap(self) -> None:
        """Add what passed since the start or the last lap."""
        now = time.perf_counter()
        self.seconds += now - self._since
        self._since = now


class Log(TrainerCallback):  # type: ignore[misc]
    """One line per logged step; stops at the first loss or gradient that is not a number."""

    def __init__(self, folder: Path, *, resumed_at: int, check: Callable[[], None]) -> None:
        """``check`` is called after each step and may end the run (a lost claim)."""
        self.folder, self.clock, self.check = folder, _Clock(), check
        self.losses = [float(row["loss"]) for row in truncate_log(folder / LOG, resumed_at)]
        self._logged = (0.0, 0.0)  # tokens and seconds up to the last line

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Start the clock, after everything was set up."""
        self.clock.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Stop the clock; the other callbacks come now."""
        self.clock.lap()
        self.check()

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Start it again: states, adapters, the probe and fetching the batch are not counted."""
        self.clock.start()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        """Called by the trainer every ``logging_steps`` steps."""
        if not logs or "loss" not in logs:
            return
        row = {"step": state.global_step, **{k: logs[k] for k in _KEPT_KEYS if k in logs}}
        tokens, seconds = float(logs.get("num_tokens", 0)), self.clock.seconds
        if seconds > self._logged[1]:
            row["tokens_per_second"] = round((tokens - self._logged[0]) / (seconds - self._logged[1]), 1)
            logs["tokens_per_second"] = row["tokens_per_second"]  # for TensorBoard and others that come after
        self._logged = (tokens, seconds)
        if state.is_world_process_zero:
            append(self.folder / LOG, row)
        self.losses.append(float(logs["loss"]))
        for name in ("loss", "grad_norm"):
            if not math.isfinite(float(logs.get(name, 0.0))):
                discard(self.folder)
                raise UserError(f"training diverged: {name} is {logs[name]} at step {state.global_step}. {DIVERGED}")

    @property
    def tokens_per_second(self) -> float | None:
        """Over all steps of this process; None when nothing was logged."""
        tokens, seconds = self._logged
        return round(tokens / seconds, 1) if seconds and tokens else None


class Prober(TrainerCallback):  # type: ignore[misc]
    """Asks the probe before training, every so many steps, and after the last one."""

    def __init__(self, folder: Path, config: ProbeConfig, trackers: Sequence[Any], *, resumed_at: int) -> None:
        """``trackers`` (TensorBoard and others) are told what was found."""
        self.path, self.config, self.trackers = folder / PROBES, config, trackers
        self.trainer: Any = None
        self.probe: Probe
        truncate_log(self.path, resumed_at)

    def attach(self, trainer: Any, tokenizer: Any, stop_ids: frozenset[int]) -> None:
        """Render the questions; the model answers through the trainer, for it may be split over several GPUs."""
        self.trainer, self.probe = trainer, Probe(self.config, tokenizer, stop_ids)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """The value before the first step, unless an earlier run of this stage has it."""
        if state.global_step == 0:
            self._ask(args, state, control)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Every ``every`` steps and at the end."""
        if state.global_step % self.config.every == 0 or state.global_step == state.max_steps:
            self._ask(args, state, control)

    def _ask(self, args: Any, state: Any, control: Any) -> None:
        with torch.random.fork_rng(devices=[]):
            found = self.probe.ask(self.trainer.model_wrapped)  # in every process: sharded models need all of them
        if state.is_world_process_zero:
            append(self.path, {"step": state.global_step, **{k: round(v, 6) for k, v in found.items()}})
        for tracker in self.trackers:  # not through the trainer, which would take it for the log of this step
            tracker.on_log(args, state, control, logs={f"probe/{k}": v for k, v in found.items()}, model=None)


class Keeper(TrainerCallback):  # type: ignore[misc]
    """Writes states to continue from and, when asked, whole adapters to keep."""

    def __init__(self, folder: Path, *, resume_every: int, keep_every: int | None) -> None:
        self.folder, self.resume_every, self.keep_every = folder, resume_every, keep_every
        self.trainer: Any = None
        self.write: Callable[[Path, int], None]
        self.stopping = False  # after this step, in every process

    def attach(self, trainer: Any, write: Callable[[Path, int], None]) -> None:
        """``write`` writes a whole adapter into a folder; it is called in every process."""
        self.trainer, self.write = trainer, write

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Decide what is due after this step."""
        step = state.global_step
        if self.keep_every and (step % self.keep_every == 0 or step == state.max_steps):
            self.write(self.folder / KEPT / f"step-{step:06d}", step)
        self.stopping = self._agreed(requested())
        if (step % self.resume_every == 0 or self.stopping) and step < state.max_steps:
            control.should_save = True

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Declare the state that the trainer just wrote complete, when every process has written its part."""
        self.trainer.accelerator.wait_for_everyone()
        if state.is_world_process_zero:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            remove_frozen(folder)
            mark_whole(folder)
        self.trainer.accelerator.wait_for_everyone()
        if self.stopping:
            raise Stopped(f"told to stop after step {state.global_step}; run again, it continues from there")

    def _agreed(self, told: bool) -> bool:
        """Whether any process was told to stop: all must write the same state, and a signal reaches none in step."""
        accelerator = self.trainer.accelerator
        if accelerator.num_processes == 1:
            return told
        return bool(accelerator.reduce(torch.tensor(float(told), device=accelerator.device), "sum").item())


def remove_frozen(state: Path) -> None:
    """Take the frozen earlier adapter out of a state: it is loaded from where it lies.

    Left there, the trainer would load it again when it continues and then train it alone.
    """
    for path in (state / EARLIER).glob("*"):
        path.unlink()
    if (state / EARLIER).is_dir():
        (state / EARLIER).rmdir()


def append(path: Path, row: dict[str, Any]) -> None:
    """Add one line to a log; a kill may leave part of it, which a resumed run removes."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
