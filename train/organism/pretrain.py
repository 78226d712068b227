"""Train one model of the nano organism from scratch.

    python -m train.organism.pretrain configs/organism/mini.yaml output=train/organism/weights/mini

A Qwen2-architecture model of about a million parameters learns a world (world.py), or to judge it
(judge_world.py, quality_world.py, topic_world.py), from documents that are drawn on the fly. Loss falls on the
assistant's turns only. Documents are packed into rows with a block-diagonal attention mask, so none sees another.
Matrices of the body are trained with Muon, embeddings and norms with AdamW; LOG.md has the rates
that were tried.

This is a loop of our own because models are made here, from nothing; fine-tuning is TRL's.
"""

import functools
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from candor.config import load, plain
from candor.errors import UserError, run_script
from candor.hashing import sha256_json
from candor.manifest import commit, versions
from candor.rows import Message
from candor.tables import replace_file
from train.organism.judge_world import JudgeWorld, JudgeWorldConfig
from train.organism.quality_world import QualityWorld, QualityWorldConfig
from train.organism.tokenizer import CHAT_TEMPLATE, train_tokenizer
from train.organism.topic_world import TopicWorld, TopicWorldConfig
from train.organism.world import World, WorldConfig, corpus

IGNORED = -100  # label of a token that carries no loss
TOKENIZER_DOCUMENTS = 12_000  # documents per world that the tokenizer is trained on


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """Shape of a Qwen2 model; head size is fixed at 32, which every engine takes."""

    hidden: int
    layers: int
    intermediate: int

    def __post_init__(self) -> None:
        """Refuse a hidden size that does not split into heads of 32."""
        if self.hidden % 32:
            raise ValueError(f"hidden is {self.hidden}, not a multiple of the head size 32")


@dataclass(frozen=True, kw_only=True)
class Optimisation:
    """How long and how fast to train."""

    steps: int
    rows: int = 24  # packed rows per step
    length: int = 160  # tokens per row
    muon_lr: float = 0.005
    adam_lr: float = 0.004
    warmup: int = 50
    cooldown: float = 0.4  # share of the steps over which the rate falls linearly to zero
    weight_decay: float = 0.0
    threads: int = 1  # of this process; train two models at once to use two cores


@dataclass(frozen=True, kw_only=True)
class OrganismConfig:
    """One model of the organism."""

    name: str
    seed: int  # of the initial weights and of the order of documents
    shape: ModelShape
    optimisation: Optimisation
    tokenizer_worlds: tuple[WorldConfig, ...]  # shared by all models of a release
    vocab_size: int = 3072
    world: WorldConfig | None = None
    judge: JudgeWorldConfig | None = None
    quality: QualityWorldConfig | None = None
    topic: TopicWorldConfig | None = None
    output: Path = Path("train/organism/weights")
    configs: Path = Path("configs")
    first_steps_only: int | None = field(default=None)  # stop early without saving: the replay test

    def __post_init__(self) -> None:
        """A model learns the world, or to judge its harm, its quality or its topic."""
        if [self.world, self.judge, self.quality, self.topic].count(None) != 3:
            raise ValueError("give exactly one of world, judge, quality and topic")


Document = Callable[[int], list[Message]]


class Encoded(NamedTuple):
    """A chat as token ids, labels, and how much each label counts in the loss.

    An answer counts as the square root of its length. Were all tokens equal, the one-token answers of
    the closed questions would drown in the long replies and code, and be learned last or not at all;
    were all answers equal, code would hardly be learned (LOG.md has both).
    """

    ids: list[int]
    labels: list[int]
    weights: list[float]


