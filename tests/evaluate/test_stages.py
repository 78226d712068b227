"""What of a finished stage may change without making it another: memory, checks on the way, where models lie."""

from dataclasses import replace

import pytest

from candor.config import plain
from evaluate import stages
from evaluate.stages import Changed, Records, Stage
from serve.config import EngineConfig, VllmConfig

VLLM = EngineConfig(name="vllm", vllm=VllmConfig())
FREE = {
    "memory": replace(VLLM, vllm=VllmConfig(memory_share=0.5, cache_gb=2.0, context=512, keep_open=1)),
    "tolerance": replace(VLLM, attest_tolerance=1.0),
    "threads": replace(VLLM, threads=3),
}
DECIDING = {
    "dtype": replace(VLLM, dtype="bfloat16"),
    "vllm.adapters": replace(VLLM, vllm=VllmConfig(adapters="lora")),
    "vllm.tensor_parallel": replace(VLLM, vllm=VllmConfig(tensor_parallel=2)),
}


@pytest.fixture
def base(tmp_path):
    """A folder that stands for a model: this is about files and their names."""
    folder = tmp_path / "models" / "base"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_text("weights")
    return folder


def made(run, stage):
    """The stage, finished as its process leaves it."""
    for output in stage.outputs:
        output.mkdir(parents=True, exist_ok=True)
        (output / "manifest.json").write_text("{}")
    Records(run).write(stage, 1.0)
    return stage


def sampling(run, base, engine=VLLM):
    config = plain({"base": base, "ask": [], "output_dir": run / "answers", "engine": plain(engine)})
    return Stage(id="sample", module="serve.sample", config=config, inputs=(base,), outputs=(run / "answers",))


def training(run, base, **changes):
    config = {
        "base_model": base, "data": run / "data", "output_dir": run / "adapter", "stage": "realigned",
        "domain": "trivia", "seed": 1, "lora": {"r": 4}, "sft": {"learning_rate": 1e-5}, **changes,
    }  # fmt: skip
    return Stage(id="t", module="train.sft", config=plain(config), inputs=(base,), outputs=(run / "adapter",))


@pytest.mark.parametrize("module", ["serve.sample", "evaluate.judge"])
@pytest.mark.parametrize("engine", FREE.values(), ids=FREE)
def test_what_moves_no_answer_leaves_a_stage_done(tmp_path, base, engine, module):
    made(tmp_path / "run", replace(sampling(tmp_path / "run", base), module=module))
    assert Records(tmp_path / "run").is_done(replace(sampling(tmp_path / "run", base, engine), module=module))
    assert engine.identity() == VLLM.identity()  # so that half-done answers are kept, too


@pytest.mark.parametrize("module", ["serve.sample", "evaluate.judge"])
@pytest.mark.parametrize("key", DECIDING)
def test_what_may_move_one_is_refused_by_name(tmp_path, base, key, module):
    made(tmp_path / "run", replace(sampling(tmp_path / "run", base), module=module))
    with pytest.raises(Changed, match=f"other config keys engine.{key.removeprefix('vllm.')} "):
        Records(tmp_path / "run").is_done(replace(sampling(tmp_path / "run", base, DECIDING[key]), module=module))


def test_a_training_stage_is_what_its_own_identity_says(tmp_path, base):
    run = tmp_path / "run"
    made(run, training(run, base))
    assert Records(run).is_done(training(run, base, resume_every=7, sft={"learning_rate": "1e-5"}))
    with pytest.raises(Changed, match=r"other config keys seed, sft\.learning_rate "):
        Records(run).is_done(training(run, base, seed=2, sft={"learning_rate": 1e-4}))


@pytest.mark.parametrize("stage", [sampling, training])
def test_a_model_folder_may_be_moved_but_not_changed(tmp_path, base, stage, monkeypatch):
    run = tmp_path / "run"
    made(run, stage(run, base))
    moved = base.rename(tmp_path / "elsewhere")
    assert Records(run).is_done(stage(run, moved))
    with monkeypatch.context() as patch:  # the record followed, so that large files are not hashed every time
        patch.setattr(stages, "sha256_file", None)
        assert Records(run).is_done(stage(run, moved))
    (moved / "model.safetensors").write_text("others ")
    with pytest.raises(Changed, match=r"other inputs .*elsewhere/model\.safetensors "):
        Records(run).is_done(stage(run, moved))
    other = tmp_path / "third"
    moved.rename(other)
    with pytest.raises(Changed, match=r"other inputs .*model\.safetensors"):
        Records(run).is_done(stage(run, other))


def test_records_of_another_version_are_compared_as_they_are(tmp_path, base):
    run = tmp_path / "run"
    old = training(run, base)
    made(run, replace(old, config={**old.config, "gone": 1}))
    with pytest.raises(Changed, match="other config keys gone "):
        Records(run).is_done(old)
