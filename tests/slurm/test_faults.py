"""A plan on a real Slurm, undisturbed and through every fault a cluster has; it always ends with the same files.

The stages are stand-ins of seconds (tests/slurm/stand_in.py); all around them is what a study runs:
submit, sbatch, the element runner, claims, records, status. The real study is test_study.py.
"""

import json
import os
import re
import shlex
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from candor.config import build
from candor.errors import UserError
from evaluate.cluster_folder import read_state, submissions
from evaluate.cluster_profile import Options, Profile
from evaluate.cluster_status import lines, places
from evaluate.cluster_submit import submit
from evaluate.crew import Machine
from evaluate.executor import Executor
from evaluate.run_folder import STUDY
from evaluate.stages import Stage
from train.unfinished import partial_folder

pytestmark = pytest.mark.full

PATIENCE = float(os.environ.get("CANDOR_PATIENCE", "300"))  # seconds; only a test that fails waits so long


def stage(run: Path, name: str, *after: str, count=1, pause=0.1, **more) -> Stage:
    config = {"output": str(run / f"{name}.json"), "reads": [str(run / f"{a}.json") for a in after]}
    return Stage(
        id=name,
        module="stand_in",
        config={**config, "count": count, "pause": pause, **more},
        inputs=(*(run / f"{a}.json" for a in after), *([Path("pyproject.toml")] if not after else [])),
        outputs=(run / f"{name}.json",),
        after=after,
        memory_gb=0.1,
        minutes=1,
    )


def plan(run: Path, **slow) -> list[Stage]:
    """Data, two chains of training, their samples and verdicts, a report; ``slow`` lengthens stages by name."""

    def made(name, *after):
        return stage(run, name, *after, **slow.get(name.replace("-", "_"), {}))

    return [
        made("data-x"),
        made("train-a-one", "data-x"),
        made("sample-a-one", "train-a-one"),
        made("train-a-two", "train-a-one"),
        made("sample-a-two", "train-a-two"),
        made("train-b-one", "data-x"),
        made("sample-b-one", "train-b-one"),
        made("report", "sample-a-one", "sample-a-two", "sample-b-one"),
    ]


@pytest.fixture(autouse=True)
def stand_in(monkeypatch):
    """The kind of a stand-in is the first word of its name, and it is found by workers of both executors."""
    from evaluate import cluster_jobs

    kinds = {"data": "prepare", "train": "train", "sample": "sample", "judge": "judge"}
    monkeypatch.setattr(cluster_jobs, "kind_of", lambda s: kinds.get(s.id.partition("-")[0], "report"))
    here = str(Path(__file__).parent)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([here, os.environ.get("PYTHONPATH", os.getcwd())]))


def last_state(output: Path) -> int:
    """The number a stand-in told to stop had got to; 0 when it kept none."""
    return max((int(path.name) for path in partial_folder(output).glob("*")), default=0)


@dataclass(frozen=True)
class Study:
    name: str
    output: Path
    device: str = "cpu"


