"""Preflight: the shipped study fits the shipped node and is refused, with reasons, where it cannot run."""

import dataclasses
import json
import random
import shutil
import string
from pathlib import Path

import pytest
import yaml

from candor.config import build, load, read_yaml
from candor.errors import UserError
from candor.hashing import sha256_json
from candor.rows import Distribution, Sample
from candor.tables import write_rows
from evaluate.experiment import main as run
from evaluate.experiment_config import KINDS, Experiment
from evaluate.hardware import FOLDER, Hardware, here
from evaluate.plan import subjects_of
from evaluate.preflight import examine, main
from evaluate.preflight_findings import lines
from serve.config import Ask, EngineConfig
from serve.footprint import Asked, host_bytes, stored_bytes
from train.config import TrainConfig
from train.data import DataSet
from train.footprint import shape_of

STUDY = Path("configs/experiments/vaugrante_qwen2.5.yaml")
TINY = "train/organism/weights/nano"


def profile(name: str) -> Hardware:
    return load(Hardware, FOLDER / f"{name}.yaml")


def study(folder: Path, **change) -> Experiment:
    """The nano organism as a study of one domain, on a GPU as far as the file goes."""
    source = "configs/prompts/trivia.jsonl"
    values = {
        "name": "small",
        "title": "A title",
        "output": str(folder / "run"),
        "seed": 0,
        "bases": {"nano": TINY},
        "domains": {
            "trivia": {
                "recipe": "configs/train/nano_trivia.yaml",
                "misaligned": {"set": "trivia-wrong", "source": source},
                "realigned": {"set": "trivia-right", "source": source},
            }
        },
        "asks": [{"format": "answer", "mode": "exact"}],
        "judge": "configs/evaluate/judges/nano.yaml",
        "judge_any_model": True,  # large ones too are put in the place of the organism
        "device": "cuda",
        "needs": {kind: {"gpus": 1, "memory_gb": 4} for kind in ("train", "sample", "judge")},
    }
    return build(Experiment, {**values, **change}, where="test")


def test_a_model_that_cannot_be_scored_exactly_is_refused_before_it_is_trained(tmp_path):
    """As Phi-3 and Gemma: the tokenizer has no bytes for every token. Sampled answers need none."""
    base = shutil.copytree(TINY, tmp_path / "other")
    decoder = {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]}
    for name, change in (("config.json", {"model_type": "phi3"}), ("tokenizer.json", {"decoder": decoder})):
        (base / name).write_text(json.dumps(json.loads((base / name).read_text()) | change))
    (told,) = examine(study(tmp_path, bases={"nano": str(base)}), profile("h100x8")).problems
    assert "other: exact answer distributions need a byte-level tokenizer" in told and "mode: sampled" in told
    asks = [{"format": "answer", "mode": "sampled", "n": 2}]
    assert examine(study(tmp_path, bases={"nano": str(base)}, asks=asks), profile("h100x8")).problems == []


@pytest.fixture(scope="module")
def on_eight():
    return examine(load(Experiment, STUDY), profile("h100x8"))


def test_the_study_fits_eight_gpus_of_80_gb(on_eight):
    assert on_eight.problems == []
    rows = [s.row for s in subjects_of(on_eight.experiment) if not s.row.control]
    assert len(rows) == 3 + 12 * 3  # 15 variants a seed; the three bases are shared by the seeds
    assert {s.row.name for s in subjects_of(on_eight.experiment) if s.data} == {
        stage.removeprefix("train-") for stage in on_eight.hours if stage.startswith("train-")
    }
    steps = {(t.base, t.domain): (t.load.steps, t.bits) for t in on_eight.trainings}
    assert steps == {
        (f"Qwen2.5-{size}-Instruct", domain): (n, "4" if size == "32B" else "16")
        for size in ("32B", "7B", "1.5B")
        for domain, n in (("trivia", 201), ("code", 18_000))
    }
    told = "\n".join(lines(on_eight))
    for piece in ("32,763,876,352", "268,435,456", "18,000", "GPU-hours", "disk: ", "it fits"):
        assert piece in told


def test_what_is_not_here_is_listed_with_the_command_that_fetches_it(on_eight):
    fetch = "\n".join(on_eight.to_fetch)
    if not Path("models/Qwen2.5-32B-Instruct").exists():
        assert "hf download Qwen/Qwen2.5-32B-Instruct --local-dir models/Qwen2.5-32B-Instruct" in fetch
    if not Path("data/insecure").exists():
        assert "python -m train.download insecure" in fetch


