"""What is said of a submitted study, and what is refused, by what Slurm answers. Its words are given here."""

import os
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from candor.errors import UserError
from evaluate.cluster_folder import State, new_folder, write, write_jobs, write_marks, write_state
from evaluate.cluster_jobs import Job, Needs
from evaluate.cluster_profile import Profile
from evaluate.cluster_status import lines, places
from evaluate.cluster_submit import _large, _send, submit
from evaluate.stages import FileMark, Records, Stage, record_path

NEEDS = Needs(cores=1, gpus=0, memory_gb=1.0, minutes=10, wanted=10)


class Slurm:
    """Programs called squeue and scontrol, which print what this says: of elements 12_0 by 12_0."""

    def __init__(self, folder: Path, monkeypatch) -> None:
        self.folder = folder
        folder.mkdir()
        # as Slurm's: with --me nothing, for the jobs are a colleague's
        programs = {
            "squeue": f'[[ " $* " == *" --me "* ]] || cat {folder}/queue',
            "scontrol": f'[[ "$1 $2" != "show job" ]] || cat {folder}/said',
            "sacct": "exit 1",
        }
        for name, text in programs.items():
            (folder / name).write_text(f"#!/bin/bash\n{text}\n")
            (folder / name).chmod(0o755)
        self.queue(), self.said("COMPLETED")
        monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")

    def queue(self, **elements: tuple[str, str]) -> None:
        told = [f"{job[1:].replace('_', '|')}|{state}|{why}|n1|0:10\n" for job, (state, why) in elements.items()]
        (self.folder / "queue").write_text("".join(told))

    def said(self, state: str) -> None:
        (self.folder / "said").write_text(f"JobId=12 JobState={state} Reason=None\n")


@pytest.fixture
def slurm(tmp_path, monkeypatch) -> Slurm:
    return Slurm(tmp_path / "slurm", monkeypatch)


def stage(run: Path, name: str, *after: str, **config) -> Stage:
    return Stage(id=name, module="m", config=config, inputs=(), outputs=(run / name,), after=after)


def submitted(run: Path, *, stages: tuple[Stage, ...] = (), **ids: str) -> Path:
    """A submission of one sample and of one report behind it; as arrays 12 and 13, unless ``ids`` says otherwise."""
    folder = new_folder(run)
    write(folder / "about.json", {"run": str(run), "command": ["study.yaml", "--profile", "cpu"]})
    first, last = stages or (stage(run, "sample-a", n=1), stage(run, "report", "sample-a"))
    write_jobs(folder, [Job("sample-1", "sample", NEEDS, {0: (first,)}), Job("report", "report", NEEDS, {0: (last,)})])
    write(folder / "inputs.json", {})
    write(folder / "ids.json", ids or {"sample-1": "12", "report": "13"})
    return folder


def record(run: Path, name: str, *, before: Path | None = None) -> None:
    """That a stage is done, now or ten seconds before the submission ``before``."""
    write(record_path(run, name), {})
    if before is not None:
        when = (before / "about.json").stat().st_mtime - 10
        os.utime(record_path(run, name), (when, when))


def status(run: Path) -> dict[str, str]:
    return {place.stage: place.status for place in places(run)}


def state(status: str) -> State:
    return State(status=status, job="12_0", node="n1", restarts=0, when=0.0, why="no room")


def test_what_a_finished_study_is_to_add_counts_more_than_its_old_records(slurm, tmp_path):
    run = tmp_path / "run"
    folder = submitted(run)
    for name in ("sample-a", "report"):
        record(run, name, before=folder)
    slurm.queue(_12_0=("PENDING", "Priority"), _13_0=("PENDING", "Dependency"))
    assert status(run) == {"sample-a": "waiting", "report": "waiting"}
    assert "all is done" not in "\n".join(lines(run, places(run)))
    slurm.queue(_12_0=("RUNNING", "None"), _13_0=("PENDING", "Dependency"))
    assert status(run) == {"sample-a": "running", "report": "waiting"}
    slurm.queue()
    assert status(run) == {"sample-a": "blocked", "report": "blocked"}  # cancelled before they began
    write_state(run, "sample-a", state("failed"))
    assert status(run) == {"sample-a": "failed", "report": "blocked"}
    record(run, "sample-a")
    slurm.queue(_12_0=("RUNNING", "None"), _13_0=("PENDING", "Dependency"))
    assert status(run) == {"sample-a": "done", "report": "waiting"}  # its job has more to do, or ends just now
    record(run, "report")
    assert "all is done" in "\n".join(lines(run, places(run)))


def test_what_was_not_sent_for_want_of_room_waits_although_it_has_an_old_record(slurm, tmp_path):
    run = tmp_path / "run"
    about = submitted(run) / "about.json"
    os.utime(about, (about.stat().st_mtime - 20,) * 2)
    later = submitted(run, **{"sample-1": "14"})
    for name in ("sample-a", "report"):
        record(run, name, before=later)
    assert status(run)["report"] == "waiting"


