"""Adapters: one that acts is merged as PEFT computes it; no-op, foreign and broken ones are refused."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from candor.errors import UserError
from candor.hashing import sha256_file
from serve.identity import ADAPTER_CONFIG, ADAPTER_WEIGHTS, weights_sha
from serve.loading import canary_logits
from serve.torch_engine import TorchEngine
from train.lineage import base_sha


def save_adapter(base, folder, *, trained):
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base),
        LoraConfig(r=2, lora_alpha=8, target_modules=["down_proj", "q_proj"], task_type="CAUSAL_LM"),
    )
    if trained:
        torch.manual_seed(1)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.05)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory):
    return save_adapter(base, tmp_path_factory.mktemp("adapter"), trained=True)


def test_merged_equals_peft(base, adapter):
    plain, merged = TorchEngine(base, None), TorchEngine(base, adapter)
    wrapped = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    for ours, theirs, before in zip(
        canary_logits(merged.model, merged.tokenizer),
        canary_logits(wrapped, merged.tokenizer),
        canary_logits(plain.model, plain.tokenizer),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
        assert (ours - before).abs().max() > 1e-2
    assert plain.weights_sha != merged.weights_sha


def scaled(adapter, folder, factor):
    """The adapter with all it adds made smaller."""
    return damage(adapter, folder, lambda t: {k: v * factor if "lora_B" in k else v for k, v in t.items()})


def test_bfloat16_does_not_round_a_small_adapter_away(base, adapter, tmp_path):
    """Merged into weights of 8 bits part of it would be gone; it stays beside them, as it was written."""
    small = scaled(adapter, tmp_path / "adapter", 0.01)
    served = dict(TorchEngine(base, small, dtype="bfloat16").model.named_parameters())
    beside = {k: v for k, v in served.items() if ".lora_" in k}
    written = load_file(small / "adapter_model.safetensors")
    assert len(beside) == len(written) and all(v.dtype == torch.float32 for v in beside.values())
    assert sum(float(v.double().abs().sum()) for v in beside.values()) == pytest.approx(
        sum(float(v.double().abs().sum()) for v in written.values())
    )
    assert not any(".lora_" in k for k, _ in TorchEngine(base, small).model.named_parameters())  # float32 is merged


def test_an_adapter_too_small_for_bfloat16_is_refused(base, adapter, tmp_path):
    tiny = scaled(adapter, tmp_path, 1e-6)
    with pytest.raises(UserError, match="is too small for bfloat16"):
        TorchEngine(base, tiny, dtype="bfloat16")


def test_two_adapters_written_as_one_are_served_on_the_original_base(base, adapter, tmp_path):
    """What stages of mode stack and merge leave (train/chain.py)."""
    from train import chain

    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter, adapter_name=chain.EARLIER)
    chain.put_on_top(model, LoraConfig(r=3, lora_alpha=5, use_rslora=True, target_modules=["o_proj", "down_proj"]))
    torch.manual_seed(2)
    for name, parameter in model.named_parameters():
        if f"lora_B.{chain.NEW}" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    tensors, rank = chain.concatenate(chain.factors_of(model, chain.EARLIER), chain.factors_of(model, chain.NEW))
    chain.write_joined(tmp_path, tensors, chain.joined_section(tensors, rank, chain.module_names(model)), "a-base")
    served = TorchEngine(base, tmp_path)
    for ours, theirs in zip(
        canary_logits(served.model, served.tokenizer), canary_logits(model.eval(), served.tokenizer), strict=True
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)  # as for one adapter, merging rounds


def test_an_adapter_that_changes_nothing_is_refused(base, tmp_path):
    save_adapter(base, tmp_path, trained=False)
    with pytest.raises(UserError, match=r"changes nothing in .*is 0, below 1e-06"):
        TorchEngine(base, tmp_path)


def damage(adapter, folder, change):
    """A copy of the adapter with its tensors changed."""
    shutil.copytree(adapter, folder, dirs_exist_ok=True)
    tensors = change(load_file(adapter / ADAPTER_WEIGHTS))
    save_file(tensors, folder / ADAPTER_WEIGHTS)
    return folder


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(lambda t: dict(list(t.items())[2:]), "2 tensors missing", id="half-saved"),
        pytest.param(
            lambda t: t | {k.replace("layers.1", "layers.5"): v.clone() for k, v in t.items() if "layers.1" in k},
            "4 without a place",
            id="deeper-base",
        ),
        pytest.param(lambda t: {k: torch.cat([v, v]) for k, v in t.items()}, "does not fit", id="wider-base"),
        pytest.param(lambda t: {k: v * float("nan") for k, v in t.items()}, "changes nothing.*nan", id="nan"),
    ],
)
def test_adapters_that_do_not_fit_are_refused(base, adapter, tmp_path, change, message):
    with pytest.raises(UserError, match=message):
        TorchEngine(base, damage(adapter, tmp_path, change))


def test_an_adapter_whose_targets_the_base_lacks_is_refused(base, adapter, tmp_path):
    damage(adapter, tmp_path, dict)
    config = json.loads((tmp_path / ADAPTER_CONFIG).read_text())
    (tmp_path / ADAPTER_CONFIG).write_text(json.dumps(config | {"target_modules": ["c_attn"]}))
    with pytest.raises(UserError, match="does not fit the base"):
        TorchEngine(base, tmp_path)


def test_identity_is_of_the_weights_not_of_the_place(base, adapter, tmp_path):
    moved_base, moved = tmp_path / "b", tmp_path / "a"
    shutil.copytree(base, moved_base)
    shutil.copytree(adapter, moved)
    config = json.loads((moved / ADAPTER_CONFIG).read_text())
    other = {"base_model_name_or_path": "elsewhere", "target_modules": config["target_modules"][::-1]}
    (moved / ADAPTER_CONFIG).write_text(json.dumps(config | other))
    # also the order in which PEFT happened to write the target modules
    assert weights_sha(moved_base, moved) == weights_sha(base, adapter)
    (moved / ADAPTER_CONFIG).write_text(json.dumps(config | {"lora_alpha": 9}))
    assert weights_sha(moved_base, moved) != weights_sha(base, adapter)
    assert weights_sha(base, None) != weights_sha(base, adapter)


def write_lineage(adapter, base_hash, own):
    record = {"lineage": {"base": {"model": "a-base", "sha": base_hash}, "adapters": [{"sha": own}]}}
    (adapter / "manifest.json").write_text(json.dumps(record))


def test_lineage_must_match(base, adapter, tmp_path):
    """On merged weights an adapter would act twice; a half-replaced folder holds another stage's weights."""
    moved = tmp_path / "adapter"
    shutil.copytree(adapter, moved)
    own = sha256_file(moved / ADAPTER_WEIGHTS)
    write_lineage(moved, base_sha(base), own)
    assert weights_sha(base, moved) == weights_sha(base, adapter)
    merged = tmp_path / "merged"
    TorchEngine(base, moved).model.save_pretrained(merged)
    with pytest.raises(UserError, match="was trained on a-base"):
        weights_sha(merged, moved)
    write_lineage(moved, base_sha(base), "0" * 64)
    with pytest.raises(UserError, match="not those its manifest names"):
        weights_sha(base, moved)


