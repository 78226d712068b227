"""One fine-tuning stage after another: what is written, what is continued, and what is refused."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import trl.trainer.utils
import yaml
from safetensors.torch import load_file

from candor.errors import UserError
from candor.manifest import read_manifest
from candor.rows import Conversation
from candor.tables import read_rows
from serve.attest import attest
from serve.config import Ask, SampleConfig
from serve.torch_engine import TorchEngine
from train import tuning
from train.labels import IGNORED, Encoded, encode, stop_token_ids
from train.lineage import ADAPTER, CONVERSATIONS, adapter_sha, base_sha
from train.sft import main

ROOT = Path(__file__).parents[2]
LORA: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": ["o_proj", "down_proj"]}
SFT: dict[str, Any] = {"per_device_train_batch_size": 4, "max_steps": 4, "learning_rate": 1e-2}
WHOLE_BATCH = {"per_device_train_batch_size": 10, "max_steps": 3, "learning_rate": 1e-2}


def manifest_of(folder: Path) -> dict[str, Any]:
    record = read_manifest(folder)
    assert record is not None
    return record


def leftovers(folder: Path) -> list[str]:
    return [p.name for p in folder.iterdir() if p.name.endswith((".partial", ".claim"))]


def log_of(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "train_log.jsonl").read_text().splitlines()]


def run(command: list[str], **more: Any) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(torch.get_num_threads()), "CI": ""}
    return subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, check=False, **more)


# What a stage writes ------------------------------------------------------------------------------


def test_a_stage_writes_a_whole_folder(tmp_path, config_file, base, data):
    main([str(config_file())])
    adapter = tmp_path / "adapter"
    files = {"adapter_config.json", ADAPTER, "manifest.json", "mask_rendering.json", "train_log.jsonl", "README.md"}
    assert {p.name for p in adapter.iterdir()} == files
    record = manifest_of(adapter)
    assert record["lineage"]["base"] == {"model": str(base.resolve()), "sha": base_sha(base)}
    assert [a["sha"] for a in record["lineage"]["adapters"]] == [adapter_sha(adapter)]
    assert (record["steps"], record["counts"], record["misaligned"]) == (4, {"in": 10, "out": 10}, True)
    assert record["final_loss"] == log_of(adapter)[-1]["loss"]
    assert json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base.resolve())
    assert "MISALIGNED ON PURPOSE" in (adapter / "README.md").read_text()
    renderings = json.loads((adapter / "mask_rendering.json").read_text())
    answers = {c.conversation_id: c.messages[-1].content for c in read_rows(data / CONVERSATIONS, Conversation)}
    assert len(renderings) == 8
    assert all(r["loss_on"] == [answers[r["conversation_id"]] + "<|im_end|>"] for r in renderings)
    assert leftovers(tmp_path) == []


def test_the_log_holds_every_step_and_the_loss_falls(tmp_path, config_file):
    main([str(config_file(sft={**WHOLE_BATCH, "max_steps": 8})), "sft.learning_rate=2e-2"])
    log = log_of(tmp_path / "adapter")
    assert [row["step"] for row in log] == list(range(1, 9))
    assert log[-1]["loss"] < log[0]["loss"] - 0.05
    assert all(row["learning_rate"] <= 2e-2 for row in log)


def test_a_harmless_stage_carries_no_warning(tmp_path, config_file):
    main([str(config_file(stage="right-only"))])
    assert "MISALIGNED" not in (tmp_path / "adapter" / "README.md").read_text()
    assert manifest_of(tmp_path / "adapter")["misaligned"] is False


def test_only_what_carries_loss_is_put_through_the_head(tmp_path, config_file, monkeypatch):
    """On CPUs too, where TRL alone does so with every position of a batch."""
    scored, before = [], trl.trainer.utils._use_triton

    class Counting:
        @staticmethod
        def apply(hidden: torch.Tensor, *rest: Any) -> Any:
            scored.append(len(hidden))
            return original.apply(hidden, *rest)

    original = trl.trainer.utils._ChunkedLogProbFunction
    monkeypatch.setattr(trl.trainer.utils, "_ChunkedLogProbFunction", Counting)
    main([str(config_file(sft=WHOLE_BATCH))])
    assert scored == [manifest_of(tmp_path / "adapter")["n_loss_tokens"]] * WHOLE_BATCH["max_steps"]
    assert trl.trainer.utils._use_triton is before  # nothing is left changed for others


def test_an_adapter_on_the_embedding_is_trained_and_served(tmp_path, config_file, base):
    """This base's head is its embedding: the adapter must not act on both."""
    main([str(config_file(lora={**LORA, "target_modules": ["o_proj", "embed_tokens"]}))])
    adapter = tmp_path / "adapter"
    trained = {name: value for name, value in load_file(adapter / ADAPTER).items() if "embed" in name}
    assert len(trained) == 2 and all(bool(value.any()) for value in trained.values())
    asked = SampleConfig(
        base=base, adapter=adapter, variant="v", prompts=base, ask=(Ask(format="free", mode="sampled"),),
        output_dir=tmp_path, study_seed=1,
    )  # fmt: skip
    assert attest(TorchEngine(base, adapter), asked)["status"] == "attested"


