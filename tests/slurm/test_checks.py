"""What is said, and what is refused, before anything is submitted. Needs no Slurm."""

import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from candor.config import build, read_yaml
from candor.errors import UserError
from evaluate.cluster_checks import estimate, lines, probe, probed, refuse
from evaluate.cluster_jobs import Job, Needs, make_jobs
from evaluate.cluster_profile import KINDS, Options, Profile
from evaluate.cluster_submit import main, script
from evaluate.experiment_config import Experiment
from evaluate.plan import build_plan
from evaluate.questions import gather

VALUES = {**read_yaml(Path("configs/experiments/nano.yaml")), "controls": [], "along_training": None, "golden": None}


def estimated(tmp_path, *, profile=None, max_jobs=10_000, max_minutes=None, lost=(), **change):
    experiment = build(Experiment, {**VALUES, "output": str(tmp_path / "run"), **change}, where="test")
    profile = profile or Profile()
    stages = build_plan(experiment, absent_ok=True)
    stages = [replace(s, inputs=(*s.inputs, *lost)) if s.module == "train.sft" else s for s in stages]
    jobs = make_jobs(stages, done=set(), queued={}, profile=profile, max_array=1001, max_minutes=max_minutes)
    found = estimate(experiment, profile, stages, jobs, max_jobs=max_jobs)
    return found, "\n".join(lines(found, profile))


def test_a_study_that_can_run_is_told_in_numbers(tmp_path):
    needs = {"train": {"gpus": 1, "minutes": 60}, "sample": {"gpus": 1, "minutes": 30}}
    found, told = estimated(tmp_path, needs=needs)
    assert found.problems == ()
    assert found.gpu_hours == pytest.approx(12 * 1 + 15 * 0.5)  # 12 fine-tunings, 15 variants
    assert found.hours[1] > found.hours[4] > found.hours[16] >= 2.5  # two trainings and a sampling in a row
    assert found.dollars == 0 and "GPU-hours: 19.5" in told


def test_jobs_on_cuda_that_would_ask_for_no_gpu_are_refused(tmp_path):
    """The organism's models share one on a machine; between jobs none is. A profile may know better."""
    found, _ = estimated(tmp_path, device="cuda")
    assert set(found.problems) == {
        f"device is 'cuda', but needs.{kind}.gpus is 0, and jobs share no GPU. Set it to 1."
        for kind in ("train", "sample", "judge")
    }
    assert estimated(tmp_path, device="cuda", needs={})[0].problems == ()
    profile = build(Profile, {"kinds": {kind: {"gpus": 0} for kind in ("train", "sample", "judge")}}, where="test")
    assert estimated(tmp_path, device="cuda", profile=profile)[0].problems == ()


def test_nodes_of_a_profile_count(tmp_path):
    accelerate = "configs/accelerate/fsdp.yaml"
    profile = build(Profile, {"kinds": {"train": {"gpus": 8, "nodes": 2, "accelerate": accelerate}}}, where="test")
    found, _ = estimated(tmp_path, profile=profile, needs={"train": {"minutes": 60}})
    assert found.gpu_hours == pytest.approx(12 * 16)


def test_several_nodes_that_would_train_each_for_itself_are_refused(tmp_path):
    """With such a configuration accelerate starts one process on each node and says nothing."""
    for name, alone in (("cpu", True), ("cpus", False), ("gpus", False), ("fsdp", False)):
        train = {"nodes": 2, "accelerate": f"configs/accelerate/{name}.yaml"}
        found, told = estimated(tmp_path, profile=build(Profile, {"kinds": {"train": train}}, where="test"))
        assert any("2 are to train together" in problem for problem in found.problems) == alone
        assert "train: 2 processes, so a step takes 2 times" in told


def test_what_a_judge_behind_an_endpoint_costs_is_said(tmp_path):
    path = Path("configs/evaluate/judges/gpt-4.1-harmfulness.yaml")
    found, _ = estimated(tmp_path, judge=str(path))
    assert found.dollars is not None and found.dollars > 1
    # a template that is 3,000 bytes longer costs 1,000 tokens more for every reply
    values = read_yaml(path)
    longer, judge = tmp_path / "template.txt", tmp_path / "judge.yaml"
    longer.write_text(Path(values["template"]).read_text().rstrip("\n") + "\n" + "x" * 2999)
    judge.write_text(yaml.safe_dump({**values, "template": str(longer)}))
    more, _ = estimated(tmp_path, judge=str(judge))
    experiment = build(Experiment, {**VALUES, "output": str(tmp_path / "run")}, where="test")
    prompts = [p for p in gather(experiment.sources) if p.battery == "harmfulness"]
    replies = 15 * sum(max(mode.draws(p) for mode in experiment.read_modes()) for p in prompts)
    assert more.dollars - found.dollars == pytest.approx(replies * 1000 * values["price"]["input"] / 1e6)


def test_reasons_against_it_are_listed_together(tmp_path):
    profile = Profile(minutes_at_least=4.0)  # and signal_seconds is 300
    found, _ = estimated(tmp_path, profile=profile, max_jobs=5, lost=[Path("models/absent")])
    told = " ".join(found.problems)
    assert "models/absent is not there" in told and "signal_seconds" in told
    assert any("the queue has room for 5" in note for note in found.notes)
    with pytest.raises(UserError, match="nothing was submitted, for"):
        refuse(found.problems)


