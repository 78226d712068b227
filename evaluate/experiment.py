"""Runs a study from one experiment file: trains, samples, judges, and writes the report.

    python -m evaluate.experiment configs/experiments/nano.yaml [--dry-run] [key=value ...]
    python -m evaluate.experiment configs/experiments/nano.yaml --preflight [--hardware PROFILE.yaml] [key=value ...]

Run it again at any time: what is done is found in a second, what was killed continues. ``--dry-run``
lists the stages and says which are done; ``--preflight`` says what the study takes and whether it fits
a machine (evaluate/preflight.py). Keys: evaluate/experiment_config.py; for example
``device=cuda``, ``output=runs/other``, ``workers=4``.
"""

import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from candor.config import load
from candor.errors import UserError, run_script
from evaluate.crew import this_machine
from evaluate.executor import Executor
from evaluate.experiment_config import Experiment
from evaluate.plan import build_plan, refuse_keyless
from evaluate.run_folder import claim_run, refuse_other
from evaluate.stages import Stage


def main(argv: list[str]) -> None:
    """Plan, then list or run."""
    if "--preflight" in argv:
        from evaluate.preflight import main as preflight  # counts parameters on the real architecture: imports torch

        sys.exit(preflight(argv))
    words = [word for word in argv if word != "--dry-run"]
    flags = [word for word in words if word.startswith("-")]
    if not words or flags:
        unknown = f"unknown option {flags[0]!r}; " if flags else ""
        raise UserError(
            f"{unknown}usage: python -m evaluate.experiment EXPERIMENT.yaml [--dry-run | --preflight] [key=value ...]"
        )
    started = time.monotonic()
    experiment = load(Experiment, Path(words[0]), words[1:])
    stages = build_plan(experiment)
    refuse_other(experiment.output, experiment.name, stages)
    machine = this_machine(experiment.workers, experiment.memory_gb)
    executor = Executor(stages, experiment.output, machine, _say)
    if "--dry-run" in argv:
        done = executor.find_done()
        for stage in stages:
            sys.stdout.write(f"{'done' if stage.id in done else '    '}  {stage.id}\n")
        sys.stdout.write(f"{len(done)} of {len(stages)} stages are done in {experiment.output}\n")
        return
    signal.signal(signal.SIGTERM, _interrupt)
    _say(f"{experiment.name}: {len(stages)} stages, {machine.workers} at once, in {experiment.output}")

    def begin(todo: Sequence[Stage]) -> None:
        refuse_keyless(todo)
        claim_run(experiment.output, experiment.name, stages)

    executor.execute(begin)
    _say(f"finished in {time.monotonic() - started:.0f} s")
    sys.stdout.write(f"report: {(experiment.output / 'report.html').resolve()}\n")


def _interrupt(number: int, frame: FrameType | None) -> None:
    """A polite request to stop (Slurm's time limit, kill) is handled like Ctrl-C."""
    raise KeyboardInterrupt


def _say(line: str) -> None:
    """One line of progress, at once."""
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


if __name__ == "__main__":
    run_script(main)