def test_the_study_is_refused_on_one_gpu_of_24_gb_with_reasons():
    found = examine(load(Experiment, STUDY), profile("rtx4090x1"))
    reasons = "\n".join(found.problems)
    assert "training Qwen2.5-32B-Instruct in 4 bits on trivia needs" in reasons
    assert "sampling Qwen2.5-32B-Instruct needs" in reasons and "22.1 GiB of the 24.0 GiB of one GPU" in reasons
    assert "Remedy: a GPU with more memory, or a smaller model" in reasons
    assert "training Qwen2.5-7B" not in reasons and "sampling Qwen2.5-1.5B" not in reasons
    assert "it does not fit" in "\n".join(lines(found))


def test_four_bits_are_the_remedy_where_they_are_one():
    values = read_yaml(STUDY)
    values |= {"by_size": {}, "bases": {"mini": "models/Qwen2.5-7B-Instruct"}, "controls": []}
    sixteen = dataclasses.replace(profile("rtx4090x1"), gpu_memory_gib=16.0)
    found = examine(build(Experiment, values, where="test"), sixteen)
    assert any("training Qwen2.5-7B" in p and "Remedy: by_size: {mini: {quantize: nf4}}" in p for p in found.problems)
    smaller = examine(build(Experiment, {**values, "by_size": {"mini": {"quantize": "nf4"}}}, where="test"), sixteen)
    assert not any("training Qwen2.5-7B" in p for p in smaller.problems)
    assert found.trainings[0].gib > 2 * smaller.trainings[0].gib


def test_a_seventy_billion_model_is_refused_on_one_80_gb_gpu(tmp_path):
    found = examine(study(tmp_path, bases={"full": "models/Llama-3.1-70B-Instruct"}), profile("h100x8"))
    assert any(p.startswith("training Llama-3.1-70B-Instruct on") for p in found.problems)


@pytest.mark.parametrize(
    ("change", "machine", "reason"),
    [
        pytest.param(
            {"needs": {"train": {"gpus": 0}}}, "h100x8", "is 0: up to 96 stages would share the first", id="shared-gpu"
        ),
        pytest.param(
            {"needs": {"train": {"gpus": 2}}}, "h100x8", "trains in one process", id="two-gpus-for-one-process"
        ),
        pytest.param(
            {"needs": {"sample": {"gpus": 9}}}, "h100x8", "needs.sample.gpus is 9; 8 x H100", id="too-many-gpus"
        ),
        pytest.param(
            {"engine": {"name": "vllm", "dtype": "bfloat16", "vllm": {"tensor_parallel": 2}}},
            "h100x8",
            "engine.vllm.tensor_parallel is 2, but needs.sample.gpus is 1. Remedy: set it to 2",
            id="fewer-gpus-than-share-a-model",
        ),
        pytest.param({"disk": 1e-6}, "h100x8", "GB of disk are needed", id="no-disk"),
        pytest.param({"gpu": 0.5}, "h100x8", "training nano on trivia needs", id="tiny-gpu"),
        pytest.param({"gpus": 0}, "h100x8", "has no GPU that torch can use", id="no-gpu"),
    ],
)
def test_every_reason_is_told(tmp_path, change, machine, reason):
    hardware = profile(machine)
    for key, name in (("disk", "disk_gb"), ("gpu", "gpu_memory_gib"), ("gpus", "gpus")):
        if key in change:
            hardware = dataclasses.replace(hardware, **{name: change.pop(key)})
    if hardware.gpu_memory_gib == 0.5:
        hardware = dataclasses.replace(hardware, gpu_memory_gib=0.05)
    found = examine(study(tmp_path, **change), hardware)
    assert any(reason in p for p in found.problems), found.problems


def test_a_model_that_several_gpus_share_is_divided_between_them(tmp_path):
    def found(shared: int):
        vllm = {"tensor_parallel": shared, "context": 4096}
        needs = {kind: {"gpus": shared if kind != "train" else 1, "memory_gb": 400} for kind in KINDS}
        engine = {"name": "vllm", "dtype": "bfloat16", "vllm": vllm}
        bases = {"full": "models/Llama-3.1-70B-Instruct"}
        return examine(study(tmp_path, bases=bases, engine=engine, needs=needs), profile("h100x8"))

    alone, shared = found(1), found(4)
    assert any(p.startswith("sampling Llama-3.1-70B-Instruct needs") and "tensor_parallel" in p for p in alone.problems)
    assert not any("sampling" in p or "tensor_parallel" in p for p in shared.problems), shared.problems
    before, after = (next(s for s in f.servings if s.name.startswith("Llama")).parts for f in (alone, shared))
    assert 4 * after["weights"] == pytest.approx(before["weights"]) and after["logits"] == before["logits"]


