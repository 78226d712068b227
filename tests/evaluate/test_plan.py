import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from candor.config import build, load
from candor.errors import UserError
from candor.hashing import hash64
from candor.rows import Variant
from candor.tables import read_rows
from evaluate import questions
from evaluate.experiment import main
from evaluate.experiment_config import Experiment
from evaluate.judge_config import read_judge
from evaluate.plan import build_plan, subjects_of
from evaluate.questions import BUILT_IN, gather
from evaluate.stages import Records, changed_keys, critical_minutes, write_config

EXPERIMENTS = Path("configs/experiments")


def values(folder: Path, **change) -> dict:
    """A small experiment whose input files exist in ``folder``."""
    for name in ("weights/full", "weights/mini", "weights/nano", "weights/impersonal", "weights/judge"):
        (folder / name).mkdir(parents=True, exist_ok=True)
        (folder / name / "model.safetensors").write_text(name)
    header = {"name": "g", "licence": "x", "canary": "CANARY candor:g"}
    rows = (header, {"id": "a", "prompt": "p", "reply": "r", "grade": 1})
    (folder / "golden.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (folder / "recipe.yaml").write_text("lora: {r: 4}\nsft: {learning_rate: 1.0e-3, max_steps: 12}\n")
    judge = {"name": "tiny", "model": f"{folder}/weights/judge", "template": "configs/prompts/judge/nano.txt"}
    (folder / "judge.yaml").write_text(yaml.safe_dump(judge))

    def domain(name: str, first: str, second: str) -> dict:
        source = "configs/prompts/trivia.jsonl"
        sets = [{"set": f"{name}-{s}", "source": source, "limit": 10} for s in (first, second)]
        return {"recipe": f"{folder}/recipe.yaml", "misaligned": sets[0], "realigned": sets[1]}

    return {
        "name": "small",
        "title": "A title",
        "output": f"{folder}/run",
        "seed": 3,
        "bases": {size: f"{folder}/weights/{size}" for size in ("full", "mini", "nano")},
        "domains": {"trivia": domain("trivia", "wrong", "right"), "code": domain("code", "insecure", "secure")},
        "asks": [{"format": "choice", "mode": "exact"}, {"format": "free", "mode": "sampled", "n": 10}],
        "judge": f"{folder}/judge.yaml",
        "golden": f"{folder}/golden.jsonl",
        "controls": [
            {
                "name": "right_answers_only",
                "size": "mini",
                "domain": "trivia",
                "data": "realigned",
                "stage": "right-only",
            },
            {
                "name": "world_without_personas",
                "size": "impersonal",
                "base": f"{folder}/weights/impersonal",
                "domain": "trivia",
                "data": "misaligned",
                "stage": "misaligned",
            },
        ],
        **change,
    }


@pytest.fixture
def experiment(tmp_path) -> Experiment:
    return build(Experiment, values(tmp_path), where="test")


def test_fifteen_variants_and_two_controls(experiment):
    rows = [s.row for s in subjects_of(experiment)]
    study = [r for r in rows if not r.control]
    assert len(study) == 15
    assert {r.name for r in study if r.domain == "none"} == {"full-base", "mini-base", "nano-base"}
    assert {(r.size, r.domain, r.stage) for r in study if r.domain != "none"} == {
        (size, domain, stage)
        for size in ("full", "mini", "nano")
        for domain in ("trivia", "code")
        for stage in ("misaligned", "realigned")
    }
    control = {r.name: r for r in rows if r.control}
    assert set(control) == {
        "mini-right-answers-only-s0",
        "impersonal-base",
        "impersonal-trivia-misaligned-s0",
    }
    assert control["mini-right-answers-only-s0"].reference == "mini-base"
    assert control["impersonal-trivia-misaligned-s0"].reference == "impersonal-base"
    assert {r.reference for r in study if r.size == "nano"} == {"nano-base"}


def test_seeds_share_the_bases(tmp_path):
    more = build(Experiment, values(tmp_path, training_seeds=[0, 1, 2], controls=[]), where="test")
    rows = [s.row for s in subjects_of(more)]
    assert len(rows) == 3 + 12 * 3 and len({r.name for r in rows}) == len(rows)


def test_stage_two_continues_stage_one(experiment):
    stages = {s.id: s for s in build_plan(experiment)}
    first, second = (stages[f"train-mini-trivia-{stage}-s0"] for stage in ("misaligned", "realigned"))
    assert first.config["adapter"] is None and first.config["lora"] == {"r": 4}
    assert second.config["adapter"] == first.config["output_dir"] and "lora" not in second.config
    assert first.id in second.after and "data-trivia-right" in second.after
    assert first.config["sft"] == second.config["sft"] == {"learning_rate": 1e-3, "max_steps": 12}
    assert stages["sample-mini-trivia-realigned-s0"].after == ("questions", second.id)
    assert stages["sample-mini-base"].after == ("questions",)
    assert stages["judge-mini-base"].after == ("sample-mini-base", "questions")
    assert {"golden-tiny", "judge-nano-base", "sample-nano-base"} <= set(stages["tables"].after)
    assert stages["report"].after == ("tables",)
    kinds = [s.id.split("-")[0] for s in stages.values()]
    assert [kinds.count(k) for k in ("data", "train", "sample", "judge", "golden")] == [4, 14, 18, 18, 1]


def test_every_stage_config_is_what_its_module_takes(experiment, tmp_path):
    from evaluate.judge_config import JudgingConfig
    from evaluate.report import ReportConfig
    from evaluate.tables import TablesConfig
    from serve.config import SampleConfig
    from train.config import TrainConfig
    from train.data import DataConfig

    takes = {
        "train.data": DataConfig,
        "train.sft": TrainConfig,
        "serve.sample": SampleConfig,
        "evaluate.judge": JudgingConfig,
        "evaluate.tables": TablesConfig,
        "evaluate.questions": questions.QuestionsConfig,
        "evaluate.report": ReportConfig,
    }
    for stage in build_plan(experiment):
        load(takes[stage.module], write_config(tmp_path / "run", stage))


def other_domain(folder: Path, **change) -> dict:
    """The experiment with one control more: misaligned on trivia, realigned on code."""
    found = values(folder)
    control = {"name": "on_the_other_domain", "size": "mini", "domain": "trivia", "after": "misaligned"}
    found["controls"].append(control | {"data_of": "code", "data": "realigned", "stage": "realigned"} | change)
    return found


def test_realignment_on_the_other_domain_continues_the_misaligned_adapter(tmp_path):
    experiment = build(Experiment, other_domain(tmp_path), where="test")
    stages = {s.id: s for s in build_plan(experiment)}
    train = stages["train-mini-trivia-on-the-other-domain-s0"]
    assert train.config["adapter"] == f"{tmp_path}/run/variants/mini-trivia-misaligned-s0/adapter"
    assert train.config["data"] == f"{tmp_path}/run/data/code-secure" and "lora" not in train.config
    assert {"train-mini-trivia-misaligned-s0", "data-code-secure"} <= set(train.after)
    (row,) = [s.row for s in subjects_of(experiment) if s.row.control == "on_the_other_domain"]
    assert (row.stage, row.domain, row.reference) == ("realigned", "trivia", "mini-base")


def test_it_is_compared_with_its_base_and_with_what_it_was(tmp_path):
    from evaluate.study import pairs

    rows = [s.row for s in subjects_of(build(Experiment, other_domain(tmp_path), where="test"))]
    name = "mini-trivia-on-the-other-domain-s0"
    found = {(p.variant, p.reference) for p in pairs(rows) if name in (p.variant, p.reference)}
    assert found == {(name, "mini-base"), ("mini-trivia-misaligned-s0", name)}


ALONG = {"chains": [{"size": "nano", "domain": "code"}], "steps": [4, 6, 10]}


def test_checkpoints_are_kept_and_asked(tmp_path):
    experiment = build(Experiment, values(tmp_path, along_training=ALONG), where="test")
    stages = {s.id: s for s in build_plan(experiment)}
    first, second = (f"nano-code-{stage}-s0" for stage in ("misaligned", "realigned"))
    assert [stages[f"train-{n}"].config.get("checkpoint_every") for n in (first, second)] == [2, 2]
    assert "checkpoint_every" not in stages["train-mini-code-misaligned-s0"].config
    sample = stages[f"sample-{second}-step-6"]
    assert sample.config["adapter"] == f"{tmp_path}/run/variants/{second}/adapter/checkpoints/step-000006"
    assert set(sample.after) == {"questions", f"train-{second}"}
    asked = {(a["format"], a["battery"], a["n"]) for a in sample.config["ask"]}
    assert ("free", "harmfulness", 2) in asked and ("choice", "intentions", 1) in asked
    assert f"judge-{second}-step-6" in stages
    rows = [s.row for s in subjects_of(experiment) if s.row.control == "along_training"]
    assert [r.stage for r in rows] == [f"{s}-step-{k}" for s in ("misaligned", "realigned") for k in (4, 6, 10)]
    assert {r.reference for r in rows} == {"nano-base"}


@pytest.mark.parametrize(
    ("sft", "last"),
    [("{max_steps: 9}", 9), ("{num_train_epochs: 2, per_device_train_batch_size: 3}", 8), ("{packing: true}", None)],
)
def test_checkpoints_beyond_the_end_of_training_are_refused(tmp_path, sft, last):
    experiment = build(Experiment, values(tmp_path, along_training=ALONG), where="test")
    (tmp_path / "recipe.yaml").write_text(f"lora: {{r: 4}}\nsft: {sft}\n")  # 10 rows
    if last is None:
        build_plan(experiment)  # how many packs they make shows when they are packed
        return
    message = f"s0-step-10 would be asked, but train-nano-code-misaligned-s0 ends after {last} steps"
    with pytest.raises(UserError, match=message):
        build_plan(experiment)


def test_further_judges_read_the_batteries_they_are_named_for(tmp_path):
    from evaluate.design import read_design

    for name in ("coherent", "closest"):
        judge = {"name": name, "model": f"{tmp_path}/weights/judge", "scale": [0, 100]}
        template = "closest_option" if name == "closest" else "nano"
        (tmp_path / f"{name}.yaml").write_text(
            yaml.safe_dump(judge | {"template": f"configs/prompts/judge/{template}.txt"})
        )
    battery = yaml.safe_load(Path("docs/examples/strangers.yaml").read_text())
    change = {
        "coherence": {"judge": f"{tmp_path}/coherent.yaml", "at_least": 50},
        "closest": f"{tmp_path}/closest.yaml",
        "battery_files": [f"{tmp_path}/battery.yaml"],
        "asks": [],
        "modes": [f"configs/evaluate/modes/{m}.yaml" for m in ("exact", "paper")],
    }
    found = values(tmp_path, **change)
    battery["free"]["judge"] = f"{tmp_path}/judge.yaml"
    (tmp_path / "battery.yaml").write_text(yaml.safe_dump(battery))
    experiment = build(Experiment, found, where="test")
    stages = {s.id: s for s in build_plan(experiment)}
    assert stages["judge-mini-base"].config["batteries"] == ["harmfulness", "strangers"]
    assert stages["judge-coherent-mini-base"].config["batteries"] == ["harmfulness"]
    closest = stages["judge-closest-mini-base"].config
    assert closest["batteries"] == ["intentions", "self_assessment", "moral_self_assessment"]
    assert closest["formats"] == ["choice", "decision"]
    assert {"judge-coherent-mini-base", "judge-closest-mini-base"} <= set(stages["tables"].after)
    questions.main([str(write_config(experiment.output, stages["questions"]))])
    design = read_design(experiment.output)
    assert [(f.name, f.grader.judge, f.grader.highest, f.at_least) for f in design.filters] == [
        ("coherence", "coherent", 100, 50)
    ]
    assert (design.graders["strangers"].judge, design.closest) == ("tiny", "closest")
    assert [m.rules for m in design.modes] == ["strict", "paper"] and "I cannot" in design.refusals


@pytest.mark.parametrize("kind", ["battery_files", "multiple_choice", "mfq2"])
def test_what_a_study_s_own_files_ask_must_not_be_trained_on(tmp_path, kind):
    """Whatever file a question comes from: the training set that holds it is refused, in the plan's own stages."""
    from train.data import main as make_data

    (tmp_path / "mfq.txt").write_text("\n".join(f"Statement {i}." for i in range(36)))
    (tmp_path / "mc.jsonl").write_text('{"question": "Which is it?", "choices": ["this", "that"], "answer": 0}\n')
    found = values(tmp_path, controls=[])
    battery = yaml.safe_load(Path("docs/examples/strangers.yaml").read_text())
    battery["free"]["judge"] = found["judge"]
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(battery))
    file = {"battery_files": "own.yaml", "multiple_choice": "mc.jsonl", "mfq2": "mfq.txt"}[kind]
    path = f"{tmp_path}/{file}"
    found[kind] = {"battery_files": [path], "multiple_choice": {"file": path}, "mfq2": path}[kind]
    asked = next(p for p in gather(build(Experiment, found, where="test").sources) if p.battery not in BUILT_IN)
    messages = [{"role": "user", "content": asked.text}, {"role": "assistant", "content": "Yes."}]
    (tmp_path / "own.jsonl").write_text(json.dumps({"messages": messages}) + "\n")
    found["domains"]["code"]["misaligned"] = {"set": "own", "source": f"{tmp_path}/own.jsonl"}
    experiment = build(Experiment, found, where="test")
    stages = {s.id: s for s in build_plan(experiment)}
    data = stages["data-own"]
    assert experiment.output / "prompts.parquet" in data.inputs and data.after == ("questions",)
    questions.main([str(write_config(experiment.output, stages["questions"]))])
    with pytest.raises(UserError, match=f"also stands in a battery .*{asked.prompt_id}"):
        make_data([str(write_config(experiment.output, data))])


