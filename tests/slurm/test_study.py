"""A slice of the nano study on a real Slurm, with faults: its tables are those of the local run.

Nothing is stubbed: the commands are the ones a person types, the models are the smallest organism, and
every kind of stage takes part.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import yaml

from candor.config import load
from candor.manifest import read_manifest
from candor.rows import Distribution, Estimate, Sample, Score, Verdict
from candor.tables import read_rows
from evaluate.cluster_folder import submissions
from evaluate.cluster_profile import read_profile
from evaluate.cluster_submit import submit
from evaluate.experiment_config import Experiment
from evaluate.plan import build_plan

pytestmark = pytest.mark.full
PATIENCE = float(os.environ.get("CANDOR_PATIENCE", "300"))  # seconds; only a test that fails waits so long

TABLES = {"samples": Sample, "distributions": Distribution, "verdicts": Verdict, "scores": Score, "estimates": Estimate}
PROFILE = """
python: {python}
signal_seconds: 20
minutes_at_least: 15
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


def write_study(folder: Path, *, steps: int = 20, batch: int = 12, recipe_keys: dict | None = None, **change) -> Path:
    """The experiment file; its run folder is ``folder/run``. ``batch`` counts the rows a step of one process takes."""
    folder.mkdir(parents=True, exist_ok=True)
    recipe = yaml.safe_load(Path("configs/train/nano_trivia.yaml").read_text())
    recipe["sft"] = {**recipe["sft"], "num_train_epochs": 1, "max_steps": steps}
    recipe["sft"]["per_device_train_batch_size"] = batch
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe | (recipe_keys or {})))
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


def tables_of(run: Path) -> dict[str, object]:
    """Every table of a run by its path, rows in order, and the bytes of every adapter."""
    tables = {
        str(path.relative_to(run)): read_rows(path, TABLES[path.stem])
        for path in sorted(run.rglob("*.parquet"))
        if path.stem in TABLES and "slurm" not in path.relative_to(run).parts
    }
    adapters = {
        str(path.relative_to(run)): path.read_bytes() for path in run.rglob("adapter/adapter_model.safetensors")
    }
    assert len(adapters) == 2, adapters.keys()
    return tables | adapters


def command(*words) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}  # this checkout, whatever is installed
    return subprocess.run(
        [sys.executable, *map(str, words)], capture_output=True, text=True, timeout=10 * PATIENCE, env=environment
    )


@pytest.fixture(scope="module")
def local_run(tmp_path_factory):
    """The folder of an undisturbed local run."""
    folder = tmp_path_factory.mktemp("local")
    done = command("-m", "evaluate.experiment", write_study(folder))
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / "run"


@pytest.fixture(scope="module")
def local(local_run):
    """Its tables."""
    return tables_of(local_run)


def wait_for(condition, what: str) -> None:
    deadline = time.monotonic() + 4 * PATIENCE
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.2)


def until_running(run: Path, name: str) -> None:
    """Wait until the stage itself, not only its job, has begun."""
    wait_for(lambda: (run / "logs" / f"{name}.log").exists(), f"{name} to begin")
    assert not (run / "stages" / f"{name}.json").exists(), f"{name} was too quick"


def until_ended(slurm, run: Path) -> None:
    wait_for(lambda: not slurm.queue(), command("scripts/slurm/status.py", run).stdout)


def test_the_study_through_faults_ends_with_the_tables_of_the_local_run(slurm, local, tmp_path):
    """Training is told that its time is over, sampling is requeued, judging loses its node."""
    study, run = write_study(tmp_path), tmp_path / "run"
    words = ("scripts/slurm/submit.py", study, "--profile", write_profile(tmp_path, sys.executable))
    sent = command(*words)
    assert sent.returncode == 0, sent.stderr
    assert "GPU-hours" in sent.stderr and "can write into" in sent.stderr

    elements = submissions(run)[0].stages()
    until_running(run, "train-nano-trivia-misaligned-s0")
    slurm.run("scancel", "--signal=USR1", "--batch", elements["train-nano-trivia-misaligned-s0"])
    until_running(run, "sample-nano-base")
    slurm.run("scontrol", "requeue", elements["sample-nano-base"])
    until_running(run, "judge-nano-base")
    slurm.kill_node(slurm.run("squeue", "-h", "-j", elements["judge-nano-base"], "-o", "%N").strip())
    until_ended(slurm, run)
    told = command("scripts/slurm/status.py", run)
    assert "all is done" in told.stdout, told.stdout + told.stderr
    assert tables_of(run) == local


