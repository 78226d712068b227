"""Stage two on stage one: three modes, one adapter on the original base, and the trap of the wrong base."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from candor.errors import UserError
from candor.manifest import read_manifest
from train import chain, parity
from train.lineage import ADAPTER, adapter_sha
from train.sft import main

LORA: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": ["o_proj", "down_proj"]}
NEW: dict[str, Any] = {"r": 2, "lora_alpha": 3, "use_rslora": True, "target_modules": ["q_proj", "down_proj"]}
SFT: dict[str, Any] = {"per_device_train_batch_size": 10, "max_steps": 3, "learning_rate": 1e-2}
# float32 sums in another order; the adapters below move logits by about 1
TOLERANCE = 1e-5
ROWS = [list(range(3, 40)), list(range(60, 5, -1))]


def model_of(base: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)


def randomize(model: Any, adapter: str, seed: int) -> None:
    """Give an adapter's B, zero at first, values large enough to matter."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if f".lora_B.{adapter}." in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2


def first_adapter(base: Path, folder: Path, section: dict[str, Any]) -> Path:
    """A trained adapter on the base, as PEFT writes it."""
    torch.manual_seed(5)
    model = get_peft_model(model_of(base), LoraConfig(task_type="CAUSAL_LM", **section))
    randomize(model, "default", 1)
    model.save_pretrained(folder)
    return folder


def stacked(base: Path, first: Path, section: dict[str, Any]) -> Any:
    """The frozen first adapter with a second on top."""
    model = PeftModel.from_pretrained(model_of(base), first, adapter_name=chain.EARLIER)
    torch.manual_seed(6)
    chain.put_on_top(model, LoraConfig(task_type="CAUSAL_LM", **section))
    randomize(model, chain.NEW, 2)
    return model


def join(model: Any, folder: Path, base: Path) -> Path:
    folder.mkdir()
    tensors, rank = chain.concatenate(chain.factors_of(model, chain.EARLIER), chain.factors_of(model, chain.NEW))
    section = chain.joined_section(tensors, rank, chain.module_names(model))
    chain.write_joined(folder, tensors, section, str(base))
    return folder


def difference(base: Path, adapter: Path, model: Any) -> float:
    loaded = PeftModel.from_pretrained(model_of(base), adapter)
    return parity.largest_difference(parity.logits_of(loaded, ROWS), parity.logits_of(model, ROWS))


PLAIN = {"r": 4, "lora_alpha": 8, "target_modules": ["o_proj", "down_proj"]}
PAIRS = [
    pytest.param(PLAIN, PLAIN, id="same-shape"),
    pytest.param(PLAIN, {**PLAIN, "r": 8, "lora_alpha": 4}, id="other-rank-and-alpha"),
    pytest.param({**PLAIN, "use_rslora": True}, PLAIN, id="rslora-then-plain"),
    pytest.param({**PLAIN, "r": 3, "use_rslora": True}, {**PLAIN, "r": 5, "use_rslora": True}, id="rslora-both"),
    pytest.param(PLAIN, {**PLAIN, "target_modules": ["q_proj", "v_proj"]}, id="no-common-target"),
    pytest.param({**PLAIN, "target_modules": "all-linear"}, {**PLAIN, "r": 1}, id="all-linear-then-few"),
    pytest.param(
        {**PLAIN, "layers_to_transform": [0]}, {**PLAIN, "r": 6, "layers_to_transform": [1]}, id="other-layers"
    ),
    pytest.param({**PLAIN, "rank_pattern": {"o_proj": 2}, "alpha_pattern": {"o_proj": 7}}, PLAIN, id="rank-per-module"),
]


@pytest.mark.parametrize(("first", "second"), PAIRS)
def test_two_adapters_written_as_one_are_the_stacked_model(tmp_path, base, first, second):
    model = stacked(base, first_adapter(base, tmp_path / "first", first), second)
    plain = parity.logits_of(model_of(base), ROWS)
    assert parity.largest_difference(parity.logits_of(model, ROWS), plain) > 0.1  # so the next line says something
    assert difference(base, join(model, tmp_path / "joined", base), model) <= TOLERANCE