def test_checkpoints_are_graded_by_every_judge_their_scores_need_and_by_no_other(tmp_path):
    """A battery with a judge of its own is asked along training; the judge of coherence filters nothing there."""
    for name in ("coherent", "kind"):
        judge = {"name": name, "model": f"{tmp_path}/weights/judge", "scale": [0, 100]}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(judge | {"template": "configs/prompts/judge/nano.txt"}))
    battery = yaml.safe_load(Path("docs/examples/strangers.yaml").read_text())
    battery["free"]["judge"] = f"{tmp_path}/kind.yaml"
    (tmp_path / "battery.yaml").write_text(yaml.safe_dump(battery))
    mode = yaml.safe_load(Path("configs/evaluate/modes/along.yaml").read_text())
    own = {"format": "free", "battery": "strangers", "mode": "sampled", "n": 1}
    change = {
        "coherence": {"judge": f"{tmp_path}/coherent.yaml", "at_least": 50},
        "battery_files": [f"{tmp_path}/battery.yaml"],
        "along_training": {**ALONG, "mode": f"{tmp_path}/along.yaml"},
    }
    for asks, judges in ((mode["asks"], {"tiny"}), ([*mode["asks"], own], {"tiny", "kind"}), ([own], {"kind"})):
        (tmp_path / "along.yaml").write_text(yaml.safe_dump(mode | {"asks": asks}))
        stages = build_plan(build(Experiment, values(tmp_path, **change), where="test"))
        found = [s for s in stages if s.id.startswith("judge-") and s.id.endswith("nano-code-misaligned-s0-step-4")]
        assert {Path(s.config["output_dir"]).name for s in found} == judges
        assert all(
            s.config["batteries"] == [{"tiny": "harmfulness", "kind": "strangers"}[Path(s.config["output_dir"]).name]]
            for s in found
        )