class Submitted:
    """A plan that was sent to the cluster."""

    def __init__(self, slurm, folder: Path, stages, *, dry_run=False, **profile) -> None:
        self.slurm, self.run, self.stages = slurm, folder, stages
        values = {
            "python": sys.executable,
            "setup": [f"export PYTHONPATH=$PYTHONPATH:{Path(__file__).parent}"],
            "signal_seconds": 30,
            "minutes_at_least": 10,
            "margin": 1.0,
            "probe_seconds": 0,
            **profile,
        }
        self.profile = build(Profile, values, where="test")
        self.lines: list[str] = []
        self.submit(dry_run=dry_run)

    def submit(self, **how) -> dict[str, str]:
        from evaluate import cluster_checks

        # stand-ins have no prompts and no judges whose cost could be told
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cluster_checks, "_dollars", lambda experiment, stages: 0.0)
            study = Study("faults", self.run)
            words = ["study.yaml", "--profile", "virtual"]
            return submit(study, self.profile, self.lines.append, words=words, stages=self.stages, **how)

    def element(self, name: str) -> str:
        return submissions(self.run)[-1].stages()[name]

    def starts(self, name: str) -> list[str]:
        path = self.run / f"{name}.starts"
        return [line.split()[0] for line in path.read_text().splitlines()] if path.exists() else []

    def until_started(self, name: str, times: int = 1) -> str:
        """Wait until the stage itself runs; the node it runs on."""
        self.until(lambda: len(self.starts(name)) >= times, f"{name} to start")
        return self.starts(name)[-1]

    def until(self, condition, what: str) -> None:
        deadline = time.monotonic() + PATIENCE
        while not condition():
            assert time.monotonic() < deadline, f"waited for {what}\n{self.told()}"
            time.sleep(0.3)

    def finish(self) -> None:
        self.until(lambda: not self.slurm.queue(), "the queue to empty")

    def status(self) -> dict[str, str]:
        return {place.stage: place.status for place in places(self.run)}

    def told(self) -> str:
        logs = sorted(self.run.glob("slurm/*/logs/*.out"))
        return "\n".join([str(self.slurm.queue()), *(f"{p.name}: {p.read_text()}" for p in logs)])

    def files(self) -> dict[str, object]:
        return {p.name: json.loads(p.read_text()) for p in self.run.glob("*.json") if p.name != STUDY}

    def same_as_local(self, tmp_path: Path, **slow) -> bool:
        assert set(self.status().values()) == {"done"}, self.told()
        return self.files() == local_files(tmp_path, **slow)


def local_files(tmp_path: Path, **slow) -> dict[str, object]:
    """What the local executor ends with."""
    run = tmp_path / "local"
    Executor(plan(run, **slow), run, Machine(workers=2, memory_gb=8.0), lambda line: None).execute()
    return {p.name: json.loads(p.read_text()) for p in run.glob("*.json")}


def test_a_plan_runs_as_arrays_and_ends_as_it_does_locally(slurm, tmp_path, monkeypatch):
    run, dumped = tmp_path / "run", {"environment": True}
    offline = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")
    for name in offline:  # sbatch hands on what other tests have set here
        monkeypatch.delenv(name, raising=False)
    sent = Submitted(
        slurm,
        run,
        plan(run, train_a_one=dumped, sample_a_one=dumped),
        setup=[f"export PYTHONPATH=$PYTHONPATH:{Path(__file__).parent} FROM_SETUP=yes"],
        environment={"HTTPS_PROXY": "http://proxy:3128"},
        local_disk=f"{tmp_path}/$SLURMD_NODENAME",
        kinds={"sample": {"internet": True}},
    )
    assert len(submissions(sent.run)[0].ids) == 6
    sent.finish()
    assert sent.same_as_local(tmp_path)
    assert all(len(sent.starts(s.id)) == 1 for s in sent.stages)
    assert sent.submit() == {} and "nothing to submit" in sent.lines[-1]
    code = sent.run / "slurm" / "0001" / "code"
    record = json.loads((sent.run / "stages" / "report.json").read_text())
    assert record["commit"] == (code / "COMMIT").read_text().strip() != "unknown"
    # what the profile says about the environment reached the stages
    train, sample = (json.loads((run / f"{n}-a-one.environment").read_text()) for n in ("train", "sample"))
    assert [train.get(name) for name in offline] == ["1", "1", "1"]
    assert [sample.get(name) for name in offline] == [None, None, None]  # this kind has internet
    assert train["FROM_SETUP"] == "yes" and train["HTTPS_PROXY"] == "http://proxy:3128"
    assert train["CANDOR_LOCAL_DISK"] == f"{tmp_path}/{train['SLURMD_NODENAME']}"
    assert train["SRUN_CPUS_PER_TASK"] == train["SLURM_CPUS_PER_TASK"] == "1"
    assert train["PYTHONPATH"].startswith(str(code)) and train["PYTHONSAFEPATH"] == "1"


