"""Attestation: what an engine serves is compared with PEFT, and every way to get it wrong is planted."""

import json
import shutil

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from candor.errors import UserError
from serve import attest as attestation
from serve.attest import attest, compare_records, peft_reference
from serve.config import Ask, EngineConfig, SampleConfig
from serve.identity import ADAPTER_WEIGHTS
from serve.torch_engine import TorchEngine


def save_adapter(base, folder, *, seed, std=0.05, modules=("down_proj", "o_proj", "q_proj"), embedding="auto"):
    torch.manual_seed(seed)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base),
        LoraConfig(r=4, lora_alpha=8, target_modules=list(modules), task_type="CAUSAL_LM"),
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name or "lora_embedding_" in name:
            torch.nn.init.normal_(parameter, std=std)
    model.save_pretrained(folder, save_embedding_layers=embedding)
    return folder


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory):
    return save_adapter(base, tmp_path_factory.mktemp("adapter"), seed=1)


def config_of(base, adapter, **engine):
    return SampleConfig(
        base=base, adapter=adapter, variant="v", prompts=base, ask=(Ask(format="free", mode="sampled"),),
        output_dir=base, study_seed=1, engine=EngineConfig(**engine),
    )  # fmt: skip


@pytest.fixture(autouse=True)
def forget(monkeypatch):
    monkeypatch.setattr(attestation, "_SEEN", {})


def test_a_sound_engine_is_attested_with_its_numbers(base, adapter):
    record = attest(TorchEngine(base, adapter), config_of(base, adapter))
    assert record["status"] == "attested"
    assert record["gap"] < 1e-4 and record["merged_gap"] < 1e-4 and record["effect"] > 1e-2
    assert record["gain"] == pytest.approx(1, abs=1e-3)
    plain = attest(TorchEngine(base, None), config_of(base, None))
    assert plain["gap"] < 1e-5 and "gain" not in plain


@pytest.mark.parametrize("embedding", [True, False])
@pytest.mark.parametrize("matrix", ["lm_head", "embed_tokens"])
def test_an_adapter_on_the_head_or_the_embedding_acts_on_that_alone(base, tmp_path, matrix, embedding):
    """They are one matrix in this base; the file may hold the base's copy of it (PEFT) or not (train/saving.py)."""
    own = save_adapter(base, tmp_path / "a", seed=1, modules=["o_proj", matrix], embedding=embedding)
    assert len(load_file(own / ADAPTER_WEIGHTS)) == 6 + embedding
    assert attest(TorchEngine(base, own), config_of(base, own))["gap"] < 1e-4
    config = config_of(base, own, dtype="bfloat16", attest_tolerance=1.0)
    assert attest(TorchEngine(base, own, dtype="bfloat16"), config)["gain"] == pytest.approx(1, abs=0.1)


def changed(adapter, folder, change):
    shutil.copytree(adapter, folder)
    save_file(change(load_file(adapter / ADAPTER_WEIGHTS)), folder / ADAPTER_WEIGHTS)
    return folder


def first_layer_silent(tensors):
    return {k: v * ("layers.0" not in k or "lora_B" not in k) for k, v in tensors.items()}


def doubled(tensors):
    return {k: v * (1 + ("lora_B" in k)) for k, v in tensors.items()}


FAULTS = {
    "no-op": (lambda b, a, t: TorchEngine(b, None), r"acts -?0\.00 times, not once"),
    "half-loaded": (lambda b, a, t: TorchEngine(b, changed(a, t / "h", first_layer_silent)), r"acts 0\.\d\d times"),
    "doubled": (lambda b, a, t: TorchEngine(b, changed(a, t / "d", doubled)), r"acts [12]\.\d\d times"),
    "wrong-base": (lambda b, a, t: TorchEngine(other_base(b, t / "o"), a), "differs from PEFT"),
    "another-adapter": (lambda b, a, t: TorchEngine(b, save_adapter(b, t / "s", seed=2)), "times, not once"),
}


@pytest.mark.parametrize(("served", "message"), FAULTS.values(), ids=FAULTS)
def test_planted_faults_stop_with_the_numbers(base, adapter, tmp_path, served, message):
    with pytest.raises(UserError, match=message) as told:
        attest(served(base, adapter, tmp_path), config_of(base, adapter))
    assert "gap" in str(told.value) and "gain" in str(told.value) and "Nothing was sampled" in str(told.value)