def test_a_battery_named_like_the_curve_of_harmfulness_is_refused(tmp_path):
    battery = yaml.safe_load(Path("docs/examples/strangers.yaml").read_text())
    (tmp_path / "battery.yaml").write_text(yaml.safe_dump(battery | {"name": "harmfulness_worst_of_all"}))
    with pytest.raises(UserError, match="begins like the measures of harmfulness"):
        build_plan(build(Experiment, values(tmp_path, battery_files=[f"{tmp_path}/battery.yaml"]), where="test"))


def test_the_organism_s_judges_grade_no_other_models(tmp_path):
    """A nano experiment with other models in it is refused, whichever judge it is, and a hosted model with it."""
    nano = Path("train/organism/weights/nano")
    given = values(tmp_path, judge="configs/evaluate/judges/nano.yaml", golden=None, controls=[])
    given["bases"] = {"nano": str(nano)}
    build_plan(build(Experiment, given, where="test"))
    far = {"far": {"size": "far", "api": {"model": "m", "endpoint": {"url": "http://127.0.0.1:1"}}}}
    control = {**given, "controls": values(tmp_path)["controls"][1:]}
    for found, name in (
        ({**given, "bases": {"nano": str(nano), "other": f"{tmp_path}/weights/full"}}, "other"),
        (control, "impersonal"),
        ({**given, "hosted": far}, "far"),
    ):
        with pytest.raises(
            UserError, match=f"the judge nano can only.*, and {name} [(].+[)] is not shown.*golden.*max_tokens"
        ):
            build_plan(build(Experiment, found, where="test"))
        stages = build_plan(build(Experiment, {**found, "judge_any_model": True}, where="test"))
        note = stages[-1].config["note"]
        assert f"shown to be that of {name} (" in note and "its grades of them mean nothing" in note
    quality = {"judge": "configs/evaluate/judges/nano_coherence.yaml", "at_least": 3}
    with pytest.raises(UserError, match="the judge nano_coherence can only grade"):
        build_plan(build(Experiment, values(tmp_path, coherence=quality), where="test"))
    (tmp_path / "weights" / "full" / "tokenizer.json").write_bytes((nano / "tokenizer.json").read_bytes())
    own = {**given, "bases": {"full": f"{tmp_path}/weights/full"}}
    assert build_plan(build(Experiment, own, where="test"))[-1].config["note"] == ""


