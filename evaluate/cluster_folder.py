"""What a submission leaves in the run folder, for its jobs and for whoever asks how they fare.

RUN/slurm/0001/          one submission: code/ (a copy, which its jobs run), jobs/NAME.json (the stages
                         of each array), ids.json (Slurm's numbers), inputs.json, element.sh, logs/
RUN/slurm/state/ID.json  what became of a stage the last time a job took it up
RUN/slurm/claims/        who makes which stage now
"""

import contextlib
import dataclasses
import json
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from candor.tables import replace_file
from evaluate.cluster_jobs import Job
from evaluate.stages import FileMark, Stage
from train.claim import LEASE_SECONDS, claim_path

FOLDER = "slurm"


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """What became of a stage in its last job; a stage that is done has none."""

    status: str  # "running", "stopped" (told to, and to be run again) or "failed"
    job: str  # Slurm's, with the index: 12_3
    node: str
    restarts: int
    when: float
    why: str = ""
    log: str = ""
    kept: str = ""  # hash of what the stage had to continue from when this turn began
    stalled: int = 0  # turns in a row that kept nothing new


@dataclass(frozen=True, slots=True)
class Submission:
    """One call of submit."""

    folder: Path
    ids: dict[str, str]  # Slurm's number of each array
    elements: dict[str, dict[int, list[str]]]  # stages by array and index

    def stages(self) -> dict[str, str]:
        """Of each stage the element that was to make it: 12_3."""
        return {
            stage: f"{self.ids[job]}_{index}"
            for job, elements in self.elements.items()
            if job in self.ids
            for index, stages in elements.items()
            for stage in stages
        }


def submissions(run: Path) -> list[Submission]:
    """All submissions of a run, in order."""
    found = []
    for folder in sorted((run / FOLDER).glob("[0-9]*")):
        if (folder / "ids.json").is_file():
            elements = {
                job: {int(index): stages for index, stages in of.items()}
                for job, of in read(folder / "elements.json").items()
            }
            found.append(Submission(folder, read(folder / "ids.json"), elements))
    return found


def new_folder(run: Path) -> Path:
    """The folder of the next submission."""
    taken = [int(path.name) for path in (run / FOLDER).glob("[0-9]*")]
    folder = run / FOLDER / f"{max(taken, default=0) + 1:04d}"
    for name in ("jobs", "logs"):
        (folder / name).mkdir(parents=True)
    return folder


def write_jobs(folder: Path, jobs: Iterable[Job]) -> None:
    """The stages of every array, whole for its elements and by name for the rest."""
    names = {}
    for job in jobs:
        stages = {index: [dataclasses.asdict(s) for s in of] for index, of in job.elements.items()}
        write(folder / "jobs" / f"{job.name}.json", stages)
        names[job.name] = {index: [s.id for s in of] for index, of in job.elements.items()}
    write(folder / "elements.json", names)
    write(folder / "ids.json", {})


def read_element(folder: Path, job: str, index: int) -> list[Stage]:
    """The stages of one element."""
    return read_job(folder, job)[index]


def read_job(folder: Path, job: str) -> dict[int, list[Stage]]:
    """The stages of one array, by index."""
    return {int(index): [_stage(value) for value in of] for index, of in read(folder / "jobs" / f"{job}.json").items()}


def _stage(value: dict[str, Any]) -> Stage:
    return Stage(
        **{
            **value,
            "inputs": tuple(map(Path, value["inputs"])),
            "outputs": tuple(map(Path, value["outputs"])),
            "after": tuple(value["after"]),
        }
    )


def claim(run: Path, stage: str) -> Path:
    """What the claim on a stage is called by."""
    return run / FOLDER / "claims" / stage


def working(run: Path) -> list[str]:
    """Stages whose claims gave a sign of life not long ago: jobs are making them now."""
    pattern, now = claim_path(claim(run, "*")), time.time()
    found = []
    for path in sorted(pattern.parent.glob(pattern.name)):
        with contextlib.suppress(FileNotFoundError):
            if now - path.stat().st_mtime < LEASE_SECONDS:
                found.append(path.name.removeprefix(".").removesuffix(".claim"))
    return found


def write_marks(folder: Path, marks: Mapping[Path, FileMark]) -> None:
    """How the study's own inputs were when it was submitted."""
    write(folder / "inputs.json", {path.as_posix(): dataclasses.astuple(mark) for path, mark in marks.items()})


def read_marks(folder: Path) -> dict[Path, FileMark]:
    """What ``write_marks`` wrote."""
    return {Path(name): FileMark(*mark) for name, mark in read(folder / "inputs.json").items()}


def state_path(run: Path, stage: str) -> Path:
    """Where the state of a stage lies."""
    return run / FOLDER / "state" / f"{stage}.json"


def write_state(run: Path, stage: str, state: State) -> None:
    """Note what became of a stage."""
    write(state_path(run, stage), dataclasses.asdict(state))


def read_state(run: Path, stage: str) -> State | None:
    """What became of a stage in its last job; None when it is done or was never begun."""
    try:
        return State(**read(state_path(run, stage)))
    except FileNotFoundError:
        return None


def write(path: Path, value: Any) -> None:
    """A small JSON file, whole or not at all."""
    replace_file(path, (json.dumps(value, indent=1, ensure_ascii=False, default=str) + "\n").encode())


def read(path: Path) -> Any:
    """What ``write`` wrote."""
    return json.loads(path.read_text(encoding="utf-8"))