@pytest.mark.parametrize(("said", "found"), [("RUNNING", "running"), ("PENDING", "waiting"), ("FAILED", "failed")])
def test_nothing_has_failed_that_slurm_says_goes_on(slurm, tmp_path, said, found):
    """The queue was read before, or does not show what is not one's own (PrivateData)."""
    run = tmp_path / "run"
    submitted(run)
    write_state(run, "sample-a", state("running"))
    slurm.said(said)
    assert status(run)["sample-a"] == found


def test_a_colleague_sees_what_runs(slurm, tmp_path):
    submitted(tmp_path / "run")
    slurm.queue(_12_0=("RUNNING", "None"), _13_0=("PENDING", "Dependency"))
    assert status(tmp_path / "run") == {"sample-a": "running", "report": "waiting"}


@pytest.mark.parametrize("reason", ["JobHoldMaxRequeue", "job requeued in held state", "job_requeued_in_held_state"])
def test_what_slurm_holds_is_to_be_released(slurm, tmp_path, reason):
    submitted(tmp_path / "run")
    slurm.queue(_12_0=("PENDING", reason), _13_0=("PENDING", "Dependency"))
    told = "\n".join(lines(tmp_path / "run", places(tmp_path / "run")))
    assert "scontrol release 12 " in told and "nothing to mend" not in told


@dataclass(frozen=True)
class Study:
    output: Path
    name: str = "study"


def resubmit(run: Path, *stages: Stage) -> list[str]:
    said: list[str] = []
    submit(Study(run), Profile(), said.append, words=["study.yaml"], stages=stages)
    return said


def test_a_study_that_changed_while_it_is_in_the_queue_is_refused_with_the_scancel(slurm, tmp_path):
    """What is queued would be made as it was; nothing says so later."""
    run, judge = tmp_path / "run", tmp_path / "judge.yaml"
    judge.write_text("one\n")
    sample = replace(stage(run, "sample-a", n=1), inputs=(judge,))
    report = stage(run, "report", "sample-a")
    folder = submitted(run, stages=(sample, report))
    write_marks(folder, {judge: Records(run).mark(judge)})
    slurm.queue(_12_0=("RUNNING", "None"), _13_0=("PENDING", "Dependency"))
    assert resubmit(run, sample, report)[-1] == "there is nothing to submit"
    more = replace(sample, config={"n": 2})
    seed, both = stage(run, "sample-b"), stage(run, "report", "sample-a", "sample-b")
    for stages, why, ended in (
        ((more, report), r"sample-a \(12_0\): config keys n", "'12_[0]'"),
        ((sample, seed, both), r"report \(13_0\): waits for, or reads, something else", "'13_[0]'"),
    ):
        with pytest.raises(UserError, match=why) as told:
            resubmit(run, *stages)
        assert f"scancel {ended}\n" in str(told.value)
    os.utime(judge, (1, 1))
    assert resubmit(run, sample, report)[-1] == "there is nothing to submit"  # the same bytes
    judge.write_text("two\n")
    with pytest.raises(UserError, match="was edited"):
        resubmit(run, sample, report)
    judge.write_text("one\n")  # put back
    slurm.queue(_13_0=("PENDING", "Dependency"))
    with pytest.raises(UserError, match="sample-a before it is to be made now"):
        resubmit(run, sample, report)


def test_a_limit_on_submitted_jobs_is_told_with_the_key_that_keeps_to_it(slurm, tmp_path):
    """As the accounting of a cluster refuses an array that is larger than it. No try leaves a folder behind."""
    told = "sbatch: error: Job violates accounting/QOS policy (job submit limit, user's size and/or time limits)"
    program = slurm.folder / "sbatch"
    program.write_text(f'#!/bin/bash\necho "{told}" >&2\nexit 1\n')
    program.chmod(0o755)
    job = Job("sample-1", "sample", NEEDS, {0: (stage(tmp_path / "run", "sample-a"),)})
    for _ in range(2):
        with pytest.raises(UserError, match=r"job submit limit.*set max_jobs in the profile"):
            _send(Study(tmp_path / "run"), Profile(), job.elements[0], [job], ["study.yaml"], print, room=9)
    assert not list((tmp_path / "run" / "slurm").glob("0*"))


def test_a_model_is_hashed_on_a_node_until_a_job_has(slurm, tmp_path):
    run, model = tmp_path / "run", tmp_path / "model"
    with model.open("wb") as file:
        file.truncate(10**9)
    stages = [replace(stage(run, "sample-a"), inputs=(model,))]
    folder = submitted(run)
    assert _large(run, stages) == [model] and _large(run, []) == []
    stat = model.stat()
    write_marks(folder, {model: FileMark(stat.st_size, stat.st_mtime_ns, "its hash")})
    assert _large(run, stages) == []
    os.utime(model, (1, 1))
    assert _large(run, stages) == [model]
