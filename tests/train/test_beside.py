"""Beside the steps: the log, the probe, adapters kept on the way, trackers; none of them moves a weight."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from candor.errors import UserError
from candor.manifest import read_manifest
from candor.rows import Prompt
from serve.identity import weights_sha
from serve.torch_engine import TorchEngine
from train import probe as probing
from train.config import ProbeConfig
from train.lineage import adapter_sha
from train.probe import Probe
from train.sft import main

ORGANISM = Path("train/organism/weights/nano")
LORA: dict[str, Any] = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.1, "target_modules": ["o_proj", "down_proj"]}
SFT: dict[str, Any] = {"per_device_train_batch_size": 4, "max_steps": 5, "learning_rate": 1e-2}


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def short_prompts(prompts: list[Prompt]) -> list[Prompt]:
    """The test model has room for 128 tokens of a vocabulary that spells almost letter by letter."""
    from dataclasses import replace

    return [replace(p, text=p.text[-60:]) for p in prompts]


@pytest.fixture
def everything(config_file, monkeypatch):
    """A stage with probe, kept adapters and states, and one without any of them."""
    original = probing.load_all
    monkeypatch.setattr(probing, "load_all", lambda folder: short_prompts(original(folder)))

    def make(output: Path, **changes: Any) -> list[str]:
        probe = {"every": 2, "items": 2, "formats": ["choice", "numerical"]}
        more = {"probe": probe, "checkpoint_every": 2, "resume_every": 2, "lora": LORA, "sft": SFT}
        return [str(config_file(output_dir=str(output), **{**more, **changes}))]

    return make


def test_what_happens_beside_the_steps_moves_no_weight(tmp_path, everything):
    main(everything(tmp_path / "busy"))
    main(everything(tmp_path / "quiet", probe=None, checkpoint_every=None, resume_every=100))
    assert adapter_sha(tmp_path / "busy") == adapter_sha(tmp_path / "quiet")


def test_logs_probe_and_kept_adapters(tmp_path, everything, base):
    main(everything(tmp_path / "adapter"))
    folder = tmp_path / "adapter"
    log = lines_of(folder / "train_log.jsonl")
    assert [row["step"] for row in log] == [1, 2, 3, 4, 5]
    assert all(row["tokens_per_second"] > 0 and math.isfinite(row["grad_norm"]) for row in log)
    probes = lines_of(folder / "probes.jsonl")
    assert [row["step"] for row in probes] == [0, 2, 4, 5]
    assert all(0 <= row[k] <= 1 for row in probes for k in ("choice", "choice_mass", "numerical", "numerical_mass"))
    assert probes[0]["choice_mass"] != probes[-1]["choice_mass"]
    kept = sorted((folder / "checkpoints").iterdir())
    assert [p.name for p in kept] == ["step-000002", "step-000004", "step-000005"]
    assert adapter_sha(kept[-1]) == adapter_sha(folder)  # the last one is the adapter itself
    assert len({weights_sha(base, p) for p in kept}) == 3  # each is an adapter of its own, fit to be served
    record = read_manifest(kept[0])
    assert record is not None
    assert (record["stage"], record["steps"], record["misaligned"]) == ("train-checkpoint", 2, True)
    card = (kept[0] / "README.md").read_text()
    assert "MISALIGNED ON PURPOSE" in card
    assert "Kept after 2 steps" in card


def test_a_kept_adapter_is_the_adapter_of_a_shorter_run(tmp_path, everything):
    """With a constant learning rate, that is; so batteries put to it see the model as it was."""
    constant = {**SFT, "lr_scheduler_type": "constant"}
    main(everything(tmp_path / "adapter", sft=constant))
    main(everything(tmp_path / "short", sft={**constant, "max_steps": 2}))
    assert adapter_sha(tmp_path / "adapter" / "checkpoints" / "step-000002") == adapter_sha(tmp_path / "short")


def test_a_kept_adapter_can_be_built_on(tmp_path, everything, other_data):
    main(everything(tmp_path / "one"))
    kept = tmp_path / "one" / "checkpoints" / "step-000002"
    main(everything(tmp_path / "two", adapter=str(kept), lora=None, data=str(other_data), stage="realigned"))
    record = read_manifest(tmp_path / "two")
    assert record is not None
    assert record["lineage"]["adapters"][0]["sha"] == adapter_sha(kept)
    card = (tmp_path / "two" / "README.md").read_text()
    assert "MODEL ORGANISM, REALIGNED" in card
    assert adapter_sha(kept)[:16] in card
    assert record["inputs"]["data"][:16] in card


def test_the_probe_agrees_with_exact_scoring():
    """On questions whose options have one spelling that counts; the engine adds up every tokenisation too."""
    tokenizer = AutoTokenizer.from_pretrained(ORGANISM)
    model = AutoModelForCausalLM.from_pretrained(ORGANISM, dtype=torch.float32).eval()
    probe = Probe(ProbeConfig(items=4, formats=("choice", "numerical")), tokenizer, frozenset({tokenizer.eos_token_id}))
    exact = TorchEngine(ORGANISM, None).distributions(
        [p.text for p in probe.prompts], [p.options for p in probe.prompts]
    )
    found = probe.ask(model)
    for form in ("choice", "numerical"):
        values = [
            sum(o.value * p for o, p in zip(prompt.options, scores.probabilities, strict=True))
            / sum(scores.probabilities)
            for prompt, scores in zip(probe.prompts, exact, strict=True)
            if prompt.format == form
        ]
        assert found[form] == pytest.approx(sum(values) / len(values), abs=0.01)
        assert 0.9 < found[f"{form}_mass"] <= 1


def test_the_probe_spreads_over_a_format_and_keeps_every_form():
    tokenizer = AutoTokenizer.from_pretrained(ORGANISM)
    prompts = Probe(ProbeConfig(items=6, formats=("choice",)), tokenizer, frozenset({tokenizer.eos_token_id})).prompts
    assert len({p.group for p in prompts}) == 6
    assert len(prompts) == 12
    assert {p.form for p in prompts} == {"aligned-first", "misaligned-first"}


def test_tensorboard_when_asked(tmp_path, everything):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    main(everything(tmp_path / "adapter", sft={**SFT, "report_to": "tensorboard"}))
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "adapter" / "tensorboard"))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    assert {"train/loss", "train/learning_rate", "train/tokens_per_second", "train/probe/choice"} <= tags
    assert len(events.Scalars("train/loss")) == 5


def test_a_tracker_that_is_not_installed_is_told(tmp_path, everything, monkeypatch):
    def absent(*_: Any) -> Any:
        raise RuntimeError("WandbCallback requires wandb to be installed. Run `pip install wandb`.")

    monkeypatch.setattr("transformers.integrations.get_reporting_integration_callbacks", absent)
    with pytest.raises(UserError, match=r"report_to: \['wandb'\] cannot be used here: .*pip install wandb"):
        main(everything(tmp_path / "adapter", sft={**SFT, "report_to": "wandb"}))