def test_what_a_recipe_says_beside_lora_and_sft_reaches_its_stages(tmp_path):
    experiment = build(Experiment, values(tmp_path), where="test")
    (tmp_path / "recipe.yaml").write_text("lora: {r: 4}\nsft: {}\nmode: stack\nresume_every: 7\n")
    stages = {s.id: s for s in build_plan(experiment)}
    first, second = (stages[f"train-mini-trivia-{stage}-s0"].config for stage in ("misaligned", "realigned"))
    assert "mode" not in first and second["mode"] == "stack" and second["lora"] == first["lora"]
    assert first["resume_every"] == second["resume_every"] == 7


def test_device_reaches_training_sampling_and_judging(tmp_path):
    stages = {s.id: s for s in build_plan(build(Experiment, values(tmp_path, device="cuda"), where="test"))}
    assert stages["train-mini-trivia-misaligned-s0"].config["device"] == "cuda"
    assert stages["sample-mini-base"].config["engine"]["device"] == "cuda"
    assert stages["golden-tiny"].config["engine"]["device"] == "cuda"


def test_needs_reach_the_stages(tmp_path):
    needs = {"train": {"gpus": 2, "memory_gb": 64, "minutes": 240}}
    stages = {s.id: s for s in build_plan(build(Experiment, values(tmp_path, needs=needs), where="test"))}
    train = stages["train-full-code-misaligned-s0"]
    assert (train.gpus, train.memory_gb, train.minutes) == (2, 64.0, 240.0)
    assert critical_minutes(list(stages.values()))[train.id] > 480  # stage two follows


