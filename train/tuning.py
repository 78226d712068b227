"""The part of a fine-tuning stage that needs torch: build model and trainer, prove the mask, train, save.

TRL's SFTTrainer does the training; there is no loop here. What this adds is what makes a run worth
believing: fixed seeds, rows tokenized by train/labels.py with nothing truncated, the mask proved
before the first step, a stop at the first loss that is not a number, states to continue from, the
lineage in the manifest, and at the end the proof that what was written to disk, loaded on the base
it names, is the model that was trained.
"""

import contextlib
import gc
import itertools
import json
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pyarrow.compute as pc
import torch
import transformers
import trl.trainer.utils
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoTokenizer, PrinterCallback
from trl import SFTConfig, SFTTrainer

from candor.errors import UserError
from candor.manifest import write_manifest
from candor.nearby import nearby
from candor.rows import Conversation
from candor.tables import read_rows, replace_file
from train import chain, lineage, parity, space, templates
from train.attest import N_ROWS, attest
from train.building import Built, arguments, base_model, build, keep_float32, refuse_ranks, told_misfits, trackers
from train.callbacks import Keeper, Log, Prober
from train.config import LORA_RESERVED, TrainConfig, check_section
from train.labels import IGNORED, Encoded, encode, refuse_long, stop_token_ids
from train.lineage import CONVERSATIONS, Origin
from train.saving import Writer
from train.unfinished import STATES, discard, last_state, step_of

_N_COMPARED = 4  # rows whose logits are compared before and after training, and after writing
_N_TOKENS_ON_HOST = 64  # of one row, for a model that GPUs share and one host looks at


def fine_tune(
    config: TrainConfig, origin: Origin, folder: Path, *, started: float, check: Callable[[], None] = lambda: None
) -> bool:
    """Train one stage into ``folder``; whether this process is the one that wrote it.

    What an earlier, killed call left in ``folder`` is continued. ``check`` is called after every
    step and may raise to end the run.
    """
    with _quiet(), _told(config), _only_answers_scored():
        try:
            return _fine_tune(config, origin, folder, started, check)
        finally:
            gc.collect()  # a trainer and its model hold each other; the next stage may need the memory


def _fine_tune(config: TrainConfig, origin: Origin, folder: Path, started: float, check: Callable[[], None]) -> bool:
    check_section("lora", origin.lora, LoraConfig, LORA_RESERVED)
    made = arguments(config, folder / STATES)
    state = _agreed_state(folder, made)
    beside = _Beside.of(config, folder, made, check, resumed_at=step_of(state) if state else 0)
    run = _prepare(config, origin, folder, made, beside)
    before = parity.logits_in(run.trainer, run.sample)
    times = [started, time.monotonic()]
    run.trainer.train(resume_from_checkpoint=str(state) if state else None)
    times.append(time.monotonic())
    if not beside.log.losses:
        raise UserError("no step was taken, so nothing was trained. Check sft.num_train_epochs and sft.max_steps.")
    run.trainer.accelerator.wait_for_everyone()
    sample = run.sample if before is not None else [run.sample[0][:_N_TOKENS_ON_HOST]]
    after = parity.logits_in(run.trainer, sample)
    facts = run.writer.write(folder)
    if not facts:
        return False
    facts |= _facts(run, beside, made, resumed_at=step_of(state) if state else None)
    counts = {"in": run.n_rows, "out": run.n_rows}
    if after is None:
        sys.stderr.write("DeepSpeed holds the weights: the written adapter was not compared with the trained model\n")
    else:
        mixed = run.trainer.accelerator.mixed_precision != "no"
        del run, beside  # the base is loaded again, to see what was written as others will see it
        proof = _proof(config, origin, folder, made, sample, before, after, mixed=mixed)
        facts |= {"effect": proof.effect, "parity": proof.difference}
    times.append(time.monotonic())
    seconds = (round(b - a, 3) for a, b in itertools.pairwise(times))
    write_manifest(
        folder,
        stage="train",
        config=config.identity(),
        inputs=origin.inputs,
        counts=counts,
        seconds=time.monotonic() - started,
        extra={**facts, "seconds_by_part": dict(zip(("setup", "steps", "proof"), seconds, strict=True))},
    )
    return True


