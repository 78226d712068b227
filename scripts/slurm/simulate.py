"""How long a study would take on a cluster, played through on paper: makespan and GPU-hours, with preemptions.

    python scripts/slurm/simulate.py EXPERIMENT.yaml [--hardware configs/hardware/h100x8.yaml] \
        [--gpus 8,64] [--preempted 0,24,6] [--repeats 20] [key=value ...]

The plan is the one that would run, and its hours are what the experiment file says under ``needs``; with
``--hardware`` they are preflight's, floors at that profile's assumed utilisation. Loading is added for
every start of a job.
``--preempted`` gives the mean hours between two preemptions of one running job (0: none). A row is the
mean over the repeats; CSV goes to standard output.
"""

import csv
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean

from candor.config import load
from candor.errors import UserError, run_script
from evaluate.cluster_forecast import Forecast, Preemptions, play
from evaluate.experiment_config import Experiment
from evaluate.hardware import Hardware
from evaluate.plan import build_plan
from evaluate.stages import Stage

USAGE = (
    "usage: python scripts/slurm/simulate.py EXPERIMENT.yaml [--hardware PROFILE.yaml] [--gpus 8,64] "
    "[--preempted 0,24,6] [--repeats 20] [key=value ...]"
)
TITLES = ("gpus", "hours_between_preemptions", "warned", "makespan_hours", "gpu_hours", "preemptions", "repeats")
SETUP_MINUTES = 5.0  # an assumption: imports and loading a 32B model from a node's own disk


def main(argv: list[str]) -> None:
    """Play the study through for every number of GPUs and every rate of preemptions."""
    words, options = _parse(argv)
    experiment = load(Experiment, Path(words[0]), words[1:])
    stages = timed(experiment, options["--hardware"])
    table = csv.writer(sys.stdout, lineterminator="\n")
    table.writerow(TITLES)
    for gpus in map(int, options["--gpus"].split(",")):
        for between in map(float, options["--preempted"].split(",")):
            for warned in (False, True) if between else (False,):
                n = int(options["--repeats"]) if between else 1
                found = [_one(stages, gpus, between, warned, seed) for seed in range(n)]
                means = (fmean(f.hours for f in found), fmean(f.gpu_hours for f in found))
                lost = fmean(f.preemptions for f in found)
                row = (gpus, f"{between:g}", "yes" if warned else "no", *(f"{m:.1f}" for m in means), f"{lost:.1f}", n)
                table.writerow(row)


def timed(experiment: Experiment, hardware: str) -> list[Stage]:
    """The plan with its minutes."""
    stages = build_plan(experiment, absent_ok=True)
    if hardware:
        from evaluate.preflight import examine  # imports torch

        findings = examine(experiment, load(Hardware, Path(hardware)))
        for problem in findings.problems:
            sys.stderr.write(f"note: {problem}\n")
        hours = {name: h for name, h in findings.hours.items() if h is not None}
        if not hours:
            raise UserError(f"{hardware} states no speed, or device is cpu: there are no hours to play with.")
        stages = [replace(s, minutes=60 * hours[s.id]) if s.id in hours else s for s in stages]
    count = sum(s.gpus > 0 for s in stages)
    sys.stderr.write(f"{experiment.name}: {len(stages)} stages, {count} of them on a GPU\n")
    return stages


def _one(stages: Sequence[Stage], gpus: int, between: float, warned: bool, seed: int) -> Forecast:
    """One play; without preemptions a job still has to load once."""
    mean = between * 60 if between else float("inf")
    rule = Preemptions(mean_minutes=mean, setup_minutes=SETUP_MINUTES, warned=warned)
    return play(stages, gpus, preempted=rule, seed=seed)


def _parse(argv: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """The experiment with its changes, and the options."""
    words = list(argv)
    options = {"--hardware": "", "--gpus": "8,64", "--preempted": "0,24,6", "--repeats": "20"}
    for name in options:
        if name in words:
            place = words.index(name)
            if place + 1 >= len(words):
                raise UserError(f"{name} needs a value. {USAGE}")
            options[name] = words[place + 1]
            del words[place : place + 2]
    if not words or any(word.startswith("-") for word in words):
        raise UserError(USAGE)
    return words, options


if __name__ == "__main__":
    run_script(main)