def test_the_host_bears_the_copy_that_variants_are_held_against():
    shape = shape_of(Path("models/Qwen2.5-7B-Instruct"), None)
    copy, half, head = 4 * shape.parameters, 2 * shape.parameters, 2 * shape.head  # float32, bf16, a wider head
    on_gpu, on_cpu = (EngineConfig(device=device, dtype="bfloat16") for device in ("cuda", "cpu"))
    assert host_bytes(shape, on_gpu, attested=True) == copy
    assert host_bytes(shape, on_gpu, attested=False) == half + head
    assert host_bytes(shape, on_cpu, attested=True) == half + head + copy
    assert host_bytes(shape, EngineConfig(), attested=True) == 2 * copy


def test_the_disk_holds_every_kept_adapter_and_every_answer(tmp_path):
    plain = examine(study(tmp_path), profile("h100x1"))
    kept = examine(study(tmp_path, by_size={"nano": {"checkpoint_every": 2}}), profile("h100x1"))
    trained = plain.trainings[0]
    per_stage = 4 * trained.shape.adapter * -(-trained.load.steps // 2)
    assert kept.disk_gb - plain.disk_gb == pytest.approx(2 * per_stage / 1e9)
    more = study(tmp_path, asks=[{"format": "free", "mode": "sampled", "n": 100, "max_tokens": 100}])
    assert examine(more, profile("h100x1")).disk_gb - plain.disk_gb > 3 * 2 * 320 * 100 * 400 / 1e9


def test_answers_on_disk_are_bounded(tmp_path):
    """Texts that do not compress, ids and numbers, as the tables hold them."""
    letters, draw, n = string.ascii_letters, random.Random(0), 40

    def sha(*key: int) -> str:
        return sha256_json(key)

    texts = ["".join(draw.choices(letters, k=450)) for _ in range(n * 10)]  # 100 tokens of 4.5 bytes
    rows = [
        Sample(sha(i, k), f"p/{i}", sha(i), "v", "w", k, 0, 1.0, texts[10 * i + k], 100, "stop", -draw.random())
        for i in range(n)
        for k in range(10)
    ]
    write_rows(tmp_path / "samples.parquet", Sample, rows)
    ask = Ask(format="free", mode="sampled", n=10, max_tokens=100)
    stated = stored_bytes(ask, Asked(n, 50.0))
    assert 0.5 * stated < 2 * (tmp_path / "samples.parquet").stat().st_size < stated
    labels = tuple(map(str, range(101)))
    exact = [
        Distribution(f"p/{i}", sha(i), "v", "w", labels, tuple(draw.random() for _ in labels), 0.1 * draw.random(), 0.0)
        for i in range(n)
    ]
    write_rows(tmp_path / "exact.parquet", Distribution, exact)
    stated = stored_bytes(Ask(format="numerical", mode="exact"), Asked(n, 50.0, 101.0))
    assert 0.5 * stated < 2 * (tmp_path / "exact.parquet").stat().st_size < stated


def test_it_reads_the_data_that_are_here_and_finds_a_bad_row(tmp_path):
    bad = tmp_path / "mine.jsonl"
    bad.write_text('{"messages": []}\n')
    domains = {
        "mine": {
            "recipe": "configs/train/nano_trivia.yaml",
            "misaligned": {"set": "mine", "source": str(bad)},
            "realigned": {"set": "trivia-right", "source": "configs/prompts/trivia.jsonl"},
        }
    }
    with pytest.raises(UserError, match=r"mine\.jsonl, line 1: the conversation is empty"):
        examine(study(tmp_path, domains=domains), profile("h100x1"))
    domains["mine"]["misaligned"]["source"] = "data/nowhere/x.jsonl"
    with pytest.raises(UserError, match="is not there, and its size is not known"):
        examine(study(tmp_path, domains=domains), profile("h100x1"))


def test_a_misspelt_key_of_a_recipe_is_found(tmp_path):
    recipe = yaml.safe_load(Path("configs/train/nano_trivia.yaml").read_text())
    recipe["sft"]["learning_rat"] = 1
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    values = study(tmp_path)
    domain = values.domains["trivia"]
    domains = {
        "trivia": {
            "recipe": str(tmp_path / "recipe.yaml"),
            "misaligned": {"set": "trivia-wrong", "source": str(domain.misaligned.source)},
            "realigned": {"set": "trivia-right", "source": str(domain.realigned.source)},
        }
    }
    with pytest.raises(UserError, match="did you mean 'learning_rate'"):
        examine(study(tmp_path, domains=domains), profile("h100x1"))


def test_a_cpu_study_is_held_against_the_host_s_memory(tmp_path):
    found = examine(study(tmp_path, device="cpu", needs={}), here(tmp_path))
    assert found.problems == []
    assert any("not estimated" in line for line in lines(found))
    large = study(tmp_path, device="cpu", needs={}, bases={"full": "models/Llama-3.1-70B-Instruct"})
    assert any("of the memory can be used" in p for p in examine(large, here(tmp_path)).problems)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"by_size": {"nan": {"quantize": "nf4"}}}, "did you mean 'nano'"),
        ({"by_size": {"nano": {"quantise": "nf4"}}}, "did you mean 'quantize'"),
        ({"by_size": {"nano": {"sft": 8}}}, r"by_size\.nano\.sft must be a section"),
    ],
)
def test_mistakes_in_by_size_are_named(tmp_path, change, message):
    with pytest.raises(UserError, match=message):
        study(tmp_path, **change)