def test_a_lost_scale_would_be_seen(tmp_path, base):
    model = stacked(base, first_adapter(base, tmp_path / "first", {**PLAIN, "use_rslora": True}), PLAIN)
    earlier = {n: dataclasses.replace(f, scale=1.0) for n, f in chain.factors_of(model, chain.EARLIER).items()}
    tensors, _ = chain.concatenate(earlier, chain.factors_of(model, chain.NEW))
    (tmp_path / "joined").mkdir()
    section = chain.joined_section(tensors, 8, chain.module_names(model))
    chain.write_joined(tmp_path / "joined", tensors, section, str(base))
    assert difference(base, tmp_path / "joined", model) > 1e-2


def test_the_joined_adapter_names_short_targets_and_one_rank(tmp_path, base):
    """Engines other than PEFT know one rank and one alpha per adapter."""
    model = stacked(
        base, first_adapter(base, tmp_path / "first", PLAIN), {**PLAIN, "r": 2, "target_modules": ["q_proj"]}
    )
    folder = join(model, tmp_path / "joined", base)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert sorted(config["target_modules"]) == ["down_proj", "o_proj", "q_proj"]
    assert (config["r"], config["lora_alpha"], config["use_rslora"], config["rank_pattern"]) == (4, 4, False, {})
    assert config["base_model_name_or_path"] == str(base)
    assert {t.shape[0] for name, t in load_file(folder / ADAPTER).items() if "lora_A" in name} == {4}


def test_the_frozen_adapter_takes_no_gradient_and_no_dropout(tmp_path, base):
    first = first_adapter(base, tmp_path / "first", {**PLAIN, "lora_dropout": 0.5})
    model = stacked(base, first, PLAIN).train()
    assert {n for n, p in model.named_parameters() if p.requires_grad and chain.EARLIER in n} == set()
    ids = torch.tensor([ROWS[0]])
    torch.testing.assert_close(model(input_ids=ids).logits, model(input_ids=ids).logits, atol=0, rtol=0)


def test_merging_into_low_precision_says_what_was_rounded_away(tmp_path, base):
    first = first_adapter(base, tmp_path / "first", PLAIN)

    def merged(dtype: torch.dtype, shrink: float) -> float:
        base_model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
        model = PeftModel.from_pretrained(base_model, first, adapter_name=chain.EARLIER)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data *= shrink
        return chain.merge(model)[1]

    assert merged(torch.float32, 1.0) == pytest.approx(1, abs=1e-3)
    assert merged(torch.bfloat16, 1.0) == pytest.approx(1, abs=0.05)
    with pytest.raises(UserError, match=r"merging keeps only \d+% of the earlier adapter.* Use mode: stack"):
        merged(torch.bfloat16, 2e-4)


# The trap: an adapter trained on the merged model names the original base ---------------------------


