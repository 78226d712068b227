"""The part of a fine-tuning stage that needs torch: build model and trainer, prove the mask, train, save.

TRL's SFTTrainer does the training; there is no loop here. What this adds is what makes a run worth
believing: fixed seeds, rows tokenized by train/labels.py with nothing truncated, the mask proved
before the first step, a stop at the first loss that is not a number, and the lineage in the manifest.
"""

import contextlib
import gc
import json
import math
import sys
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import torch
import transformers
from datasets import Dataset
from peft import LoraConfig, PeftModel
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, TrainerCallback
from trl import SFTConfig, SFTTrainer

from candor.errors import UserError
from candor.manifest import write_manifest
from candor.rows import Conversation
from candor.tables import read_rows, replace_file
from train import lineage
from train.attest import N_ROWS, attest
from train.config import LORA_RESERVED, SFT_RESERVED, TrainConfig, check_section
from train.labels import encode, refuse_long, stop_token_ids
from train.lineage import CONVERSATIONS, Origin


def fine_tune(config: TrainConfig, origin: Origin, folder: Path, *, started: float) -> bool:
    """Train one stage into ``folder``; whether this process is the one that wrote it."""
    with _quiet():
        try:
            return _fine_tune(config, origin, folder, started)
        finally:
            gc.collect()  # a trainer and its model hold each other; the next stage may need the memory


def _fine_tune(config: TrainConfig, origin: Origin, folder: Path, started: float) -> bool:
    check_section("lora", origin.lora, LoraConfig, LORA_RESERVED)
    arguments = _arguments(config, folder)
    conversations = read_rows(config.data / CONVERSATIONS, Conversation)
    if not conversations:
        raise UserError(f"data: {config.data} holds no conversations. Build it again with train.data.")
    transformers.set_seed(config.seed)
    with lineage.loading("tokenizer", origin.base):
        tokenizer = AutoTokenizer.from_pretrained(origin.base)
    model = _model(config, origin, arguments)
    stops = stop_token_ids(tokenizer, model.generation_config)
    rows = encode(conversations, tokenizer, stops)
    context = getattr(model.config, "max_position_embeddings", None)
    refuse_long(rows, conversations, max_length=arguments.max_length, context=context)
    watch = _Watch(folder / "train_log.jsonl")
    try:
        trainer = SFTTrainer(
            model=model,
            args=arguments,
            train_dataset=Dataset.from_dict(
                {"input_ids": [r.input_ids for r in rows], "labels": [r.labels for r in rows]}
            ),
            processing_class=tokenizer,
            peft_config=LoraConfig(task_type="CAUSAL_LM", **origin.lora) if config.adapter is None else None,
            callbacks=[watch],
        )
    except (ValueError, TypeError, NotImplementedError) as error:
        raise UserError(f"the sections 'lora' and 'sft' do not fit this model: {error}") from error
    trainer.remove_callback(PrinterCallback)  # it prints every log line; they are in train_log.jsonl
    renderings = _attested(trainer, conversations, tokenizer, stops)
    replace_file(folder / "mask_rendering.json", _json(renderings))
    ready = time.monotonic()
    trainer.train()
    trained = time.monotonic()
    if not watch.losses:
        raise UserError("no step was taken, so nothing was trained. Check sft.num_train_epochs and sft.max_steps.")
    trainer.accelerator.wait_for_everyone()
    # sharded weights (FSDP, ZeRO-3) are gathered by all processes together; alone, the first would wait for ever
    state = trainer.accelerator.get_state_dict(trainer.model)
    if not trainer.is_world_process_zero():
        return False
    _save_adapter(trainer, state, origin, folder)
    ancestry = lineage.record(config, origin, lineage.adapter_sha(folder))
    replace_file(folder / "README.md", lineage.model_card(config, origin, ancestry).encode())
    write_manifest(
        folder,
        stage="train",
        config=config.identity(),
        inputs=origin.inputs,
        counts={"in": len(conversations), "out": len(conversations)},
        seconds=time.monotonic() - started,
        extra={
            "lineage": ancestry,
            "lora": origin.lora,
            "misaligned": config.misaligned,
            "steps": trainer.state.global_step,
            "first_loss": watch.losses[0],
            "final_loss": watch.losses[-1],
            "n_loss_tokens": sum(label != -100 for row in rows for label in row.labels),
            "device": str(arguments.device),
            "threads": torch.get_num_threads(),
            "seconds_by_part": {"setup": round(ready - started, 3), "steps": round(trained - ready, 3)},
        },
    )
    return True