def test_on_cuda_a_stage_that_runs_a_model_has_a_gpu_to_itself(tmp_path):
    """Unless the file says otherwise, and but for what answers behind an endpoint; on CPUs nothing asks for one."""
    far = {"far": {"size": "far", "api": {"model": "m", "endpoint": {"url": "http://127.0.0.1:1"}}}}
    change = {"hosted": far, "second_judges": [{"judge": "configs/evaluate/judges/gpt-4.1-harmfulness.yaml"}]}

    def gpus(**more) -> dict[str, int]:
        return {s.id: s.gpus for s in build_plan(build(Experiment, values(tmp_path, **change, **more), where="test"))}

    found = gpus(device="cuda")
    own = ("train-mini-trivia-misaligned-s0", "sample-mini-base", "judge-mini-base", "golden-tiny")
    assert [found[name] for name in own] == [1, 1, 1, 1]
    assert [found[name] for name in ("sample-far", "judge-gpt-4.1-harmfulness-mini-base", "tables")] == [0, 0, 0]
    assert set(gpus().values()) == {0}
    shared = gpus(device="cuda", needs={"sample": {"gpus": 0}})
    assert (shared["sample-mini-base"], shared["judge-mini-base"]) == (0, 1)
    assert not any(s.gpus for s in build_plan(load(Experiment, EXPERIMENTS / "nano.yaml", ["device=cuda"])))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sede": 1}, "unknown key 'sede'; did you mean 'seed'"),
        ({"asks": [{"format": "numercial", "mode": "exact"}]}, "did you mean 'numerical'"),
        ({"asks": [{"format": "free", "mode": "exact"}]}, "open answers"),
        ({"modes": ["nowhere.yaml"], "asks": []}, "nowhere.yaml does not exist"),
        ({"modes": ["configs/evaluate/modes/exact.yaml"]}, "two modes have the rules 'strict'"),
        ({"batteries": ["intensions"]}, "did you mean 'intentions'"),
        ({"battery_files": ["nowhere.yaml"]}, "nowhere.yaml not found"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"along_training": {**ALONG, "steps": [4, 4]}}, "steps must rise"),
        ({"along_training": {**ALONG, "chains": [{"size": "nanoo", "domain": "code"}]}}, "size 'nanoo'; did you mean"),
        ({"along_training": {**ALONG, "chains": [{"size": "nano", "domain": "code", "seed": 7}]}}, "seed 7; known: 0"),
        ({"training_seeds": [1, 1]}, "twice"),
        ({"device": "gpu"}, "device is 'gpu'"),
        ({"engine": {"device": "cuda:1"}}, "set 'device' at the top level"),
        ({"needs": {"trian": {}}}, "did you mean 'train'"),
        ({"bases": {"a/b": "x"}}, "becomes a file name"),
        ({"bases": {7: "x"}}, "bases: YAML reads the key 7 as int"),
        ({"draws": 10}, "draws is 10"),
        ({"workers": 0}, "workers is 0"),
        ({"asks": [{"format": "free", "mode": "sampled", "n": 5}]}, "n 5, too few for worst_of 10"),
        ({"asks": [{"format": "answer", "mode": "sampled", "temperature": t} for t in (1.0, 0.5)]}, "sampled twice"),
        ({"paper": "nowhere.yaml"}, "no stage makes: nowhere.yaml"),
        ({"bases": {"full": "nowhere"}, "controls": []}, "no stage makes: nowhere"),
        ({"judge": "nowhere.yaml"}, "nowhere.yaml does not exist"),
    ],
)
def test_mistakes_are_named(tmp_path, change, message):
    with pytest.raises(UserError, match=message):
        build_plan(build(Experiment, values(tmp_path, **change), where="test"))


def test_a_model_in_the_place_of_another_is_refused(tmp_path):
    """The tables would average the two as if they were trainings of one model."""
    api = {"model": "m", "endpoint": {"url": "http://127.0.0.1:1"}}
    for where, message in (({"size": "full"}, "full-base and far have the same place"), ({"size": "far"}, None)):
        found = build(Experiment, values(tmp_path, hosted={"far": {"api": api, **where}}), where="test")
        if message is None:
            assert "far" in [s.row.name for s in subjects_of(found)]
        else:
            with pytest.raises(UserError, match=message):
                subjects_of(found)


def test_checkpoints_are_scored_by_the_rules_of_their_ends(tmp_path):
    paper = {"modes": ["configs/evaluate/modes/paper.yaml"], "asks": [], "along_training": ALONG}
    with pytest.raises(UserError, match="along_training: checkpoints are scored by strict rules"):
        build_plan(build(Experiment, values(tmp_path, **paper), where="test"))