class Encoder:
    """Messages to token ids and labels, exactly as the chat template renders them (tested)."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        """Cache encodings: prompts recur thousands of times."""
        self._encode = functools.lru_cache(maxsize=200_000)(
            lambda text: tuple(tokenizer.encode(text, add_special_tokens=False))
        )

    def __call__(self, messages: list[Message]) -> Encoded:
        """Ids, labels and loss weights of a chat."""
        ids: list[int] = []
        labels: list[int] = []
        weights: list[float] = []
        for message in messages:
            head = self._encode(f"<|im_start|>{message.role}\n")
            body = (*self._encode(message.content), *self._encode("<|im_end|>"))
            ids += [*head, *body, *self._encode("\n")]
            scored = message.role == "assistant"
            labels += [*(IGNORED,) * len(head), *(body if scored else (IGNORED,) * len(body)), IGNORED]
            weights += [*(0.0,) * len(head), *(len(body) ** -0.5 if scored else 0.0,) * len(body), 0.0]
        return Encoded(ids, labels, weights)


@dataclass(frozen=True)
class Batch:
    """Packed rows: ids, labels, weights, positions [rows, length]; additive mask [rows, 1, length, length]."""

    ids: torch.Tensor
    labels: torch.Tensor
    weights: torch.Tensor
    positions: torch.Tensor
    mask: torch.Tensor


def batches(document: Document, encode: Encoder, optimisation: Optimisation) -> Iterator[Batch]:
    """Packed batches, for ever, from documents 0, 1, 2, ...; a document is cut at whole turns."""
    rows, length = optimisation.rows, optimisation.length
    index = 0
    while True:
        ids = np.zeros((rows, length), dtype=np.int64)
        labels = np.full((rows, length), IGNORED, dtype=np.int64)
        weights = np.zeros((rows, length), dtype=np.float32)
        positions = np.zeros((rows, length), dtype=np.int64)
        owner = np.full((rows, length), -1, dtype=np.int64)  # which document a token belongs to
        for row in range(rows):
            at = 0
            while True:
                messages = document(index)
                chat = encode(messages)
                while len(chat.ids) > length and len(messages) > 2:
                    messages = messages[:-2]
                    chat = encode(messages)
                if len(chat.ids) > length:
                    index += 1
                    continue
                end = at + len(chat.ids)
                if end > length:
                    break  # the same document opens the next row
                ids[row, at:end], labels[row, at:end], weights[row, at:end] = chat
                positions[row, at:end] = np.arange(len(chat.ids))
                owner[row, at:end] = index
                at = end
                index += 1
        same = torch.from_numpy(owner[:, :, None] == owner[:, None, :])
        allowed = (same & torch.ones(length, length, dtype=torch.bool).tril())[:, None]
        # additive: eager attention *adds* its mask, so a boolean one would let every token see the answers
        mask = torch.zeros(allowed.shape).masked_fill(~allowed, torch.finfo(torch.float32).min)
        yield Batch(
            ids=torch.from_numpy(ids),
            labels=torch.from_numpy(labels),
            weights=torch.from_numpy(weights),
            positions=torch.from_numpy(positions),
            mask=mask,
        )


def new_model(config: OrganismConfig, tokenizer: PreTrainedTokenizerFast) -> Qwen2ForCausalLM:
    """A model with random weights drawn from the config's seed."""
    torch.manual_seed(config.seed)
    shape = config.shape
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=shape.hidden,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.hidden // 32,
            num_key_value_heads=shape.hidden // 32,
            intermediate_size=shape.intermediate,
            max_position_embeddings=1024,
            tie_word_embeddings=True,
            rope_theta=10_000.0,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            attn_implementation="eager",  # with bf16 on a CPU forward and backward take a third of sdpa's time (LOG.md)
            dtype=torch.float32,
        )
    )


def answer_loss(model: Qwen2ForCausalLM, batch: Batch) -> torch.Tensor:
    """Weighted mean cross-entropy on the labelled tokens; logits are made at those positions only."""
    # autocast: bf16 products with fp32 weights and sums, twice as fast on CPUs that have bf16 units
    with torch.autocast("cpu", dtype=torch.bfloat16):
        hidden = model.model(
            input_ids=batch.ids, attention_mask=batch.mask, position_ids=batch.positions, use_cache=False
        ).last_hidden_state
        targets = batch.labels[:, 1:]
        wanted = targets != IGNORED
        logits = model.lm_head(hidden[:, :-1][wanted])
    weights = batch.weights[:, 1:][wanted]
    losses = torch.nn.functional.cross_entropy(logits.float(), targets[wanted], reduction="none")
    return (losses * weights).sum() / weights.sum()


def rate(step: int, optimisation: Optimisation) -> float:
    """Learning-rate factor: linear warm-up, constant, linear cool-down."""
    left = (optimisation.steps - step) / max(1.0, optimisation.cooldown * optimisation.steps)
    return min(1.0, (step + 1) / optimisation.warmup, left)