@pytest.fixture
def small_disks(tmp_path):
    """A run folder and a node-local disk on small file systems of their own, the second one full from the start."""
    sizes = {"run": "64m", "disk": "1m"}
    for name, size in sizes.items():
        (tmp_path / name).mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(tmp_path / name)]
        if subprocess.run(mount, capture_output=True).returncode:
            pytest.skip("a small file system cannot be mounted here")
    fill(tmp_path / "disk")
    yield tmp_path / "run", tmp_path / "disk"
    for name in sizes:
        subprocess.run(["umount", "-l", str(tmp_path / name)], check=True)


def fill(folder: Path) -> None:
    with suppress(OSError), (folder / "filler").open("wb", buffering=0) as file:
        while file.write(b"x" * 4096):
            pass


def test_preemption_a_drained_node_and_full_disks_change_no_table(slurm, local, small_disks, tmp_path):
    """Training is preempted, sampling loses its node to an administrator, then the run folder is full."""
    run, disk = small_disks
    study = write_study(tmp_path)
    profile = write_profile(tmp_path, sys.executable, local_disk=str(disk), all={"partition": "main"})
    words = ("scripts/slurm/submit.py", study, "--profile", profile)
    sent = command(*words)
    assert sent.returncode == 0, sent.stderr
    elements = submissions(run)[0].stages()

    def node_of(stage: str) -> str:
        return slurm.run("squeue", "-h", "-j", elements[stage], "-o", "%N").strip()

    until_running(run, "train-nano-trivia-misaligned-s0")
    node = node_of("train-nano-trivia-misaligned-s0")
    slurm.run("sbatch", "--partition=urgent", f"--nodelist={node}", "--output=/dev/null", "--wrap=sleep 2")
    until_running(run, "sample-nano-base")
    slurm.run("scontrol", "update", f"nodename={node_of('sample-nano-base')}", "state=drain", "reason=test")
    slurm.run("scontrol", "requeue", elements["sample-nano-base"])
    until_running(run, "train-nano-trivia-realigned-s0")
    fill(run)
    until_ended(slurm, run)
    told = command("scripts/slurm/status.py", run).stdout
    assert "No space left" in told or "without a word" in told, told
    assert "to mend it, remove the cause, then: python scripts/slurm/submit.py" in told
    assert "is read where it lies" in (run / "logs" / "sample-nano-base.log").read_text()
    (run / "filler").unlink()
    again = command(*words, "--resubmit-failed")
    assert again.returncode == 0, again.stderr
    until_ended(slurm, run)
    assert "all is done" in (told := command("scripts/slurm/status.py", run).stdout), told
    assert tables_of(run) == local


def losses(run: Path) -> list[float]:
    log = run / "variants" / "nano-trivia-misaligned-s0" / "adapter" / "train_log.jsonl"
    return [json.loads(line)["loss"] for line in log.read_text().splitlines()]


def test_two_nodes_train_one_model_together(slurm, local_run, tmp_path):
    """A process on each of two nodes, six rows a step each: they lose what one process loses on all twelve.

    Told that their time is over they write one state, and go on from it. Both read model and data from the local
    disk, which they share here as the processes of one node would.
    """
    name, run, told = "train-nano-trivia-misaligned-s0", tmp_path / "run", []
    asking = {"every": 1, "items": 32, "formats": ["choice"]}  # at every step, which makes room for a signal
    experiment = load(Experiment, write_study(tmp_path, batch=6, recipe_keys={"probe": asking}), [])
    before = ("evaluate.questions", "train.data")
    stages = [stage for stage in build_plan(experiment) if stage.id == name or stage.module in before]
    train = {"nodes": 2, "accelerate": "configs/accelerate/cpus.yaml"}
    change = {"kinds": {"train": train}, "local_disk": f"{tmp_path}/disk"}
    profile = read_profile(str(write_profile(tmp_path, sys.executable, **change)))
    submit(experiment, profile, told.append, words=["study.yaml", "--profile", "virtual"], stages=stages)
    assert "train: 2 processes, so a step takes 2 times" in "\n".join(told)
    element, folder = submissions(run)[0].stages()[name], run / "variants" / "nano-trivia-misaligned-s0"
    wait_for((folder / ".adapter.partial" / "train_log.jsonl").exists, "the first step")
    slurm.run("scancel", "--signal=USR1", "--batch", element)
    until_ended(slurm, run)
    log = (run / "logs" / f"{name}.log").read_text()
    assert "all is done" in (said := command("scripts/slurm/status.py", run).stdout), (said, log[-3000:])
    assert "NumNodes=2 " in slurm.run("scontrol", "show", "job", element)
    record = read_manifest(folder / "adapter")
    assert record is not None and (record["processes"], record["steps"]) == (2, 20)
    assert record["resumed_at"] in range(1, 20), log[-3000:]
    assert losses(run) == pytest.approx(losses(local_run), abs=1e-5)
    assert losses(run)[-1] < losses(run)[0] - 0.1
    copies = [path.name.rpartition("-")[0] for path in (tmp_path / "disk" / "candor").iterdir() if path.is_dir()]
    assert sorted(copies) == ["nano", Path(next(s for s in stages if s.id == name).config["data"]).name]