def _facts(run: "_Run", beside: "_Beside", made: SFTConfig, *, resumed_at: int | None) -> dict[str, Any]:
    """What the manifest says of the training itself."""
    return {
        "steps": run.trainer.state.global_step,
        "resumed_at": resumed_at,
        "processes": made.world_size,
        "first_loss": beside.log.losses[0],
        "final_loss": beside.log.losses[-1],
        "n_loss_tokens": run.n_loss_tokens,
        "tokens_per_second": beside.log.tokens_per_second,
        "template": run.template,
        "merge_kept": run.writer.built.merge_kept,
        "trained_in": sorted({str(p.dtype) for p in run.trainer.model.parameters() if p.requires_grad}),
        "effect": None,  # not compared yet, or not at all: under DeepSpeed
        "parity": None,
        "device": str(made.device),
        "threads": torch.get_num_threads(),
    }


def _proof(
    config: TrainConfig,
    origin: Origin,
    folder: Path,
    made: SFTConfig,
    sample: list[list[int]],
    before: parity.Logits | None,
    after: parity.Logits,
    *,
    mixed: bool,
) -> parity.Parity:
    """The written adapter against the trained model; what failed is not continued.

    A model that several GPUs shared (``before`` is None) may be too large for one of them: it is loaded on the host.
    """
    if made.device.type == "cuda":  # two copies may not fit; on CPUs a collection costs more than a small model
        gc.collect()
        torch.cuda.empty_cache()
    base = base_model(config, origin, made)
    try:
        if before is not None and not config.quantize:
            base = base.to(made.device)
        return parity.check(
            folder,
            base,
            sample,
            before=before,
            after=after,
            earlier=config.adapter,
            rounded=mixed and before is None,  # FSDP's own mixed precision cannot be taken off, accelerate's can
        )
    except UserError:
        discard(folder)
        raise


@dataclass(frozen=True, slots=True)
class _Beside:
    """What runs beside the steps."""

    log: Log
    keeper: Keeper
    prober: Prober | None
    trackers: list[Any]

    @classmethod
    def of(
        cls, config: TrainConfig, folder: Path, made: SFTConfig, check: Callable[[], None], *, resumed_at: int
    ) -> "_Beside":
        """All that the stage asks for."""
        others = trackers(made, folder, resumed_at=resumed_at)
        return cls(
            Log(folder, resumed_at=resumed_at, check=check),
            Keeper(folder, resume_every=config.resume_every, keep_every=config.checkpoint_every),
            Prober(folder, config.probe, others, resumed_at=resumed_at) if config.probe else None,
            others,
        )

    def in_order(self) -> list[Any]:
        """In the order they are called after each step."""
        return [self.log, *([self.prober] if self.prober else []), self.keeper, *self.trackers]

    def attach(self, trainer: Any, writer: Writer, tokenizer: Any, stops: frozenset[int]) -> None:
        """Give them what exists only once the trainer does."""
        self.keeper.attach(trainer, writer.keep)
        if self.prober:
            self.prober.attach(trainer, tokenizer, stops)


@dataclass(frozen=True, slots=True)
class _Run:
    """A stage ready for its first step, its mask proved."""

    trainer: Any
    writer: Writer
    template: str  # family of the chat template
    sample: list[list[int]]  # rows whose logits are compared before and after training, and after writing
    n_rows: int
    n_loss_tokens: int


def _prepare(config: TrainConfig, origin: Origin, folder: Path, made: SFTConfig, beside: _Beside) -> _Run:
    """Everything up to the first step; what a person got wrong is told here."""
    conversations = read_rows(nearby(config.data) / CONVERSATIONS, Conversation)
    if not conversations:
        raise UserError(f"data: {config.data} holds no conversations. Build it again with train.data.")
    transformers.set_seed(config.seed)
    with lineage.loading("tokenizer", origin.base):
        tokenizer = AutoTokenizer.from_pretrained(origin.base)
    built = build(config, origin, made)
    stops = stop_token_ids(tokenizer, built.model.generation_config)
    rows = encode(conversations, tokenizer, stops)
    template = templates.check(tokenizer, stops, config.accept_template)
    context = getattr(built.model.config, "max_position_embeddings", None)
    refuse_long(rows, conversations, max_length=made.max_length, context=context)
    trainer = _trainer(built, made, rows, tokenizer, beside)
    space.check(folder, trainer, config, base=origin.base, joined_bytes=chain.size_of(built.earlier or {}))
    _refuse_lost_rows(trainer.train_dataset, rows)
    renderings = _attested(trainer, conversations, tokenizer, stops)
    if trainer.is_world_process_zero():
        replace_file(folder / "mask_rendering.json", _json(renderings))
    writer = Writer(trainer, config, origin, built, len(rows))
    beside.attach(trainer, writer, tokenizer, stops)
    n_loss_tokens = sum(label != IGNORED for row in rows for label in row.labels)
    return _Run(trainer, writer, template, [r.input_ids for r in rows[:_N_COMPARED]], len(rows), n_loss_tokens)