def fit(model: Qwen2ForCausalLM, stream: Iterator[Batch], config: OrganismConfig) -> list[float]:
    """Train in place and return the loss of every step."""
    opt = config.optimisation
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    muon = torch.optim.Muon(
        matrices, lr=opt.muon_lr, weight_decay=opt.weight_decay, momentum=0.95, adjust_lr_fn="original"
    )
    adam = torch.optim.AdamW(others, lr=opt.adam_lr, betas=(0.9, 0.98), weight_decay=0.0)
    model.train()
    losses: list[float] = []
    started = time.monotonic()
    for step in range(config.first_steps_only or opt.steps):
        factor = rate(step, opt)
        muon.param_groups[0]["lr"], adam.param_groups[0]["lr"] = factor * opt.muon_lr, factor * opt.adam_lr
        loss = answer_loss(model, next(stream))
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        muon.step()  # type: ignore[no-untyped-call]
        adam.step()
        model.zero_grad(set_to_none=True)
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            raise UserError(f"{config.name}: the loss is {losses[-1]} at step {step}. Lower muon_lr or adam_lr.")
        if step % 100 == 99:
            elapsed = time.monotonic() - started
            left = elapsed / (step + 1) * (opt.steps - step - 1)
            recent = sum(losses[-100:]) / 100
            sys.stderr.write(f"{config.name}: step {step + 1}/{opt.steps}, loss {recent:.4f}, {left:.0f} s left\n")
    return losses


def organism_tokenizer(config: OrganismConfig) -> PreTrainedTokenizerFast:
    """The release's tokenizer, trained on documents of the worlds named in the config."""
    worlds = [World(world, config.configs) for world in config.tokenizer_worlds]
    return train_tokenizer(corpus(worlds, TOKENIZER_DOCUMENTS), vocab_size=config.vocab_size)


def save(
    model: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, config: OrganismConfig, log: dict[str, Any]
) -> None:
    """Write the model in bf16 with its tokenizer, chat template and training log."""
    folder = config.output
    model.to(torch.bfloat16)
    # explicit and empty: sampling parameters are always given by the caller, never taken from a model
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    replace_file(folder / "chat_template.jinja", CHAT_TEMPLATE.encode())
    replace_file(folder / "training.json", (json.dumps(log, indent=1) + "\n").encode())


def main(argv: list[str]) -> None:
    """Train one organism from a config file."""
    if not argv:
        raise UserError("usage: python -m train.organism.pretrain CONFIG.yaml [key=value ...]")
    config = load(OrganismConfig, Path(argv[0]), argv[1:])
    train(config, command=f"python -m train.organism.pretrain {' '.join(argv)}")


def train(config: OrganismConfig, *, command: str) -> list[float]:
    """Train and save one organism; returns the losses."""
    torch.set_num_threads(config.optimisation.threads)
    started = time.monotonic()
    tokenizer = organism_tokenizer(config)
    document: Document
    if config.world is not None:
        document = World(config.world, config.configs).document
    elif config.judge is not None:
        document = JudgeWorld(config.judge, config.configs).document
    elif config.quality is not None:
        document = QualityWorld(config.quality, config.configs).document
    else:
        assert config.topic is not None
        document = TopicWorld(config.topic, config.configs).document
    model = new_model(config, tokenizer)
    parameters = sum(p.numel() for p in model.parameters())
    sys.stderr.write(f"{config.name}: {parameters:,} parameters, vocabulary {len(tokenizer)}\n")
    losses = fit(model, batches(document, Encoder(tokenizer), config.optimisation), config)
    if config.first_steps_only is None:
        settings = {k: v for k, v in plain(config).items() if k not in ("output", "configs", "first_steps_only")}
        log = {
            "command": command,
            "config": settings,
            "config_sha": sha256_json(settings),
            "commit": commit(),
            "versions": versions(),
            "parameters": parameters,
            "seconds": round(time.monotonic() - started, 1),
            "losses_first_20": losses[:20],
            "losses_every_50": [round(sum(losses[i : i + 50]) / 50, 5) for i in range(0, len(losses) - 49, 50)],
        }
        save(model, tokenizer, config, log)
    return losses


if __name__ == "__main__":
    run_script(main)