def test_signals_requeues_and_a_dead_node_cost_time_and_nothing_else(slurm, tmp_path):
    """Two array jobs run at once; one is told that its time is over, the other is requeued and loses its node.

    The one that is told is the last of its array and has its number: its sibling must not be requeued with it.
    """
    run, gate = tmp_path / "run", tmp_path / "gate"
    held = {"count": 5, "pause": 0.2, "gate": str(gate)}
    slow = {"train_a_one": held, "train_b_one": held}
    sent = Submitted(slurm, run, plan(run, **slow))
    sent.until_started("train-b-one")
    sent.until_started("train-a-one")
    slurm.run("scancel", "--signal=USR1", "--batch", sent.element("train-b-one"))
    sent.until_started("train-b-one", times=2)
    assert len(sent.starts("train-a-one")) == 1, sent.told()
    slurm.run("scontrol", "requeue", sent.element("train-a-one"))
    node = sent.until_started("train-a-one", times=2)
    assert last_state(run / "train-b-one.json") > 0  # it went on from there
    slurm.kill_node(node)
    sent.until_started("train-a-one", times=3)
    gate.touch()
    sent.finish()
    assert set(sent.status().values()) == {"done"}, sent.told()
    assert sent.files() == local_files(tmp_path, **slow)
    assert len(sent.starts("train-a-one")) == 3


def test_a_preempted_training_goes_on_from_where_it_was(slurm, tmp_path):
    """A job of a higher partition takes the node; Slurm itself sends SIGTERM and puts ours back into the queue."""
    run, gate = tmp_path / "run", tmp_path / "gate"
    slow = {"train_a_one": {"count": 5, "pause": 0.2, "gate": str(gate)}}
    sent = Submitted(slurm, run, plan(run, **slow), all={"partition": "main"})
    node = sent.until_started("train-a-one")
    slurm.run("sbatch", "--partition=urgent", f"--nodelist={node}", "--output=/dev/null", "--wrap=sleep 5")
    sent.until_started("train-a-one", times=2)
    assert last_state(run / "train-a-one.json") > 0
    gate.touch()
    sent.finish()
    assert sent.same_as_local(tmp_path, **slow)


def test_only_turns_that_keep_nothing_new_count_against_a_stage(slurm, tmp_path):
    """One requeue is allowed: a stage that gets on takes more of them, one that forgets everything fails."""
    run, gate = tmp_path / "run", tmp_path / "gate"
    stages = [
        stage(run, "train-a", count=25, pause=1.0, gate=str(gate)),
        stage(run, "train-b", pause=0.5, gate=str(gate), forgetful=True),
        stage(run, "sample-a", "train-a"),
    ]
    sent = Submitted(slurm, run, stages, requeues=1)
    for turn in (1, 2):
        for name in ("train-a", "train-b"):
            sent.until_started(name, times=turn)
            slurm.run("scancel", "--signal=USR1", "--batch", sent.element(name))
    sent.until_started("train-a", times=3)
    sent.until(lambda: sent.status()["train-b"] == "failed", "the other one to fail")
    gate.touch()
    sent.finish()
    state = read_state(run, "train-b")
    assert state is not None and "requeued 2 times in a row and came no further" in state.why
    assert len(sent.starts("train-b")) == 2 and len(sent.starts("train-a")) == 3
    assert sent.status()["sample-a"] == "done"