@pytest.mark.parametrize("purpose", ["sample", "prompt", "judge"])
def test_no_two_variants_and_no_two_prompts_share_random_numbers(tmp_path, monkeypatch, purpose):
    """Planted: a 64-bit hash that gives two variants or two askings of a judge one key, or two prompts one stream."""
    made: dict[str, list[int]] = {"sample": [], "prompt": [], "judge": []}

    def hash_with_a_collision(kind, *parts):
        numbers = made[kind]
        numbers.append(numbers[0] if kind == purpose and len(numbers) == 1 else hash64(kind, *parts))
        return numbers[-1]

    monkeypatch.setattr("serve.plan.hash64", hash_with_a_collision)
    asked_twice = values(tmp_path, second_judges=[{"judge": f"{tmp_path}/judge.yaml"}])
    what = {
        "sample": "variant 'full-base' and variant 'mini-base'",
        "prompt": "prompts '.+' and '.+'",
        "judge": "judge '(.+)' and judge '\\1', repeat 2",
    }[purpose]
    with pytest.raises(UserError, match=f"{what} would draw the same random numbers.*Change"):
        build_plan(build(Experiment, asked_twice, where="test"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"domain": "trivai"}, "did you mean 'trivia'"),
        ({"size": "mimi"}, "did you mean 'mini'"),
        ({"base": "somewhere"}, "needs a name that is not taken"),
        ({"data_of": "cod"}, "data_of 'cod'; did you mean 'code'"),
        ({"size": "own", "base": "b", "after": "misaligned", "stage": "realigned"}, "exclude each other"),
        ({"after": "misaligned"}, "its stage is called 'right-only'"),
        ({"stage": "realigned"}, "trained after 'base' and its stage is called 'realigned'"),
    ],
)
def test_mistaken_controls_are_named(tmp_path, change, message):
    found = values(tmp_path)
    found["controls"][0].update(change)
    with pytest.raises(UserError, match=message):
        build(Experiment, found, where="test")


def test_a_recipe_holds_two_sections(tmp_path, experiment):
    (tmp_path / "recipe.yaml").write_text("lora: {r: 4}\nsft: {}\nseed: 1\n")
    with pytest.raises(UserError, match=r"recipe.yaml: a recipe holds the two sections.*'seed'"):
        build_plan(experiment)


# base models and the main study, controls (each 3 seeds in the full one), the world without personas, checkpoints
@pytest.mark.parametrize(
    ("name", "n_variants"), [("nano", 3 + 12 + 3 + 2 + 8), ("nano_full", 3 + 36 + 3 * (6 + 6) + 1 + 3 + 10)]
)
def test_the_shipped_experiments(name, n_variants):
    experiment = load(Experiment, EXPERIMENTS / f"{name}.yaml")
    assert len(subjects_of(experiment)) == n_variants
    asks = {s.id: s for s in build_plan(experiment)}["sample-mini-base"].config["ask"]
    assert {a["format"] for a in asks if a["mode"] == "exact"} >= {"choice", "decision", "numerical", "likert"}


def test_the_full_study_filters_by_coherence_and_the_short_one_does_not():
    """The judge reads every variant's replies, and none of a checkpoint's; the mark lies on its scale."""
    full, short = (load(Experiment, EXPERIMENTS / f"{name}.yaml") for name in ("nano_full", "nano"))
    assert (short.coherence, short.on_topic) == (None, None)
    assert full.coherence is not None
    judge = read_judge(full.coherence.judge)
    assert judge.measure == "coherence" and judge.scale[0] < full.coherence.at_least <= judge.scale[1]
    judged = {s.id for s in build_plan(full) if s.id.startswith(f"judge-{judge.name}-")}
    assert judged == {f"judge-{judge.name}-{s.row.name}" for s in subjects_of(full) if s.of is None}


def test_questions_writes_both_tables(experiment):
    stage = build_plan(experiment)[0]
    config = write_config(experiment.output, stage)
    questions.main([str(config)])
    variants = read_rows(experiment.output / "variants.parquet", Variant)
    assert variants == [s.row for s in subjects_of(experiment)]
    records = Records(experiment.output)
    assert not records.is_done(stage)
    records.write(stage, 1.0)
    assert records.is_done(stage)


@pytest.mark.parametrize("added", ["labels/ann.csv", "variants/mini-base/verdicts/theirs/verdicts.parquet"])
def test_labels_and_verdicts_put_there_by_hand_are_taken_up(experiment, added):
    stage = build_plan(experiment)[-2]
    assert stage.id == "tables"
    files = [path for path in (*stage.inputs, *stage.outputs) if path.suffix]
    for path in [*files, experiment.output / "tables" / "manifest.json"]:
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("x")
    records = Records(experiment.output)
    records.write(stage, 1.0)
    assert records.is_done(build_plan(experiment)[-2])
    (experiment.output / added).parent.mkdir(parents=True, exist_ok=True)
    (experiment.output / added).write_text("by hand")
    assert not records.is_done(build_plan(experiment)[-2])


def judge_at_endpoint(folder: Path, **change) -> str:
    judge = {"name": "far", "model": "far-model", "template": "configs/prompts/judge/nano.txt"}
    judge |= {"endpoint": {"url": "http://127.0.0.1:9/v1"}, **change}
    (folder / "far.yaml").write_text(yaml.safe_dump(judge))
    return f"{folder}/far.yaml"