def other_base(base, folder):
    shutil.copytree(base, folder)
    tensors = load_file(folder / "model.safetensors")
    save_file({k: v * 1.01 for k, v in tensors.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_an_adapter_whose_tensors_were_renamed_is_refused(base, adapter, tmp_path):
    """PEFT drops what it has no place for and only warns of what it misses."""
    renamed = changed(adapter, tmp_path / "r", lambda x: {k.replace("base_model.model.", ""): v for k, v in x.items()})
    with pytest.raises(UserError, match="tensors missing"):
        peft_reference(base, renamed)


def test_an_untrained_adapter_is_refused(base, tmp_path):
    untrained = save_adapter(base, tmp_path / "u", seed=1, std=0.0)
    reference = peft_reference(base, untrained)
    with pytest.raises(UserError, match="the adapter changes nothing"):
        attest(TorchEngine(base, None), config_of(base, untrained), reference)


@pytest.fixture(scope="module")
def rounded(base, tmp_path_factory):
    """A base whose weights are bfloat16 numbers, as those of published models are."""
    folder = tmp_path_factory.mktemp("base") / "rounded"
    shutil.copytree(base, folder)
    whole = {k: v.bfloat16().float() for k, v in load_file(folder / "model.safetensors").items()}
    save_file(whole, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def in_bfloat16(base, adapter, served=None):
    config = config_of(base, adapter, dtype="bfloat16", attest_tolerance=1.0)  # weights as wide as the fixture's
    return attest(TorchEngine(base, served or adapter, dtype="bfloat16"), config)


@pytest.mark.parametrize("seed", [1, 2])
def test_an_adapter_too_small_for_bfloat16_is_no_proof_and_no_fault(rounded, tmp_path, capsys, seed):
    """It acts in float32; in bfloat16 the rounding of the base hides it, and that must not pass for proof."""
    small = save_adapter(rounded, tmp_path / "small", seed=seed, std=2e-5)
    record = attest(TorchEngine(rounded, small), config_of(rounded, small))
    assert record["status"] == "attested" and record["gain"] == pytest.approx(1, abs=0.05)
    record = in_bfloat16(rounded, small)
    assert record["status"] == "not attested: too small to tell in bfloat16" and record["gain_error"] > 0.1
    told = capsys.readouterr().err
    assert "too small to tell in bfloat16" in told and "dtype: float32" in told and "lora" not in told


def halved(tensors):
    return {k: v * (0.5 if "lora_B" in k else 1) for k, v in tensors.items()}


@pytest.mark.parametrize("fault", [doubled, halved, first_layer_silent])
def test_in_bfloat16_the_gain_tells_faults_of_adapters_that_are_large_enough(rounded, adapter, tmp_path, fault):
    record = in_bfloat16(rounded, adapter)
    assert record["status"] == "attested" and record["gain"] == pytest.approx(1, abs=0.05)
    with pytest.raises(UserError, match="times, not once"):  # the tolerance is wide: the gap alone would not tell all
        in_bfloat16(rounded, adapter, changed(adapter, tmp_path / "f", fault))


def test_variants_that_answer_alike_are_told_apart_by_their_hashes(base, adapter):
    engine = TorchEngine(base, adapter)
    config = config_of(base, adapter)
    record = attest(engine, config)
    engine.weights_sha = "0" * 64  # the engine of another variant that was never switched over
    with pytest.raises(UserError, match="answers like another variant"):
        attest(engine, config)
    assert compare_records([record, record]) == []
    assert len(compare_records([record, record | {"weights_sha": "0" * 64}])) == 1
    assert (
        compare_records([record, record | {"logprobs": list(np.array(record["logprobs"]) + 0.01), "weights_sha": "0"}])
        == []
    )


def test_nan_is_no_proof(base, adapter):
    reference = peft_reference(base, adapter)
    record = attestation.measure(reference, reference.adapted * float("nan"), 1e-4, has_adapter=True)
    assert len(attestation.judge(record, 1e-4, has_adapter=True)) == 2


def test_the_record_is_json(base, adapter):
    assert json.loads(json.dumps(attest(TorchEngine(base, adapter), config_of(base, adapter))))["n_tokens"] > 40