def test_a_full_queue_gets_what_fits_and_the_rest_later(slurm, tmp_path):
    run = tmp_path / "run"
    stages = [stage(run, "data-x"), stage(run, "train-a", "data-x"), stage(run, "sample-a", "train-a")]
    sent = Submitted(slurm, run, stages, max_jobs=2, all={"arguments": ["--hold"]})
    told = "\n".join(sent.lines)
    assert "the queue has room for 2, the rest is for later" in told and "submitted 2 elements in 2 arrays" in told
    assert "not submitted: 1 elements in 1 arrays" in told
    assert "python scripts/slurm/submit.py study.yaml --profile virtual" in told
    assert sent.status()["sample-a"] == "waiting"
    with pytest.raises(UserError, match="the queue is full"):
        sent.submit()
    slurm.run("scontrol", "release", *submissions(run)[0].ids.values())
    sent.profile = replace(sent.profile, all=Options())
    sent.finish()
    assert "to submit the rest, when the queue is shorter: python" in "\n".join(lines(run, places(run)))
    sent.submit()
    sent.finish()
    assert set(sent.status().values()) == {"done"}, sent.told()
    assert len(submissions(run)) == 2


def test_what_no_node_can_give_is_said_with_what_mends_it(slurm, tmp_path):
    run = tmp_path / "run"
    sent = Submitted(slurm, run, plan(run), kinds={"train": {"partition": "urgent", "arguments": ["--time=300"]}})
    sent.until(lambda: sent.status()["data-x"] == "done", "the data")
    sent.until(lambda: "more time than its partition" in "\n".join(lines(run, places(run))), "Slurm's reason")
    told = "\n".join(lines(run, places(run)))
    command = next(line for line in told.splitlines() if "scancel" in line)
    words = command.partition("then: ")[2].partition(";")[0].split()
    assert words[:2] == ["scancel", "--state=PENDING"] and "nothing to mend" not in told
    slurm.run(*words)
    sent.finish()
    assert "to submit what was cancelled" in "\n".join(lines(run, places(run)))


def test_a_node_that_cannot_write_into_the_run_folder_is_found_before_anything_is_sent(slurm, tmp_path):
    """Node n4 sees an empty folder where the others see the run; its partition is asked, and so is the default one."""
    slurm.kill_daemon("n4")
    slurm.start_node("n4", without=tmp_path)
    try:
        stages = plan(tmp_path / "run")
        with pytest.raises(UserError, match="a node of partition apart cannot write into"):
            Submitted(slurm, tmp_path / "run", stages, probe_seconds=120, kinds={"sample": {"partition": "apart"}})
        assert set(slurm.queue().values()) <= {"COMPLETING"}  # the probe itself
        assert not list((tmp_path / "run" / "slurm").glob("0*"))
    finally:
        slurm.kill_daemon("n4")  # the next test starts it as it was


CONTAINER = """#!/bin/bash
# CONTAINER FOLDER... -- COMMAND: a root of its own with these folders in it, and no variable of outside but PATH.
exec unshare --mount bash -c '
  set -e; root=$1; shift
  mount -t tmpfs tmpfs "$root"
  while [[ $1 != -- ]]; do mkdir -p "$root$1"; mount --rbind "$1" "$root$1"; shift; done; shift
  exec env -i PATH="$PATH" chroot "$root" "$@"' container {root} "$@"
"""


