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