def _agreed_state(folder: Path, made: SFTConfig) -> Path | None:
    """The state to continue from; the first process decides, for all must continue from the same."""
    made.distributed_state.wait_for_everyone()  # it may still be clearing up what a kill left
    found = broadcast_object_list([str(last_state(folder) or "")])[0]
    return Path(found) if found else None


def _trainer(built: Built, made: SFTConfig, rows: Sequence[Encoded], tokenizer: Any, beside: _Beside) -> SFTTrainer:
    """TRL's trainer over rows that are tokenized and labelled already."""
    loaded = [(p, p.data) for p in built.model.parameters() if p.requires_grad] if built.new is None else []
    with told_misfits():
        trainer = SFTTrainer(
            model=built.model,
            args=made,
            train_dataset=Dataset.from_dict(
                {"input_ids": [r.input_ids for r in rows], "labels": [r.labels for r in rows]}
            ),
            processing_class=tokenizer,
            peft_config=built.new,
            callbacks=beside.in_order(),
        )
    trainer.remove_callback(PrinterCallback)  # it prints every log line; they are in train_log.jsonl
    refuse_ranks(trainer.model)
    keep_float32(trainer.model, loaded)
    return trainer


def _refuse_lost_rows(prepared: Any, rows: Sequence[Encoded]) -> None:
    """UserError when the trainer's own preparation (truncating, filtering, packing) lost a token of any row."""
    table = prepared.with_format("arrow")[:]
    found = pc.sum(pc.list_value_length(table["input_ids"])).as_py()
    on = pc.sum(pc.not_equal(pc.list_flatten(table["labels"]), IGNORED)).as_py()
    wanted = sum(len(row.input_ids) for row in rows)
    wanted_on = sum(label != IGNORED for row in rows for label in row.labels)
    if (found, on) != (wanted, wanted_on):
        raise UserError(
            f"the trainer prepared {found} tokens, {on} with loss, out of {wanted} and {wanted_on}: rows were cut or "
            "left out. Check the section 'sft'."
        )


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


@contextlib.contextmanager
def _told(config: TrainConfig) -> Iterator[None]:
    """Memory and disk that ran out, in words."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(f"the GPU's memory ran out: {str(error).splitlines()[0]} {_memory_hint(config)}") from error
    except Exception as error:
        text = str(error)
        first_line = text.splitlines()[0] if text else type(error).__name__
        if re.search("can't allocate memory|not enough memory", text):
            raise UserError(f"memory ran out: {first_line} {_memory_hint(config)}") from error
        # torch, safetensors and tokenizers each hide the OSError of a full disk in an error of their own
        if re.search(r"\(os error \d+\)|PytorchStreamWriter|unexpected pos", text):
            raise UserError(
                f"{config.output_dir}: a file cannot be written ({first_line}). Check the free space and the limit on "
                "the size of files, then run the same command again: it continues."
            ) from error
        raise


def _memory_hint(config: TrainConfig) -> str:
    """What makes a stage smaller, in the order of what it costs."""
    size = config.sft.get("per_device_train_batch_size", 8)
    hints = (
        [] if size == 1 else [f"halve sft.per_device_train_batch_size ({size}) and double gradient_accumulation_steps"]
    )
    if not config.sft.get("gradient_checkpointing", True):
        hints.append("set sft.gradient_checkpointing: true")
    if not config.quantize:
        hints.append("set quantize: nf4")
    return f"To need less: {', or '.join([*hints, 'use more GPUs with FSDP'])}."


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


@contextlib.contextmanager
def _only_answers_scored() -> Iterator[None]:
    """Compute the loss where there is one, for the time of one stage.

    On CPUs TRL puts every position through the head and drops the prompts' and the padding's afterwards, which is
    half the time of a step of a small model; on GPUs it leaves them out, and so do we everywhere.
    """
    before = trl.trainer.utils._use_triton  # asked there for this choice alone; the kernels have their own
    trl.trainer.utils._use_triton = lambda device: True
    try:
        yield
    finally:
        trl.trainer.utils._use_triton = before


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