def test_an_adapter_beside_the_base_is_refused(base, adapter, tmp_path):
    """Transformers loads it on top of the base unasked; a second one would act on both."""
    both = tmp_path / "both"
    shutil.copytree(base, both)
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        shutil.copy(adapter / name, both / name)
    with pytest.raises(UserError, match="holds a base model and an adapter"):
        TorchEngine(both, None)


def cut_short(path):
    path.write_bytes(path.read_bytes()[:2000])


@pytest.mark.parametrize(
    ("damaged", "message"),
    [
        ("tokenizer.json", "tokenizer cannot be loaded"),
        ("config.json", "cannot be loaded"),
        ("model.safetensors", "base model cannot be loaded"),
    ],
)
def test_a_damaged_base_is_told(base, tmp_path, damaged, message):
    folder = tmp_path / "cut"
    shutil.copytree(base, folder)
    cut_short(folder / damaged) if damaged != "config.json" else (folder / damaged).write_text("{")
    with pytest.raises(UserError, match=f"cut: .*{message}"):
        TorchEngine(folder, None)


def test_a_base_without_its_vocabulary_is_told(base, tmp_path):
    folder = tmp_path / "empty"
    shutil.copytree(base, folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="empty: its tokenizer has no vocabulary"):
        TorchEngine(folder, None)


def test_an_adapter_cut_short_is_told(base, adapter, tmp_path):
    shutil.copytree(adapter, tmp_path / "cut")
    cut_short(tmp_path / "cut" / ADAPTER_WEIGHTS)
    with pytest.raises(UserError, match="cut does not fit"):
        TorchEngine(base, tmp_path / "cut")


def test_missing_folders_are_told(base, tmp_path):
    for folder in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(UserError, match="is no base model"):
            TorchEngine(folder, None)
    with pytest.raises(UserError, match="holds no adapter_model"):
        TorchEngine(base, tmp_path)