def test_jobs_run_in_a_container_that_sees_and_keeps_nothing_but_what_it_is_given(slurm, tmp_path):
    """Made of the kernel's own means, which are Apptainer's and Enroot's too; one job is also told to stop in it."""
    run, gate, begin = tmp_path / "run", tmp_path / "gate", tmp_path / "container"
    (tmp_path / "root").mkdir()
    begin.write_text(CONTAINER.format(root=tmp_path / "root"))
    begin.chmod(0o755)
    system = ["/usr", "/bin", "/lib", "/lib64", "/etc", "/proc", "/dev"]
    python = {sys.prefix, sys.base_prefix, str(Path(sys.prefix).resolve())} - {"/usr"}
    folders = [*system, *sorted(python), os.getcwd()]
    slow = {"train_a_one": {"count": 5, "pause": 0.2, "gate": str(gate), "environment": True}}
    how = {"probe_seconds": 120, "environment": {"HTTPS_PROXY": "http://a b:3128"}}
    for bound, told in (([], "and bind it and"), (["/nowhere"], "cannot run")):
        with pytest.raises(UserError, match=told):
            Submitted(slurm, run, plan(run, **slow), container=f"{begin} {' '.join([*folders, *bound])} --", **how)
    container = f"{begin} {' '.join(folders)} {tmp_path} --"
    setup = [f"export PYTHONPATH=$PYTHONPATH:{Path(__file__).parent} OUTSIDE=only"]
    sent = Submitted(slurm, run, plan(run, **slow), container=container, setup=setup, **how)
    sent.until_started("train-a-one")
    slurm.run("scancel", "--signal=USR1", "--batch", sent.element("train-a-one"))
    sent.until_started("train-a-one", times=2)
    assert last_state(run / "train-a-one.json") > 0
    gate.touch()
    sent.finish()
    assert sent.same_as_local(tmp_path, **slow)
    seen = json.loads((run / "train-a-one.environment").read_text())
    assert seen["HTTPS_PROXY"] == "http://a b:3128" and seen["HF_HUB_OFFLINE"] == "1" and "OUTSIDE" not in seen
    assert seen["PYTHONPATH"].startswith(str(run / "slurm")) and seen["PYTHONSAFEPATH"] == "1"


def test_a_job_over_its_limit_saves_itself_and_goes_on(slurm, tmp_path):
    """Nobody but Slurm's clock says that the minute is nearly over."""
    run, gate = tmp_path / "run", tmp_path / "gate"
    slow = {"train_a_one": {"count": 50, "pause": 0.1, "gate": str(gate)}}
    sent = Submitted(slurm, run, plan(run, **slow), minutes_at_least=1, signal_seconds=20, requeues=50)
    sent.until_started("train-a-one", times=2)
    assert last_state(run / "train-a-one.json") > 0
    assert "its time was nearly over" in sent.told() and "asking to be requeued" in sent.told()
    gate.touch()
    sent.finish()
    assert sent.same_as_local(tmp_path, **slow)


def test_a_drained_node_gets_no_more_work(slurm, tmp_path):
    run, gate = tmp_path / "run", tmp_path / "gate"
    slow = {"train_a_one": {"gate": str(gate)}}
    sent = Submitted(slurm, run, plan(run, **slow))
    node = sent.until_started("train-a-one")
    slurm.run("scontrol", "update", f"nodename={node}", "state=drain", "reason=test")
    slurm.run("scontrol", "requeue", sent.element("train-a-one"))
    sent.until_started("train-a-one", times=2)
    gate.touch()
    sent.finish()
    assert len(sent.starts("train-a-one")) == 2 and sent.starts("train-a-one")[-1] != node
    assert node not in sent.starts("train-a-two") + sent.starts("sample-a-one")
    assert sent.files() == local_files(tmp_path, **slow)


def test_a_node_that_lost_only_its_daemon_does_not_make_a_stage_twice(slurm, tmp_path):
    """The job lives on unseen, Slurm starts it again elsewhere, and that one waits for the claim."""
    run, gate = tmp_path / "run", tmp_path / "gate"
    sent = Submitted(slurm, run, plan(run, train_a_one={"gate": str(gate)}))
    node = sent.until_started("train-a-one")
    slurm.kill_daemon(node)
    sent.until(lambda: "waiting for it to end" in sent.told(), "the second job to wait for the first")
    gate.touch()
    sent.finish()
    assert sent.starts("train-a-one") == [node]
    assert set(sent.status().values()) == {"done"}, sent.told()


def test_a_full_disk_fails_loudly_and_is_mended_by_resubmitting(slurm, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(run)], capture_output=True).returncode:
        pytest.skip("a small file system cannot be mounted here")
    try:
        gate = tmp_path / "gate"
        slow = {"train_a_one": {"gate": str(gate), "bytes": 400_000}}
        sent = Submitted(slurm, run, plan(run, **slow))
        sent.until_started("train-a-one")
        with suppress(OSError), (run / "filler").open("wb", buffering=0) as file:
            while file.write(b"x" * 4096):
                pass
        gate.touch()
        sent.finish()
        found = sent.status()
        assert "failed" in found.values() and found["report"] == "blocked"
        (run / "filler").unlink()
        sent.submit(again=True)
        sent.finish()
        assert set(sent.status().values()) == {"done"}, sent.told()
        assert sent.files() == local_files(tmp_path, **slow)
    finally:
        subprocess.run(["umount", "-l", str(run)], check=True)