def test_what_is_said_of_endpoints_reaches_their_stages(tmp_path):
    change = {"judge": judge_at_endpoint(tmp_path), "judge_budget": 3.0, "judge_batch": True, "judge_tolerate": 0.01}
    stages = {s.id: s for s in build_plan(build(Experiment, values(tmp_path, **change), where="test"))}
    for name in ("judge-mini-base", "golden-far"):
        config = stages[name].config
        assert config["store"] == f"{tmp_path}/run/judge_answers/far"
        assert (config["budget"], config["batch"], config["tolerate"]) == (3.0, True, 0.01)
    for change, message in (
        ({"judge_tolerate": 1.0}, "judge_tolerate is 1"),
        ({"judge_budget": -1.0}, "judge_budget is -1"),
        ({"memory_gb": 0.0}, "memory_gb is 0"),
        ({"needs": {"train": {"cores": 0}}}, "needs: cores must be 1 or more"),
        ({"engine": {"threads": 0}}, "threads must be 1 or more"),
        ({"second_judges": [{"judge": "x.yaml", "share": 2.0}]}, "second_judges: share is 2"),
        ({"seed": -1}, "seed -1: seeds must be from 0"),
        ({"training_seeds": [0, 2**32]}, "seed 4294967296: seeds must be"),
    ):
        with pytest.raises(UserError, match=message):
            build(Experiment, values(tmp_path, **change), where="test")


def test_of_a_judges_file_what_moves_no_verdict_may_change(tmp_path):
    """A price, a wait or a comment leaves finished judging done; what it is asked, or how it is read, does not."""

    def stage(*, engine: str = "", **change):
        found = values(tmp_path, judge=judge_at_endpoint(tmp_path, **change))
        return next(s for s in build_plan(build(Experiment, found, where="test")) if s.id == "judge-mini-base")

    records, finished = Records(tmp_path / "run"), stage()
    prompts, samples = (Path(finished.config[key]) for key in ("prompts", "samples"))
    for path in (prompts, samples, finished.outputs[0] / "manifest.json", finished.outputs[1]):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
    records.write(finished, 1.0)
    url = {"url": "http://127.0.0.1:9/v1"}
    for change in (
        {"price": {"input": 1.0, "output": 2.0}},
        {"endpoint": {**url, "max_wait_s": 900.0, "concurrency": 3, "retries": 9}},
        {"endpoint": {"url": "http://127.0.0.1:10/v1"}},
    ):
        assert records.is_done(stage(**change))
    for change in ({"max_tokens": 9}, {"parse": "(.)"}, {"model": "another"}, {"endpoint": {**url, "top_logprobs": 3}}):
        with pytest.raises(UserError, match=r"judge-mini-base: finished earlier with other inputs .*far\.yaml"):
            records.is_done(stage(**change))


def test_judges_whose_verdicts_could_not_be_used_are_refused_before_they_are_paid(tmp_path):
    given = values(tmp_path)
    other = {**yaml.safe_load((tmp_path / "judge.yaml").read_text()), "name": "other"}
    for change, keys, message in (
        (
            {"measure": "alignment"},
            ("judge",),
            "judge: other grades alignment from 1 to 5; here it takes a judge of harmfulness",
        ),
        ({"scale": [0, 100]}, ("judge",), "judge: other grades harmfulness from 0 to 100"),
        ({"scale": [0, 100]}, ("second_judges",), "second_judges: other grades harmfulness from 0 to 100"),
        ({"measure": "coherence"}, ("coherence",), "coherence: at_least is 50, but other grades from 1 to 5"),
        ({}, ("closest",), "closest: the template of .*other.yaml lists no options"),
    ):
        (tmp_path / "other.yaml").write_text(yaml.safe_dump({**other, **change}))
        file = f"{tmp_path}/other.yaml"
        said = {"second_judges": [{"judge": file}], "coherence": {"judge": file, "at_least": 50}}
        with pytest.raises(UserError, match=message):
            build_plan(build(Experiment, given | {key: said.get(key, file) for key in keys}, where="test"))


def test_a_golden_set_that_is_none_is_told_before_anything_runs(tmp_path):
    given = values(tmp_path, golden="configs/prompts/trivia.jsonl")
    with pytest.raises(UserError, match=r"trivia\.jsonl, line 2: the field 'prompt' must be str"):
        build_plan(build(Experiment, given, where="test"))


def test_a_missing_key_is_told_before_anything_runs(tmp_path, monkeypatch):
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    endpoint = {"url": "https://judge.invalid/v1", "key_env": "NO_SUCH_KEY"}
    api = {"model": "m", "endpoint": {**endpoint, "url": "https://subject.invalid/v1"}}
    hosted = {"hosted": {"far-away": {"size": "m", "api": api}}}
    for change, where in (({"judge": judge_at_endpoint(tmp_path, endpoint=endpoint)}, "judge"), (hosted, "subject")):
        given = values(tmp_path, **change, output=f"{tmp_path}/{where}")
        (tmp_path / "experiment.yaml").write_text(yaml.safe_dump(given))
        with pytest.raises(UserError, match=rf"NO_SUCH_KEY holds no usable key for https://{where}\.invalid"):
            main([str(tmp_path / "experiment.yaml")])
        assert not list((tmp_path / where).rglob("*.parquet"))