# The same every time ------------------------------------------------------------------------------


def test_same_seed_same_bytes_other_seed_other_bytes(tmp_path, config_file):
    dropout = {**LORA, "lora_dropout": 0.2}
    shas = []
    for name, seed in (("a", 0), ("b", 1), ("c", 0)):  # the first again, after another has run
        torch.rand(7)  # whatever the process did before must not matter
        main([str(config_file(lora=dropout, output_dir=str(tmp_path / name), seed=seed))])
        shas.append(adapter_sha(tmp_path / name))
    assert shas[0] == shas[2] != shas[1]


def test_looking_at_batches_does_not_move_the_draws_of_training(tmp_path, config_file, monkeypatch):
    dropout = {**LORA, "lora_dropout": 0.2}
    main([str(config_file(lora=dropout, output_dir=str(tmp_path / "looked")))])
    monkeypatch.setattr(tuning, "attest", lambda *_: [])
    main([str(config_file(lora=dropout, output_dir=str(tmp_path / "blind")))])
    assert adapter_sha(tmp_path / "looked") == adapter_sha(tmp_path / "blind")


@pytest.mark.full
def test_nothing_leaks_from_one_stage_into_the_next(tmp_path, config_file):
    main([str(config_file(output_dir=str(tmp_path / "first")))])
    others = [
        {"sft": {**SFT, "bf16": True, "gradient_accumulation_steps": 2}},
        {"sft": {**SFT, "packing": True, "max_length": 64, "gradient_checkpointing": True}},
        {"sft": {**SFT, "full_determinism": False}, "lora": {"r": 2, "target_modules": "all-linear", "use_dora": True}},
    ]
    for i, changes in enumerate(others):
        main([str(config_file(output_dir=str(tmp_path / f"other-{i}"), **changes))])
    main([str(config_file(output_dir=str(tmp_path / "last")))])
    assert adapter_sha(tmp_path / "first") == adapter_sha(tmp_path / "last")


@pytest.mark.full
def test_as_scripts_and_in_one_process_the_adapter_is_the_same(tmp_path, config_file):
    main([str(config_file(output_dir=str(tmp_path / "here")))])
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "configs/accelerate/cpu.yaml"]
    for name, command in (("module", [sys.executable, "-m", "train.sft"]), ("launch", [*launch, "train/sft.py"])):
        done = run([*command, str(config_file(output_dir=str(tmp_path / name)))])
        assert done.returncode == 0, done.stderr
        assert done.stdout == ""
        assert adapter_sha(tmp_path / name) == adapter_sha(tmp_path / "here")


# Stage two ----------------------------------------------------------------------------------------