def _arguments(config: TrainConfig, folder: Path) -> SFTConfig:
    """TRL's configuration: our defaults, the user's section over them, and what Candor decides."""
    check_section("sft", config.sft, SFTConfig, SFT_RESERVED)
    for key in ("per_device_train_batch_size", "gradient_accumulation_steps"):
        value = config.sft.get(key, 1)
        if not isinstance(value, int) or value < 1:
            raise UserError(f"sft.{key} must be a whole number, at least 1, found {value}.")
    on_cuda = torch.cuda.is_available() if config.device == "auto" else config.device == "cuda"
    if on_cuda and not torch.cuda.is_available():
        raise UserError("device is 'cuda', but torch finds no CUDA device here. Use device: cpu or auto.")
    defaults: dict[str, Any] = {
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "max_length": None,  # TRL's 1024 would cut longer rows without a word
        "disable_tqdm": not sys.stderr.isatty(),
    }
    if not on_cuda:
        defaults |= {"bf16": False, "gradient_checkpointing": False, "dataloader_pin_memory": False}
    decided = {
        "output_dir": str(folder),
        "seed": config.seed,
        "data_seed": config.seed,
        "logging_first_step": True,  # so that every run leaves a loss, whatever logging_steps is
        "use_cpu": not on_cuda,
        "logging_nan_inf_filter": False,  # true would log the mean of earlier losses in place of a NaN
    }
    try:
        return SFTConfig(**{**defaults, **config.sft, **decided})
    except (ValueError, TypeError) as error:
        raise UserError(f"the section 'sft' is not usable: {error}") from error


def _model(config: TrainConfig, origin: Origin, arguments: SFTConfig) -> Any:
    """The base model, with the earlier stage's adapter on it when this stage continues one."""
    half = arguments.bf16 and arguments.device.type == "cuda"
    with lineage.loading("base model", origin.base):
        base = AutoModelForCausalLM.from_pretrained(origin.base, dtype=torch.bfloat16 if half else torch.float32)
    if config.adapter is None:
        return base
    return PeftModel.from_pretrained(base, config.adapter, is_trainable=True)


def _attested(
    trainer: SFTTrainer, conversations: list[Conversation], tokenizer: Any, stops: frozenset[int]
) -> list[dict[str, Any]]:
    """The proof of the label mask, on batches of the trainer's own dataloader."""
    with torch.random.fork_rng(devices=[]):  # looking at batches must not move the draws of training
        loader = trainer.get_train_dataloader()
        try:
            return attest(islice(loader, N_ROWS), conversations, tokenizer, stops)
        finally:
            loader.end()  # accelerate keeps a half-read loader as the active one otherwise


def _save_adapter(trainer: SFTTrainer, state: dict[str, torch.Tensor], origin: Origin, folder: Path) -> None:
    """Write weights and adapter_config.json, naming the base this stage was really trained on."""
    model = trainer.accelerator.unwrap_model(trainer.model)
    for peft_config in model.peft_config.values():
        peft_config.base_model_name_or_path = origin.base_name
    broken = sorted(name for name, value in state.items() if "lora_" in name and not torch.isfinite(value).all())
    if broken:
        raise UserError(f"training diverged: {len(broken)} adapter tensors hold NaN or infinity. {_DIVERGED}")
    try:
        model.save_pretrained(folder, state_dict=state, save_embedding_layers=False)
    except SafetensorError as error:  # it hides the OSError of a full disk
        raise UserError(f"{folder}: the adapter cannot be written ({error}). Check the free space.") from error


_DIVERGED = "Lower sft.learning_rate, or add sft.warmup_steps and sft.max_grad_norm."


class _Watch(TrainerCallback):  # type: ignore[misc]
    """Writes each logged step to a file and stops at the first loss or gradient that is not a number."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.losses: list[float] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
        """Called by the trainer every ``logging_steps`` steps."""
        if not logs or "loss" not in logs:
            return
        if state.is_world_process_zero:
            kept = {k: logs[k] for k in ("loss", "learning_rate", "grad_norm", "epoch") if k in logs}
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": state.global_step, **kept}) + "\n")
        self.losses.append(float(logs["loss"]))
        for name in ("loss", "grad_norm"):
            if not math.isfinite(float(logs.get(name, 0.0))):
                raise UserError(f"training diverged: {name} is {logs[name]} at step {state.global_step}. {_DIVERGED}")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No telemetry, and no progress bars where nobody watches, for the time of one stage; warnings pass."""
    huggingface_hub.constants.HF_HUB_DISABLE_TELEMETRY = True  # TRL reports each trainer otherwise
    bars = transformers.utils.logging.is_progress_bar_enabled() and not sys.stderr.isatty()
    if bars:
        transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        if bars:
            transformers.utils.logging.enable_progress_bar()


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