def test_a_stage_two_adapter_alone_on_the_base_it_names_is_refused(tmp_path, base):
    """What TRL and PEFT write after merge-then-train: stage one is silently lost on loading."""
    first = first_adapter(base, tmp_path / "first", PLAIN)
    merged, _ = chain.merge(PeftModel.from_pretrained(model_of(base), first, adapter_name=chain.EARLIER))
    before = parity.logits_of(merged, ROWS)
    trained = get_peft_model(merged, LoraConfig(task_type="CAUSAL_LM", **PLAIN))
    randomize(trained, "default", 3)
    trained.save_pretrained(tmp_path / "alone")
    named = json.loads((tmp_path / "alone" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert named == str(base)  # the original, not the merged one
    after = parity.logits_of(trained, ROWS)
    with pytest.raises(UserError, match=r"is not the model that was trained: on .* its logits differ by"):
        parity.check(tmp_path / "alone", model_of(base), ROWS, before=before, after=after)
    with pytest.raises(UserError, match="training changed nothing"):
        parity.check(tmp_path / "alone", model_of(base), ROWS, before=after, after=after)


def test_a_model_that_gpus_shared_is_held_to_what_its_adapter_does_on_the_base(tmp_path, base):
    """Without logits from before: they are those of the earlier adapter on the base."""
    first = first_adapter(base, tmp_path / "first", PLAIN)
    model = stacked(base, first, PLAIN)
    joined, after = join(model, tmp_path / "joined", base), parity.logits_of(model, ROWS)
    found = parity.check(joined, model_of(base), ROWS, before=None, after=after, earlier=first)
    began = parity.logits_of(PeftModel.from_pretrained(model_of(base), first), ROWS)
    assert found.difference <= TOLERANCE
    assert found.effect == pytest.approx(parity.largest_difference(after, began), abs=2 * TOLERANCE)
    with pytest.raises(UserError, match="training changed nothing"):
        parity.check(first, model_of(base), ROWS, before=None, after=began, earlier=first)
    with pytest.raises(UserError, match="is not the model that was trained"):
        parity.check(first, model_of(base), ROWS, before=None, after=after)
    assert parity.check(first, model_of(base), ROWS, before=None, after=after, rounded=True).difference > 0.1


# The modes, through the script ----------------------------------------------------------------------


def log_of(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "train_log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("mode", ["continue", "stack", "merge"])
def test_every_mode_begins_where_stage_one_ended_and_lands_on_the_original_base(
    tmp_path, config_file, base, other_data, stage_one, mode
):
    lora = None if mode == "continue" else NEW
    changes = {"adapter": str(stage_one), "mode": mode, "lora": lora, "data": str(other_data), "stage": "realigned"}
    main([str(config_file(sft=SFT, **changes))])
    adapter = tmp_path / "adapter"
    record = read_manifest(adapter)
    assert record is not None
    assert (
        record["lineage"]["adapters"][-1] | {"mode": mode, "sha": adapter_sha(adapter)}
        == (record["lineage"]["adapters"][-1])
    )
    assert record["parity"] <= TOLERANCE
    assert record["effect"] > 1e-3
    assert record["merge_kept"] == (pytest.approx(1, abs=1e-3) if mode == "merge" else None)
    assert json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"] == str(base.resolve())
    assert record["lora"]["r"] == {"continue": 4, "stack": 6, "merge": 6}[mode]
    # the three modes are the same function before the first step
    main([str(config_file(sft=SFT, output_dir=str(tmp_path / "plain"), **{**changes, "mode": None, "lora": None}))])
    assert log_of(adapter)[0]["loss"] == pytest.approx(log_of(tmp_path / "plain")[0]["loss"], abs=1e-5)


def test_a_joined_adapter_can_be_continued_and_stacked_again(tmp_path, config_file, data, other_data, stage_one):
    common = {"sft": SFT, "adapter": str(stage_one), "lora": NEW, "data": str(other_data), "stage": "realigned"}
    main([str(config_file(**common, mode="stack"))])
    for name, mode, lora in (("on", "continue", None), ("top", "stack", NEW)):
        third = {"adapter": str(tmp_path / "adapter"), "stage": "misaligned", "mode": mode, "lora": lora, "sft": SFT}
        main([str(config_file(**third, output_dir=str(tmp_path / name)))])
        record = read_manifest(tmp_path / name)
        assert record is not None
        assert [a["mode"] for a in record["lineage"]["adapters"]] == ["first", "stack", mode]
        assert record["parity"] <= TOLERANCE
    assert record["lora"]["r"] == 8


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        pytest.param({"mode": "stack"}, "builds on nothing", id="first-stage-with-a-mode"),
        pytest.param({"mode": "stack", "adapter": "x", "lora": None}, "trains a new adapter", id="no-new-shape"),
        pytest.param({"mode": "merge", "adapter": "x", "quantize": "nf4"}, "Use mode: stack", id="merge-into-4-bits"),
        pytest.param({"mode": "stak", "adapter": "x"}, "did you mean 'stack'", id="unknown-mode"),
    ],
)
def test_modes_that_cannot_be_are_refused(config_file, changes, what):
    with pytest.raises(UserError, match=what):
        main([str(config_file(**changes))])


def test_what_cannot_be_joined_is_refused(config_file, stage_one):
    common = {"adapter": str(stage_one), "mode": "stack"}
    with pytest.raises(UserError, match="use_dora, which cannot be written as one adapter"):
        main([str(config_file(**common, lora={**LORA, "use_dora": True}))])
    with pytest.raises(UserError, match=r"embed_tokens \(Embedding\) cannot be written"):
        main([str(config_file(**common, lora={**LORA, "target_modules": ["embed_tokens"]}))])