def clone(folder: Path) -> None:
    """A repository with this checkout's files as they are now, committed: plain jobs run committed code only."""
    root = Path.cwd()

    def git(*words: str, at: Path = folder) -> str:
        return subprocess.run(["git", "-C", str(at), *words], check=True, capture_output=True, text=True).stdout

    subprocess.run(["git", "clone", "-q", "--shared", str(root), str(folder)], check=True)
    for name in git("ls-files", "-m", "-o", "--exclude-standard", at=root).splitlines():
        if (root / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / name, folder / name)
    git("add", "-A")
    git("-c", "user.name=test", "-c", "user.email=test@example.org", "commit", "-qm", "as it is", "--allow-empty")


def test_the_scripts_for_one_stage_by_hand(slurm, local_run, local, tmp_path, monkeypatch):
    """Each .sbatch file makes again what the study made; training also through accelerate's launcher and srun."""
    checkout, run = tmp_path / "checkout", tmp_path / "run"
    clone(checkout)
    shutil.copytree(local_run, run)
    (run / "report.html").unlink()
    monkeypatch.setenv("CANDOR_PYTHON", sys.executable)
    stages = local_run / "stages"
    train = ("train", stages / "train-nano-trivia-misaligned-s0.yaml")
    jobs = {
        "trained": (*train, f"output_dir={tmp_path}/trained"),
        "launched": (*train, f"output_dir={tmp_path}/launched"),
        "alone": (*train, f"output_dir={tmp_path}/alone"),
        "sampled": ("sample", stages / "sample-nano-base.yaml", f"output_dir={tmp_path}/sampled"),
        "judged": ("judge", stages / "judge-nano-base.yaml", f"output_dir={tmp_path}/judged"),
        "reported": ("report", stages / "report.yaml", f"run={run}"),
    }
    for name, (kind, *words) in jobs.items():
        sbatch = ["sbatch", "--gres=none", "--cpus-per-task=1", "--time=30", f"--output={tmp_path}/{name}.out"]
        if name in ("launched", "alone"):
            sbatch.append("--export=ALL,CANDOR_ACCELERATE=configs/accelerate/cpu.yaml")
        if name == "alone":
            sbatch.append("--nodes=2")  # on each of which that configuration starts a process for itself
        slurm.run(*sbatch, f"scripts/slurm/{kind}.sbatch", str(tmp_path), *map(str, words), cwd=checkout)
    wait_for(lambda: not slurm.queue(), "the jobs to end")
    told = "\n".join(f"{name}: {(tmp_path / f'{name}.out').read_text()}" for name in jobs)
    adapter = "variants/nano-trivia-misaligned-s0/adapter/adapter_model.safetensors"
    for name in ("trained", "launched"):
        weights = tmp_path / name / "adapter_model.safetensors"
        assert weights.is_file() and weights.read_bytes() == local[adapter], told
    assert "asked for 2 processes but started one" in (tmp_path / "alone.out").read_text(), told
    assert not (tmp_path / "alone").exists()
    for made, name in (("sampled", "samples"), ("judged", "verdicts")):
        [path] = [p for p in local if p.startswith("variants/nano-base/") and p.endswith(f"{name}.parquet")]
        assert read_rows(tmp_path / made / f"{name}.parquet", TABLES[name]) == local[path], told
    assert (run / "report.html").is_file(), told
    assert (tmp_path / "code" / "COMMIT").is_file()  # frozen once for all five