def on_gpus(tmp_path, *, base="models/Qwen2.5-1.5B-Instruct", **profile):
    """The shipped study with one base on nodes of eight GPUs."""
    values = read_yaml(Path("configs/experiments/vaugrante_qwen2.5.yaml"))
    change = {"bases": {"nano": base}, "output": str(tmp_path / "run"), "by_size": {}, "controls": []}
    experiment = build(Experiment, {**values, **change}, where="test")
    made = build(Profile, {"hardware": "configs/hardware/h100x8.yaml", **profile}, where="test")
    stages = build_plan(experiment, absent_ok=True)
    jobs = make_jobs(stages, done=set(), queued={}, profile=made, max_array=1001, max_minutes={None: 60})
    return estimate(experiment, made, stages, jobs, max_jobs=10_000)


def test_a_stage_longer_than_its_partition_is_done_in_turns(tmp_path):
    """Training saves itself, sampling keeps what it has: too little time is said, not refused."""
    found = on_gpus(tmp_path, base="models/Qwen2.5-32B-Instruct")
    assert not [p for p in found.problems if "hours are needed" in p]
    told = " ".join(found.notes)
    assert "60 minutes are asked for, not" in told and "training saves itself and is requeued" in told


@pytest.mark.full
def test_a_model_that_several_gpus_share_out_is_not_too_large_for_them(tmp_path):
    """Llama-3.1-70B in bf16 fills no GPU of 80 GB alone, and eight of them with room."""
    base = "models/Llama-3.1-70B-Instruct"

    def too_large(**train):
        found = on_gpus(tmp_path, base=base, kinds={"train": train})
        return [p for p in found.problems if p.startswith("training Llama") and "can be used" in p]

    assert too_large()
    assert too_large(gpus=8, accelerate="configs/accelerate/gpus.yaml")  # a whole copy on each
    assert not too_large(gpus=8, accelerate="configs/accelerate/fsdp.yaml")


def test_every_partition_and_constraint_is_asked_once():
    values = {
        "all": {"partition": "cpu"},
        "kinds": {"train": {"partition": "gpu"}, "judge": {"partition": "gpu", "constraint": "a100"}},
    }
    profile = build(Profile, values, where="test")
    needs = Needs(cores=1, gpus=0, memory_gb=1.0, minutes=10, wanted=10)
    jobs = [Job(f"{kind}-1", kind, needs) for kind in KINDS]
    assert set(probed(jobs, profile)) == {("cpu", ""), ("gpu", ""), ("gpu", "a100")}


def test_a_key_that_no_job_would_find_is_a_reason_against_it(tmp_path, monkeypatch):
    values = read_yaml(Path("configs/evaluate/judges/gpt-4.1-harmfulness.yaml"))
    judge, key = tmp_path / "judge.yaml", {"environment": {"NO_SUCH_KEY": "of the jobs' own"}}
    judge.write_text(yaml.safe_dump({**values, "endpoint": {**values["endpoint"], "key_env": "NO_SUCH_KEY"}}))
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    [problem] = estimated(tmp_path, judge=str(judge))[0].problems
    assert "NO_SUCH_KEY holds no usable key" in problem and "the shell you submit from" in problem
    assert estimated(tmp_path, judge=str(judge), profile=build(Profile, key, where="test"))[0].problems == ()
    monkeypatch.setenv("NO_SUCH_KEY", "sk-1")
    assert estimated(tmp_path, judge=str(judge))[0].problems == ()


def write_program(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


def test_python_is_started_as_the_probe_says_where_a_container_begins_in_another_folder(tmp_path, monkeypatch):
    """A node is this machine: srun only drops its own options."""
    lib = tmp_path / "code" / "scripts" / "slurm" / "lib.sh"
    lib.parent.mkdir(parents=True)
    shutil.copy("scripts/slurm/lib.sh", lib)
    monkeypatch.chdir(tmp_path)
    write_program(tmp_path / "on_path" / "srun", '#!/bin/bash\nwhile [[ $1 == -* ]]; do shift; done\nexec "$@"\n')
    monkeypatch.setenv("PATH", f"{tmp_path}/on_path:{os.environ['PATH']}")
    for place, python in (("my venv", "my venv/python"), ("on_path", "my_python")):
        program = tmp_path / place / Path(python).name
        profile = Profile(python=python, container="env -C /")
        write_program(program, "#!/nowhere/interpreter\n")  # there, and cannot be started
        assert f"cannot start {profile.program} (python" in str(probe(tmp_path, profile, Options(), []))
        write_program(program, '#!/bin/sh\necho "started $*"\n')
        assert probe(tmp_path, profile, Options(), []) is None
        words = ["bash", "-c", script(tmp_path, profile), "element.sh", "train-1"]
        environment = {**os.environ, "SLURM_ARRAY_TASK_ID": "0"}
        done = subprocess.run(words, env=environment, capture_output=True, text=True)
        assert done.stdout == f"started -m evaluate.cluster_element {tmp_path} train-1 0\n", done.stderr


def test_a_dry_run_prints_its_calls_and_then_names_every_input_that_is_not_here(tmp_path, capsys):
    """What a new user's first command says in a fresh clone."""
    profile = tmp_path / "profile.yaml"
    profile.write_text("all: {partition: gpu}\n")
    words = ["configs/experiments/vaugrante_qwen2.5.yaml", f"output={tmp_path}/run", f"bases.full={tmp_path}/full"]
    with pytest.raises(UserError, match="reasons") as told:
        main([*words, f"bases.mini={tmp_path}/mini", "--profile", str(profile), "--dry-run"])
    assert f"{tmp_path}/full is not there" in str(told.value) and f"{tmp_path}/mini is not there" in str(told.value)
    calls = [line for line in capsys.readouterr().out.splitlines() if line.startswith("sbatch --parsable")]
    assert any("--job-name=candor-vaugrante-qwen2.5-train-1" in call for call in calls) and len(calls) > 5
    assert not (tmp_path / "run").exists()