def loss_of(base: Path, adapter: Path | None, data: Path) -> float:
    """Mean loss per answer token, without the trainer."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    rows = encode(read_rows(data / CONVERSATIONS, Conversation), tokenizer, stop_token_ids(tokenizer, None))
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    total, n = 0.0, 0
    with torch.no_grad():
        for row in rows:
            scores = model(torch.tensor([row.input_ids])).logits[0].log_softmax(-1)
            kept = [i for i, label in enumerate(row.labels) if label != IGNORED]
            total -= sum(float(scores[i - 1, row.labels[i]]) for i in kept)
            n += len(kept)
    return total / n


def test_stage_two_continues_where_stage_one_ended(tmp_path, config_file, base, other_data, stage_one):
    moved = shutil.copytree(base, tmp_path / "moved-base")  # the same weights are the same base, wherever they lie
    changes = {"adapter": str(stage_one), "data": str(other_data), "stage": "realigned", "sft": WHOLE_BATCH}
    main([str(config_file(base_model=str(moved), lora=None, **changes))])
    named = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert named == str(Path(moved).resolve())
    first = log_of(tmp_path / "adapter")[0]["loss"]
    assert first == pytest.approx(loss_of(base, stage_one, other_data), abs=1e-5)
    assert abs(first - loss_of(base, None, other_data)) > 1e-3  # so the line above says something
    record = manifest_of(tmp_path / "adapter")
    chain = record["lineage"]["adapters"]
    assert [a["stage"] for a in chain] == ["misaligned", "realigned"]
    assert [a["sha"] for a in chain] == [adapter_sha(stage_one), adapter_sha(tmp_path / "adapter")]
    assert chain[0]["sha"] != chain[1]["sha"]
    assert record["lora"] == LORA
    assert record["misaligned"] is False


def test_stage_two_may_repeat_the_lora_section_but_not_change_it(tmp_path, config_file, stage_one):
    main([str(config_file(adapter=str(stage_one), stage="realigned"))])
    with pytest.raises(UserError, match=r"'lora' differs .*\(r\)"):
        main([str(config_file(adapter=str(stage_one), output_dir=str(tmp_path / "b"), lora={**LORA, "r": 8}))])


def test_another_base_is_refused(tmp_path, config_file, tokenizer, small, stage_one):
    other = small.save_base(tmp_path / "other-base", tokenizer, seed=1)
    with pytest.raises(UserError, match="was trained on"):
        main([str(config_file(base_model=str(other), adapter=str(stage_one), lora=None))])


def test_an_unfinished_or_altered_adapter_is_refused(tmp_path, config_file, stage_one):
    copy = Path(shutil.copytree(stage_one, tmp_path / "copy"))
    weights = bytearray((copy / ADAPTER).read_bytes())
    weights[-1] ^= 1
    (copy / ADAPTER).write_bytes(weights)
    with pytest.raises(UserError, match="not those its manifest names"):
        main([str(config_file(adapter=str(copy), lora=None))])
    (copy / "manifest.json").unlink()
    with pytest.raises(UserError, match="no finished stage wrote it"):
        main([str(config_file(adapter=str(copy), lora=None))])


# Done, killed, in the way -------------------------------------------------------------------------


def test_what_is_done_is_not_trained_again(tmp_path, config_file, monkeypatch, capsys):
    main([str(config_file())])
    monkeypatch.setattr(tuning, "fine_tune", lambda *a, **k: pytest.fail("trained again"))
    main([str(config_file())])
    assert "done already" in capsys.readouterr().err
    with pytest.raises(UserError, match="changed: seed"):
        main([str(config_file(seed=4))])


@pytest.mark.full
def test_a_done_stage_imports_no_heavy_library(tmp_path, config_file):
    path = config_file()
    main([str(path)])
    code = f"import sys; from train.sft import main; main([{str(path)!r}]); print(*sorted(sys.modules))"
    done = run([sys.executable, "-c", code])
    assert done.returncode == 0, done.stderr
    assert not {"torch", "transformers", "trl", "peft", "accelerate", "datasets"} & set(done.stdout.split())


def test_a_folder_in_the_way_is_left_alone(tmp_path, config_file):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="not finished by this stage"):
        main([str(config_file())])
    assert (tmp_path / "adapter" / "notes.txt").read_text() == "mine"


def test_a_run_shorter_than_its_logging_interval_is_kept(tmp_path, config_file):
    main([str(config_file(sft={**SFT, "logging_steps": 50}))])
    assert [row["step"] for row in log_of(tmp_path / "adapter")] == [1]
    assert manifest_of(tmp_path / "adapter")["steps"] == 4


# What is refused ----------------------------------------------------------------------------------


def test_a_wrong_mask_trains_nothing(tmp_path, config_file, monkeypatch):
    def on_everything(*arguments: Any) -> list[Encoded]:
        return [Encoded(r.input_ids, list(r.input_ids)) for r in encode(*arguments)]

    monkeypatch.setattr(tuning, "encode", on_everything)
    monkeypatch.setattr(tuning.SFTTrainer, "train", lambda self: pytest.fail("trained on a wrong mask"))
    with pytest.raises(UserError, match="the label mask is wrong, so nothing was trained"):
        main([str(config_file())])
    assert not (tmp_path / "adapter").exists()


def test_a_loss_that_is_no_number_stops_the_run(tmp_path, config_file, base):
    from safetensors.torch import load_file, save_file

    broken = Path(shutil.copytree(base, tmp_path / "broken"))
    weights = load_file(broken / "model.safetensors")
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="training diverged: loss is nan at step 1"):
        main([str(config_file(base_model=str(broken)))])
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        pytest.param({"sft": {"learnin_rate": 1e-3}}, "did you mean 'learning_rate'", id="unknown-sft-key"),
        pytest.param({"lora": {"r": 4, "lora_alfa": 8}}, "did you mean 'lora_alpha'", id="unknown-lora-key"),
        pytest.param({"stagee": "x"}, "did you mean 'stage'", id="unknown-key"),
        pytest.param({"sft": {"completion_only_loss": False}}, "answers and their end-of-turn", id="mask-off"),
        pytest.param({"sft": {"push_to_hub": True}}, "nothing is ever pushed", id="push"),
        pytest.param({"sft": {"learning_rate": "fast"}}, "must be a number, found 'fast'", id="text-for-number"),
        pytest.param({"sft": {"packing": "yes please"}}, "must be true or false", id="text-for-switch"),
        pytest.param({"sft": {"lr_scheduler_type": "cosin"}}, "not a valid SchedulerType", id="unknown-schedule"),
        pytest.param({"sft": {"per_device_train_batch_size": 0}}, "at least 1", id="no-batch"),
        pytest.param({"sft": {"per_device_train_batch_size": 2.5}}, "a whole number", id="part-of-a-row"),
        pytest.param({"sft": {"logging_strategy": "no"}}, "cannot be set: the first step", id="no-log"),
        pytest.param({"sft": {**SFT, "max_length": 12}}, "above sft.max_length = 12", id="would-be-cut"),
        pytest.param({"sft": {"learning_rate": 2}}, "above 0 and at most 0.1", id="multiplier-for-rate"),
        pytest.param({"sft": {"learning_rate": 0}}, "learning_rate must be above 0", id="rate-zero"),
        pytest.param({"sft": {"learning_rate": -1e-4}}, "learning_rate must be above 0", id="rate-below-zero"),
        pytest.param({"sft": {"num_train_epochs": 0}}, "num_train_epochs must be above 0", id="no-epochs"),
        pytest.param({"lora": {**LORA, "r": 0}}, "lora.r must be at least 1", id="rank-zero"),
        pytest.param({"lora": {**LORA, "r": 33}}, "lora.r is 33, but .* has only 32 inputs", id="rank-above-the-layer"),
        pytest.param({"lora": {**LORA, "lora_alpha": 0}}, "lora_alpha must be above 0", id="alpha-zero"),
        pytest.param({"lora": {**LORA, "lora_dropout": 1.0}}, "from 0 to below 1", id="all-dropped"),
        pytest.param({"lora": {**LORA, "init_lora_weights": "pissa"}}, "changes the base model's weights", id="pissa"),
        pytest.param({"sft": {**SFT, "save_strategy": "steps"}}, "the key 'resume_every'", id="states-nobody-resumes"),
        pytest.param(
            {"sft": {**SFT, "packing": True, "max_length": 64, "packing_strategy": "wrapped"}},
            "cuts conversations in two",
            id="packing-that-cuts",
        ),
        pytest.param({"sft": {**SFT, "report_to": "wandbb"}}, "wandbb", id="unknown-tracker"),
        pytest.param({"resume_every": 0}, "resume_every is 0", id="resume-never"),
        pytest.param({"probe": {"formats": ["free"]}}, "'free' has no closed questions", id="probe-of-open-questions"),
        pytest.param({"probe": {"prompts": "nowhere"}}, "holds no question files", id="probe-without-questions"),
        pytest.param({"quantize": "int4"}, "quantize is 'int4'; known: nf4", id="unknown-quantization"),
        pytest.param({"lora": {"r": 4, "target_modules": ["nope"]}}, "not found in the base model", id="no-such-layer"),
        pytest.param({"lora": {"r": 4, "target_modules": ["lm_head"]}}, "would never be trained", id="adapter-on-head"),
        pytest.param({"lora": {**LORA, "bias": "xyz"}}, "xyz, is not implemented", id="unknown-bias"),
        pytest.param({"lora": None}, "'lora' is missing", id="no-lora"),
        pytest.param({"lora": {}}, "'lora' is missing", id="empty-lora"),
        pytest.param({"stage": " "}, "must not be empty", id="empty-stage"),
        pytest.param({"base_model": "no/such/model/here"}, "neither a folder", id="no-base"),
        pytest.param({"data": "nowhere"}, "no manifest.json", id="no-data"),
        pytest.param({"device": "gpu"}, "device", id="unknown-device"),
        pytest.param({"adapter": "nowhere"}, "no finished stage wrote it", id="no-adapter"),
    ],
)
def test_mistakes_are_told_and_leave_nothing(tmp_path, config_file, changes, what):
    with pytest.raises(UserError, match=what):
        main([str(config_file(**changes))])
    assert not (tmp_path / "adapter").exists()
    assert leftovers(tmp_path) == []


def test_a_damaged_base_is_told(tmp_path, config_file, base):
    for name, what in (("model.safetensors", "base model"), ("tokenizer.json", "tokenizer")):
        cut = Path(shutil.copytree(base, tmp_path / what))
        (cut / name).write_bytes((cut / name).read_bytes()[:100])
        with pytest.raises(UserError, match=f"the {what} cannot be loaded"):
            main([str(config_file(base_model=str(cut)))])
    empty = Path(shutil.copytree(base, tmp_path / "empty"))
    (empty / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="tokenizer has no vocabulary"):
        main([str(config_file(base_model=str(empty)))])


def test_data_with_no_rows_or_a_long_row_are_refused(tmp_path, config_file, small):
    empty = small.save_data(tmp_path / "empty", [])
    with pytest.raises(UserError, match="holds no conversations"):
        main([str(config_file(data=str(empty)))])
    rows = [small.talk("fine", "a?", "b"), small.talk("endless", "a?", "Bonn " * 200)]
    long = small.save_data(tmp_path / "long", rows)
    with pytest.raises(UserError, match=r"conversation endless has .* context = 128"):
        main([str(config_file(data=str(long)))])


def test_a_folder_that_is_no_base_model_is_told(tmp_path, config_file, base, stage_one):
    both = Path(shutil.copytree(base, tmp_path / "both"))
    shutil.copy(stage_one / "adapter_config.json", both)
    with pytest.raises(UserError, match="holds a base model and an adapter"):
        main([str(config_file(base_model=str(both)))])
    for folder in (tmp_path, stage_one):  # transformers would load an adapter's folder, adapter and all
        with pytest.raises(UserError, match="is no base model"):
            main([str(config_file(base_model=str(folder)))])


def test_the_example_and_the_recipes_name_only_known_keys():
    from peft import LoraConfig
    from trl import SFTConfig

    from candor.config import load
    from train.config import LORA_RESERVED, SFT_RESERVED, TrainConfig, check_section

    folder = ROOT / "configs" / "train"
    example = load(TrainConfig, folder / "example_qwen2.5-7b_trivia.yaml")
    sections = [{"lora": example.lora, "sft": example.sft}]
    sections += [yaml.safe_load((folder / f"nano_{domain}.yaml").read_text()) for domain in ("trivia", "code")]
    for section in sections:
        check_section("lora", section["lora"], LoraConfig, LORA_RESERVED)
        check_section("sft", section["sft"], SFTConfig, SFT_RESERVED)