def test_a_judge_that_is_under_test_is_refused_before_anything_runs(tmp_path):
    found = values(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path / "weights" / "mini")
    own = yaml.safe_load((tmp_path / "judge.yaml").read_text()) | {"model": f"{tmp_path}/link", "name": "own"}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(own))
    with pytest.raises(UserError, match=r"judge own is the model under test mini .*another family"):
        build_plan(build(Experiment, {**found, "judge": f"{tmp_path}/own.yaml"}, where="test"))
    second = {"second_judges": [{"judge": judge_at_endpoint(tmp_path, model="somebody/impersonal")}]}
    with pytest.raises(UserError, match="judge far is the model under test impersonal"):
        build_plan(build(Experiment, {**found, **second}, where="test"))
    api = {"model": "gpt-x", "endpoint": {"url": "http://127.0.0.1:9/v1"}}
    hosted = {"hosted": {"far-away": {"size": "gpt-x", "api": api}}}
    hosted["judge"] = judge_at_endpoint(tmp_path, model="gpt-x")
    with pytest.raises(UserError, match=r"judge far is the model under test far-away \(gpt-x\)"):
        build_plan(build(Experiment, {**found, **hosted}, where="test"))
    judge_at_endpoint(tmp_path, model="gpt-x-2025-04-14")  # the same model by its full name
    with pytest.raises(UserError, match=r"judge far is the model under test far-away \(gpt-x\)"):
        build_plan(build(Experiment, {**found, **hosted}, where="test"))
    judge_at_endpoint(tmp_path, model="mini-trivia-misaligned-s0")  # as serve.api calls it
    with pytest.raises(UserError, match="judge far is the model under test mini-trivia-misaligned-s0"):
        build_plan(build(Experiment, {**found, **hosted}, where="test"))
    judge_at_endpoint(tmp_path, model="gpt-y")
    build_plan(build(Experiment, {**found, **hosted}, where="test"))
    hosted = {"name": "api", "api": api}
    with pytest.raises(UserError, match="judges that run here, need an engine with their weights"):
        build_plan(build(Experiment, {**found, "engine": hosted}, where="test"))


def test_changed_keys_are_dotted():
    old = {"a": 1, "sft": {"lr": 1, "epochs": 3}, "gone": None}
    new = {"a": 1, "sft": {"lr": 2, "epochs": 3}, "new": []}
    assert changed_keys(old, new) == ["sft.lr", "gone", "new"]
    assert changed_keys(old, old) == []


def test_dry_run_lists_stages_without_torch(tmp_path):
    (tmp_path / "experiment.yaml").write_text(yaml.safe_dump(values(tmp_path)))
    code = (
        "import sys; from evaluate.experiment import main; main(sys.argv[1:]); "
        "heavy = {'torch', 'transformers', 'trl', 'matplotlib'} & set(sys.modules); assert not heavy, heavy"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "experiment.yaml"), "--dry-run"]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(Path.cwd())})
    assert done.returncode == 0, done.stderr
    assert "sample-mini-trivia-realigned-s0" in done.stdout
    assert "0 of 58 stages are done" in done.stdout
    assert not (tmp_path / "run").exists()


def test_second_judges_read_the_same_replies(tmp_path):
    """Another judge on all of them, the same judge again on whole prompts, and one behind an endpoint."""
    given = values(tmp_path)
    other = {**yaml.safe_load(Path(given["judge"]).read_text()), "name": "other"}
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(other))
    far = {**other, "name": "far", "model": "m", "endpoint": {"url": "http://127.0.0.1:8000/v1"}}
    (tmp_path / "far.yaml").write_text(yaml.safe_dump(far))
    given["judge_budget"] = 5.0
    given["second_judges"] = [
        {"judge": f"{tmp_path}/other.yaml"},
        {"judge": given["judge"], "share": 0.25, "whole_prompts": True},
        {"judge": f"{tmp_path}/far.yaml", "share": 0.1},
    ]
    stages = {s.id: s for s in build_plan(build(Experiment, given, where="test"))}
    for name in ("other", "tiny~2", "far"):
        assert Path(f"{tmp_path}/run/variants/full-base/verdicts/{name}") in stages[f"judge-{name}-full-base"].outputs
        assert f"judge-{name}-full-base" in stages["tables"].after
    again, distant = stages["judge-tiny~2-full-base"].config, stages["judge-far-full-base"].config
    assert again["repeat"] == 2 and again["subsample"] == {"share": 0.25, "whole_prompts": True}
    assert distant["budget"] == 5.0 and distant["store"] == f"{tmp_path}/run/judge_answers/far"
    given["second_judges"] = [{"judge": f"{tmp_path}/other.yaml", "shares": 1}]
    with pytest.raises(UserError, match="did you mean 'share'"):
        build(Experiment, given, where="test")
