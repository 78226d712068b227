"""From a plan to arrays: who waits for whom, at which index, and how large arrays are split. Needs no Slurm."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from candor.config import build, load
from candor.errors import UserError
from evaluate.cluster_forecast import Preemptions, play
from evaluate.cluster_jobs import make_jobs, sbatch_words
from evaluate.cluster_profile import KINDS, Options, Profile, read_profile
from evaluate.experiment_config import Experiment
from evaluate.plan import build_plan
from evaluate.stages import Stage

PLAN = build_plan(load(Experiment, Path("configs/experiments/nano.yaml")), absent_ok=True)


def jobs_of(stages=PLAN, *, done=(), queued=None, profile=None, max_array=1001):
    return make_jobs(stages, done=set(done), queued=queued or {}, profile=profile or Profile(), max_array=max_array)


def waits_enough(stages, jobs, done=(), queued=None):
    """Every stage is placed once, and Slurm starts none before all it waits for are done."""
    by_name = {job.name: job for job in jobs}
    place = {s.id: (job.name, index) for job in jobs for index, of in job.elements.items() for s in of}
    assert set(place) == {s.id for s in stages} - set(done) - set(queued or {})
    assert sum(len(of) for job in jobs for of in job.elements.values()) == len(place)

    def before(name, index):
        """Elements that are done before this one starts."""
        job = by_name[name]
        found = {(other, i) for other in job.whole for i in by_name[other].elements}
        if job.same:
            assert index in by_name[job.same].elements, f"{name}_{index} has no twin in {job.same}"
            found |= {(job.same, index)}
        return found | {earlier for one in found for earlier in before(*one)}

    for stage in stages:
        if stage.id in place:
            name, index = place[stage.id]
            for earlier in stage.after:
                if earlier in place and place[earlier] != (name, index):
                    assert place[earlier] in before(name, index), f"{stage.id} would not wait for {earlier}"
                if queued and earlier in queued:
                    assert queued[earlier] in by_name[name].queued
    names = [job.name for job in jobs]
    for job in jobs:
        assert all(names.index(other) < names.index(job.name) for other in (job.same, *job.whole) if other)


@pytest.mark.parametrize("max_array", [1001, 4, 2, 1])
def test_every_stage_waits_for_what_it_needs_however_arrays_are_split(max_array):
    jobs = jobs_of(max_array=max_array)
    waits_enough(PLAN, jobs)
    assert all(index < max_array for job in jobs for index in job.elements)


def test_stage_two_waits_for_its_own_stage_one_only():
    jobs = jobs_of()
    place = {s.id: (job, index) for job in jobs for index, of in job.elements.items() for s in of}
    first, one = place["train-mini-code-misaligned-s0"]
    second, two = place["train-mini-code-realigned-s0"]
    assert (second.same, one) == (first.name, two)
    assert second.whole == ()  # and for nothing else


def test_what_is_done_is_left_out_and_what_is_queued_is_waited_for():
    done = {s.id for s in PLAN if s.module in ("evaluate.questions", "train.data")}
    queued = {s.id: f"7_{i}" for i, s in enumerate(PLAN) if s.module == "train.sft" and "misaligned" in s.id}
    jobs = jobs_of(done=done, queued=queued)
    waits_enough(PLAN, jobs, done, queued)
    assert jobs_of(done={s.id for s in PLAN}) == []


@pytest.mark.parametrize("prepared", [False, True], ids=["all-to-do", "prepared-before"])
def test_large_inputs_are_hashed_by_a_job_that_all_others_wait_for(prepared):
    """Its time is theirs too; with nothing else to prepare it is made for them."""
    done = {s.id for s in PLAN if s.module in ("evaluate.questions", "train.data")} if prepared else set()
    jobs = make_jobs(PLAN, done=done, queued={}, profile=Profile(), max_array=1001, hash_minutes=100)
    waits_enough(PLAN, jobs, done)
    first = jobs[0]
    assert (first.kind, list(first.elements), first.elements[0] == ()) == ("prepare", [0], prepared)
    assert first.needs.minutes >= 150 and all(job.needs.minutes < 150 for job in jobs[1:])
    assert all("prepare" in job.behind for job in jobs[1:])
    assert make_jobs([], done=set(), queued={}, profile=Profile(), max_array=9, hash_minutes=100) == []


def test_one_failed_element_is_submitted_alone_with_what_waited_for_it():
    lost = "train-mini-code-realigned-s0"
    again = {lost, "sample-mini-code-realigned-s0", "judge-mini-code-realigned-s0", "tables", "report"}
    jobs = jobs_of(done={s.id for s in PLAN} - again)
    assert {s.id for job in jobs for of in job.elements.values() for s in of} == again
    assert Counter(job.kind for job in jobs) == {"train": 1, "sample": 1, "judge": 1, "report": 1}


def test_the_call_says_what_the_profile_says():
    profile = build(
        Profile,
        {
            "all": {"partition": "gpu", "account": "project", "arguments": ["--exclude=bad1"]},
            "kinds": {"train": {"gpu_type": "h100", "at_once": 3, "minutes": 100}, "report": {"partition": "cpu"}},
            "mail_user": "someone@example.org",
        },
        where="test",
    )
    stages = [replace(s, gpus=1) if s.module == "train.sft" else s for s in PLAN]
    calls = {j.name: sbatch_words(j, profile, run="x", folder="F") for j in jobs_of(stages, profile=profile)}
    train = calls["train-1"]
    assert {"--partition=gpu", "--account=project", "--gres=gpu:h100:1", "--time=150", "--exclude=bad1"} <= set(train)
    assert "--array=0-8%3" in train and "--requeue" in train and "--signal=B:USR1@300" in train
    assert "--mail-user=someone@example.org" in train
    assert "--partition=cpu" in calls["report"] and "--account=project" in calls["report"]


def test_no_job_asks_for_more_time_than_its_partition_gives():
    values = {"minutes_at_least": 90, "kinds": {"train": {"partition": "short,long"}, "sample": {"partition": "long"}}}
    profile = build(Profile, values, where="test")
    jobs = make_jobs(
        PLAN, done=set(), queued={}, profile=profile, max_array=1001, max_minutes={"short": 30, "long": 240, None: 60}
    )
    asked = {job.kind: (job.needs.minutes, job.needs.wanted) for job in jobs}
    assert asked["train"] == (30, 90) and asked["sample"] == (90, 90) and asked["judge"] == (60, 90)


def test_profiles_refuse_what_they_do_not_know(tmp_path):
    with pytest.raises(UserError, match="example"):
        read_profile("exampel")
    with pytest.raises(UserError, match="did you mean 'train'"):
        build(Profile, {"kinds": {"trian": {}}}, where="test")
    fsdp = {"accelerate": "configs/accelerate/fsdp.yaml"}
    for values, told in (
        ({"kinds": {"train": {"nodes": 2}}}, "Add accelerate"),
        ({"kinds": {"sample": {"nodes": 2}}}, "kinds.sample: nodes is 2"),
        ({"all": {"nodes": 2, **fsdp}}, "kinds.prepare: nodes is 2"),
        ({"container": "apptainer exec x.sif", "kinds": {"train": fsdp}}, "do not go together"),
    ):
        with pytest.raises(UserError, match=told):
            build(Profile, values, where="test")
    build(Profile, {"kinds": {"train": {"nodes": 2, **fsdp}}}, where="test")
    for path in Path("configs/slurm").glob("*.yaml"):
        assert all(isinstance(read_profile(str(path)).options(kind), Options) for kind in KINDS)


def stage(name, minutes, after=(), gpus=1):
    return Stage(id=name, module="m", config={}, inputs=(), outputs=(), after=after, minutes=minutes, gpus=gpus)


def test_a_forecast_by_hand():
    stages = [stage("a", 60), stage("b", 30), stage("c", 30, ("b",)), stage("d", 60, ("a", "c"), gpus=0)]
    assert [play(stages, n).hours for n in (1, 2, 8)] == [3.0, 2.0, 2.0]
    assert play(stages, 2).gpu_hours == 2.0


def test_preemptions_cost_time_and_nothing_is_left_undone():
    stages = [stage(f"s{i}", 120) for i in range(40)]
    calm = play(stages, 8)
    stormy = play(stages, 8, preempted=Preemptions(mean_minutes=60), seed=1)
    warned = play(stages, 8, preempted=Preemptions(mean_minutes=60, warned=True), seed=1)
    assert calm.preemptions == 0 and stormy.preemptions > 20
    assert calm.gpu_hours < warned.gpu_hours < stormy.gpu_hours
    assert stormy == play(stages, 8, preempted=Preemptions(mean_minutes=60), seed=1)