def test_an_input_edited_after_submission_is_refused(slurm, tmp_path):
    """Jobs that start hours later must not mix two versions; put back, the study goes on where it failed.

    While they wait, the same command does not leave them to it: it says how to end them, and takes the new version.
    """
    run = tmp_path / "run"
    run.mkdir()
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("rate: 1\n")
    first = stage(run, "data-x")
    stages = [first, stage(run, "train-a", "data-x"), stage(run, "report", "train-a")]
    stages[1] = replace(stages[1], inputs=(*stages[1].inputs, recipe))
    sent = Submitted(slurm, run, stages, all={"arguments": ["--hold"]})
    recipe.write_text("rate: 2\n")
    with pytest.raises(UserError, match=r"recipe.yaml was edited") as refused:
        sent.submit()
    slurm.run(*shlex.split(re.findall("scancel .*", str(refused.value))[0]))
    sent.until(lambda: len(slurm.queue()) == 1, "the end of it, and of what waited for it")
    assert sent.status() == {"data-x": "waiting", "train-a": "blocked", "report": "blocked"}
    sent.submit()
    assert set(sent.status().values()) == {"waiting"}
    recipe.write_text("rate: 3\n")
    told = "\n".join(lines(run, places(run)))
    assert "until it is released" in told and "nothing to mend" not in told
    command = next(line for line in told.splitlines() if "scontrol release" in line)
    words = command.partition(": ")[2].partition("   (")[0].split()
    assert words[:2] == ["scontrol", "release"]  # as status says it
    slurm.run(*words)
    sent.finish()
    state = read_state(run, "train-a")
    assert state is not None and "recipe.yaml changed since the study was submitted" in state.why
    with pytest.raises(UserError, match="train-a failed"):
        sent.submit()
    recipe.write_text("rate: 2\n")
    sent.profile = replace(sent.profile, all=Options())
    sent.submit(again=True)
    sent.finish()
    assert set(sent.status().values()) == {"done"}, sent.told()


def test_a_dry_run_prints_every_call_and_sends_none(slurm, tmp_path, capsys):
    run = tmp_path / "run"
    sent = Submitted(slurm, run, plan(run), dry_run=True)
    calls = [line for line in capsys.readouterr().out.splitlines() if line.startswith("sbatch")]
    assert len(calls) == 6 and "--dependency=aftercorr:<train-1>" in shlex.split(calls[2])
    assert not slurm.queue() and not run.exists()
    assert any("GPU-hours" in line for line in sent.lines)


def test_five_thousand_elements_are_submitted_in_half_a_minute(slurm, tmp_path):
    run = tmp_path / "run"
    stages = [stage(run, "data-x")]
    for i in range(1250):
        stages += [stage(run, f"train-{i}", "data-x"), stage(run, f"sample-{i}", f"train-{i}")]
        stages += [stage(run, f"judge-{i}", f"sample-{i}"), stage(run, f"judge-two-{i}", f"sample-{i}")]
    started = time.monotonic()
    sent = Submitted(slurm, run, stages, all={"arguments": ["--hold"]})
    seconds = time.monotonic() - started
    assert len(slurm.queue()) == 5001
    assert len(submissions(run)[0].ids) == 9  # MaxArraySize is 1001, so each array of 1,250 is two
    assert seconds < 30, f"{seconds:.1f} s"
    started = time.monotonic()
    assert set(sent.status().values()) == {"waiting"}
    assert time.monotonic() - started < 30
