"""What is said, and what is refused, before anything is submitted. Needs no Slurm."""

from dataclasses import replace
from pathlib import Path

import pytest

from candor.config import build, read_yaml
from candor.errors import UserError
from evaluate.cluster_checks import estimate, lines, refuse
from evaluate.cluster_jobs import make_jobs
from evaluate.cluster_profile import Profile
from evaluate.experiment_config import Experiment
from evaluate.plan import build_plan

VALUES = {**read_yaml(Path("configs/experiments/nano.yaml")), "controls": [], "along_training": None, "golden": None}


def estimated(tmp_path, *, profile=None, max_jobs=10_000, lost=(), **change):
    experiment = build(Experiment, {**VALUES, "output": str(tmp_path / "run"), **change}, where="test")
    profile = profile or Profile()
    stages = build_plan(experiment, absent_ok=True)
    stages = [replace(s, inputs=(*s.inputs, *lost)) if s.module == "train.sft" else s for s in stages]
    jobs = make_jobs(stages, done=set(), queued={}, profile=profile, max_array=1001)
    found = estimate(experiment, profile, stages, jobs, max_jobs=max_jobs)
    return found, "\n".join(lines(found, profile))


def test_a_study_that_can_run_is_told_in_numbers(tmp_path):
    needs = {"train": {"gpus": 1, "minutes": 60}, "sample": {"gpus": 1, "minutes": 30}}
    found, told = estimated(tmp_path, needs=needs)
    assert found.problems == ()
    assert found.gpu_hours == pytest.approx(12 * 1 + 15 * 0.5)  # 12 fine-tunings, 15 variants
    assert found.hours[1] > found.hours[4] > found.hours[16] >= 2.5  # two trainings and a sampling in a row
    assert found.dollars == 0 and "GPU-hours: 19.5" in told


def test_nodes_of_a_profile_count(tmp_path):
    profile = build(Profile, {"kinds": {"train": {"gpus": 8, "nodes": 2}}}, where="test")
    found, _ = estimated(tmp_path, profile=profile, needs={"train": {"minutes": 60}})
    assert found.gpu_hours == pytest.approx(12 * 16)


def test_what_a_judge_behind_an_endpoint_costs_is_said(tmp_path):
    found, _ = estimated(tmp_path, judge="configs/evaluate/judges/gpt-4.1-harmfulness.yaml")
    assert found.dollars is not None and found.dollars > 1


def test_reasons_against_it_are_listed_together(tmp_path):
    profile = Profile(minutes_at_least=4.0)  # and signal_seconds is 300
    found, _ = estimated(tmp_path, profile=profile, max_jobs=5, lost=[Path("models/absent")])
    told = " ".join(found.problems)
    assert "5 may be in the queue" in told and "models/absent is not there" in told and "signal_seconds" in told
    with pytest.raises(UserError, match="nothing was submitted, for"):
        refuse(found.problems)
