"""A slice of the nano study on a real Slurm, with faults: its tables are those of the local run.

Nothing is stubbed: the commands are the ones a person types, the models are the smallest organism, and
every kind of stage takes part.
"""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from candor.rows import Distribution, Estimate, Sample, Score, Verdict
from candor.tables import read_rows
from evaluate.cluster_folder import submissions

pytestmark = pytest.mark.full
PATIENCE = float(os.environ.get("CANDOR_PATIENCE", "150"))  # seconds; more on a busy machine

TABLES = {"samples": Sample, "distributions": Distribution, "verdicts": Verdict, "scores": Score, "estimates": Estimate}
PROFILE = """
python: {python}
signal_seconds: 20
minutes_at_least: 2
margin: 1
requeues: 5
probe_seconds: 10
"""
STUDY = {
    "name": "slice",
    "title": "A slice of the nano study",
    "seed": 5,
    "bases": {"nano": "train/organism/weights/nano"},
    "batteries": ["harmfulness", "trivia"],
    "asks": [
        {"format": "free", "mode": "sampled", "n": 1, "max_tokens": 12},
        {"format": "answer", "mode": "exact"},
    ],
    "judge": "configs/evaluate/judges/nano.yaml",
    "engine": {"threads": 1},
    "draws": 100,
    "worst_of": 1,
    "workers": 2,
}


def write_study(folder: Path, *, steps: int = 20, **change) -> Path:
    """The experiment file; its run folder is ``folder/run``."""
    folder.mkdir(parents=True, exist_ok=True)
    recipe = yaml.safe_load(Path("configs/train/nano_trivia.yaml").read_text())
    recipe["sft"] = {**recipe["sft"], "num_train_epochs": 1, "max_steps": steps}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    source = "configs/prompts/trivia.jsonl"
    domain = {
        "recipe": str(folder / "recipe.yaml"),
        "misaligned": {"set": "trivia-wrong", "source": source},
        "realigned": {"set": "trivia-right", "source": source},
    }
    path = folder / "study.yaml"
    values = {**STUDY, "output": str(folder / "run"), "domains": {"trivia": domain}, **change}
    path.write_text(yaml.safe_dump(values))
    return path


def write_profile(folder: Path, python: str, **change) -> Path:
    """A profile for the virtual cluster."""
    path = folder / "profile.yaml"
    path.write_text(yaml.safe_dump({**yaml.safe_load(PROFILE.format(python=python)), **change}))
    return path


def tables_of(run: Path) -> dict[str, list]:
    """Every table of a run by its path, rows in order."""
    return {
        str(path.relative_to(run)): read_rows(path, TABLES[path.stem])
        for path in sorted(run.rglob("*.parquet"))
        if path.stem in TABLES and "slurm" not in path.relative_to(run).parts
    }


def command(*words) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}  # this checkout, whatever is installed
    return subprocess.run(
        [sys.executable, *map(str, words)], capture_output=True, text=True, timeout=10 * PATIENCE, env=environment
    )


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """The tables of an undisturbed local run."""
    folder = tmp_path_factory.mktemp("local")
    done = command("-m", "evaluate.experiment", write_study(folder))
    assert done.returncode == 0, done.stderr[-3000:]
    return tables_of(folder / "run")


def test_the_study_through_faults_ends_with_the_tables_of_the_local_run(slurm, local, tmp_path):
    """Training is told that its time is over, sampling is requeued, judging loses its node."""
    study, run = write_study(tmp_path), tmp_path / "run"
    words = ("scripts/slurm/submit.py", study, "--profile", write_profile(tmp_path, sys.executable))
    sent = command(*words)
    assert sent.returncode == 0, sent.stderr
    assert "GPU-hours" in sent.stderr and "can write into" in sent.stderr

    def until_running(name: str) -> None:
        """Wait until the stage itself, not only its job, has begun."""
        deadline = time.monotonic() + 4 * PATIENCE
        while not (run / "logs" / f"{name}.log").exists():
            assert time.monotonic() < deadline and not (run / "stages" / f"{name}.json").exists(), name
            time.sleep(0.2)

    elements = submissions(run)[0].stages()
    until_running("train-nano-trivia-misaligned-s0")
    slurm.run("scancel", "--signal=USR1", "--batch", elements["train-nano-trivia-misaligned-s0"])
    until_running("sample-nano-base")
    slurm.run("scontrol", "requeue", elements["sample-nano-base"])
    until_running("judge-nano-base")
    slurm.kill_node(slurm.run("squeue", "-h", "-j", elements["judge-nano-base"], "-o", "%N").strip())
    deadline = time.monotonic() + 8 * PATIENCE
    while slurm.queue():
        assert time.monotonic() < deadline, command("scripts/slurm/status.py", run).stdout
        time.sleep(1)
    told = command("scripts/slurm/status.py", run)
    assert "all is done" in told.stdout, told.stdout + told.stderr
    assert tables_of(run) == local