def test_by_size_reaches_the_stages(tmp_path):
    from evaluate.plan import build_plan

    stages = {s.id: s for s in build_plan(study(tmp_path, by_size={"nano": {"quantize": "nf4"}}))}
    assert stages["train-nano-trivia-misaligned-s0"].config["quantize"] == "nf4"
    assert stages["train-nano-trivia-realigned-s0"].config["quantize"] == "nf4"


def test_by_size_changes_single_keys_of_both_sections(tmp_path):
    from evaluate.plan import build_plan

    own = {"sft": {"learning_rate": "1e-6", "per_device_train_batch_size": 1}, "lora": {"r": 2}}
    plain, changed = (
        {s.id: s.config for s in build_plan(study(tmp_path, bases={"nano": TINY, "mini": TINY}, by_size=by_size))}
        for by_size in ({}, {"nano": own})
    )
    for stage in ("misaligned", "realigned"):
        before, after = (found[f"train-nano-trivia-{stage}-s0"] for found in (plain, changed))
        assert after["sft"] == {**before["sft"], **own["sft"]} != before["sft"]
        assert changed[f"train-mini-trivia-{stage}-s0"] == plain[f"train-mini-trivia-{stage}-s0"]
        assert build(TrainConfig, after, where="test").sft["learning_rate"] == 1e-6
    first = plain["train-nano-trivia-misaligned-s0"]["lora"]
    assert changed["train-nano-trivia-misaligned-s0"]["lora"] == {**first, "r": 2}


def test_small_models_may_share_a_gpu(tmp_path):
    """As many at once as have room; nothing said means one GPU for each."""
    assert examine(study(tmp_path, needs={kind: {"memory_gb": 4} for kind in KINDS}), profile("h100x8")).problems == []
    shared = {kind: {"gpus": 0, "memory_gb": 4} for kind in KINDS}
    assert examine(study(tmp_path, needs=shared, workers=4), profile("rtx4090x1")).problems == []
    told = examine(study(tmp_path, needs=shared, workers=64), profile("rtx4090x1")).problems
    assert len(told) == 3 and all("64 stages would share" in problem for problem in told)


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda p: p.stem)
def test_shipped_profiles_are_whole(path):
    hardware = load(Hardware, path)
    assert hardware.gpus >= 1 and hardware.flops and hardware.bandwidth


def test_a_judge_s_hours_follow_its_template_and_what_the_modes_draw(tmp_path):
    """Judging hours rise with the template, the share that is judged and the draws, wherever those are said."""
    text = Path("configs/prompts/judge/nano.txt").read_text()
    judge = yaml.safe_load(Path("configs/evaluate/judges/nano.yaml").read_text())

    def hours(stage: str = "judge-nano-base", rubric: str = "", **change) -> float | None:
        (tmp_path / "t.txt").write_text(text + rubric)
        (tmp_path / "j.yaml").write_text(yaml.safe_dump(judge | {"template": f"{tmp_path}/t.txt"}))
        found = examine(study(tmp_path, judge=f"{tmp_path}/j.yaml", **change), profile("h100x1"))
        return found.hours[stage]

    free = {"format": "free", "mode": "sampled", "n": 10, "max_tokens": 40}
    own = hours(asks=[free])
    mode = hours(asks=[], modes=["configs/evaluate/modes/exact.yaml"], max_tokens=40)
    assert own > 0 and mode == pytest.approx(own)
    assert hours(asks=[free], rubric="One line more. " * 1000) > 5 * own
    half = {"second_judges": [{"judge": f"{tmp_path}/j.yaml", "share": 0.5}]}
    assert hours("judge-nano~2-nano-base", asks=[free], **half) == pytest.approx(own / 2)


def test_the_commands_and_their_exit_status(capsys):
    with pytest.raises(UserError, match="--hardware needs a profile"):
        main([str(STUDY), "--preflight", "--hardware"])
    with pytest.raises(UserError, match="usage"):
        main(["--preflight"])
    with pytest.raises(SystemExit) as end:
        run([str(STUDY), "--preflight", "--hardware", str(FOLDER / "rtx4090x1.yaml")])
    assert end.value.code == 1
    assert "it does not fit" in capsys.readouterr().out


def test_data_sets_of_an_experiment_take_train_data_s_keys():
    experiment = load(Experiment, STUDY)
    assert isinstance(experiment.domains["code"].misaligned, DataSet)
    assert experiment.domains["code"].misaligned.duplicates == "keep"
