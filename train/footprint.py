"""How large a model and its fine-tuning are: parameters, memory, steps, floating-point operations.

Parameters are not computed but counted: the model is built on torch's meta device, without weights,
and PEFT puts the adapter on it, so whatever architecture transformers knows and whatever a LoRA
section says is counted as it will be. Shapes come from a folder's config.json, or for models that
are not downloaded yet from configs/models.yaml.

Memory of one process that trains a LoRA adapter, in bytes, with P parameters of the base, A of the
adapter, T = rows (or packs) x tokens of a batch, L layers, H hidden size, I width of the MLP, V vocabulary:

    base        w P             w = 2 in bf16, 4 in float32
                nf4: 0.516 a parameter in the layers' matrices, 2 elsewhere, and one matrix unpacked
    adapter     16 A            float32 weight, gradient and two moments (8-bit AdamW: 10 A)
    layers      T (2 H L + 30 H + 14 I)     each layer's input, and one layer computed anew
                T L (22 H + 10 I)           without gradient checkpointing
    loss        8 H T + w 32768 min(T, 4096)    TRL's chunked loss: one tile of logits, plus the kept inputs
                (without Triton 27 V min(T, 4096) more, V at most 32,768)

The last two do not peak together; the larger counts; in float32 both double. The coefficients of H and I were measured
(LOG.md) and tests/train/test_footprint.py holds the whole against what a training step allocates.
What a CUDA process takes for itself and loses to fragmentation is the hardware profile's affair.
"""

import functools
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from candor.config import read_yaml
from candor.errors import UserError, nearest
from train.config import LORA_RESERVED, SFT_RESERVED, check_section

MODELS = Path("configs/models.yaml")
# Bytes of text a token stands for, where there is no tokenizer to ask: English and code take 3 to 4.5 in the
# vocabularies of 100,000 tokens and more that these models have, and the small end is the safe one.
BYTES_PER_TOKEN = 3.0
TEMPLATE_TOKENS = 40  # what chat templates put around two turns, a default system line included
_TILE_TOKENS, _TILE_WIDTH = 4096, 32_768  # of TRL's chunked loss (trl/kernels/chunked_logprob.py)
# 4-bit weights; an 8-bit scale for each 64 of them; a 32-bit one for each 256 of those (double quantisation)
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)


@dataclass(frozen=True, slots=True)
class Shape:
    """What a model, and an adapter on it, is made of; counts of numbers, not bytes."""

    parameters: int  # of the base model; a tied head counts once
    matrices: int  # of them, in the layers' linear maps: what nf4 compresses
    largest: int  # in the largest of these
    head: int  # in the language-model head
    tied: bool  # whether the head is the embedding
    adapter: int  # in the adapter
    layers: int
    hidden: int
    intermediate: int
    vocabulary: int
    cache: int  # numbers a token keeps in the key-value cache, all layers together
    context: int  # tokens it takes at most


def known_models() -> dict[str, Any]:
    """The models configs/models.yaml describes, by the name of their folder."""
    found = read_yaml(MODELS)
    assert isinstance(found, dict), f"{MODELS} must map names to shapes"
    return found


def repo_of(base: Path) -> str | None:
    """The hub repository a base model that is not here can be had from."""
    found = known_models().get(base.name)
    return str(found["repo"]) if found else None


def shape_of(base: Path, lora: Mapping[str, Any] | None) -> Shape:
    """The shape of the model in ``base``, there or only known by name, with an adapter as ``lora`` describes it.

    UserError for an unknown model, and for a LoRA section that does not fit it.
    """
    config = base / "config.json"
    stamp = config.stat().st_mtime_ns if config.is_file() else None
    return _shape_of(base, None if lora is None else json.dumps(lora, sort_keys=True), stamp)


@functools.lru_cache(maxsize=64)
def _shape_of(base: Path, lora: str | None, stamp: int | None) -> Shape:
    """``shape_of``, once for each model and adapter; ``stamp`` is the date of the model's config.json."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    if stamp is not None:
        try:
            config = AutoConfig.from_pretrained(base)
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"{base / 'config.json'} cannot be read: {error}") from error
    else:
        known = known_models()
        if base.name not in known:
            raise UserError(
                f"{base} is not there, and no model of that name is known; {nearest(base.name, known)} ({MODELS}). "
                "Put its config.json into that folder, or describe it there."
            )
        config = AutoConfig.for_model(**known[base.name]["config"])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    head = model.get_output_embeddings().weight
    matrices = [m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear) and m.weight is not head]
    text = config.get_text_config(decoder=True)
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    head_size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return Shape(
        parameters=sum(p.numel() for p in model.parameters()),
        matrices=sum(matrices),
        largest=max(matrices),
        head=head.numel(),
        tied=head is model.get_input_embeddings().weight,
        adapter=_adapter(model, json.loads(lora), base) if lora is not None else 0,
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        intermediate=text.intermediate_size,
        vocabulary=head.shape[0],
        cache=2 * heads * head_size * text.num_hidden_layers,
        context=text.max_position_embeddings,
    )


def _adapter(model: Any, lora: Mapping[str, Any], base: Path) -> int:
    """Parameters of the adapter PEFT would put on the model."""
    from peft import LoraConfig, get_peft_model

    try:
        wrapped = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **lora), low_cpu_mem_usage=True)
    except (ValueError, TypeError) as error:
        raise UserError(f"the section 'lora' does not fit {base.name}: {error}") from error
    return sum(p.numel() for p in wrapped.parameters() if p.requires_grad)


def check_recipe(lora: Mapping[str, Any], sft: Mapping[str, Any]) -> None:
    """UserError for a key of either section that its library does not know or that is not the user's to set."""
    from peft import LoraConfig
    from trl import SFTConfig

    check_section("lora", lora, LoraConfig, LORA_RESERVED)
    check_section("sft", sft, SFTConfig, SFT_RESERVED)


@dataclass(frozen=True, slots=True)
class Load:
    """One stage's work."""

    rows: int
    mean_tokens: float  # of a row, template included
    longest_tokens: int
    batch: int  # rows a step of one process looks at together
    accumulate: int
    epochs: float
    max_steps: int | None  # ends earlier, or goes on longer, than the epochs say
    checkpointing: bool
    eight_bit_adam: bool
    quantize: str | None  # "nf4" or None
    packed: int | None = None  # rows are laid end to end in packs of at most this many tokens; None: each is padded

    @property
    def examples(self) -> int:
        """What a batch is made of: rows, or as few packs as hold them (the packer comes close)."""
        return self.rows if self.packed is None else math.ceil(self.rows * self.mean_tokens / self.packed)

    @property
    def longest_example(self) -> int:
        """Tokens of the longest row, or of a full pack."""
        return self.packed or self.longest_tokens

    @property
    def steps(self) -> int:
        """Updates of the weights, counted as the Trainer does."""
        if self.max_steps:
            return self.max_steps
        return math.ceil(self.epochs * math.ceil(math.ceil(self.examples / self.batch) / self.accumulate))

    @property
    def tokens(self) -> float:
        """Tokens the model sees in all, padding left out."""
        if self.max_steps:
            return self.max_steps * self.batch * self.accumulate * self.rows * self.mean_tokens / self.examples
        return self.epochs * self.rows * self.mean_tokens


def load_of(sft: Mapping[str, Any], *, rows: int, mean_bytes: float, longest_bytes: int, quantize: str | None) -> Load:
    """A stage's work from its section ``sft`` and the size of its rows; what is not said there is TRL's default."""
    steps = sft.get("max_steps", -1)
    return Load(
        rows=rows,
        mean_tokens=mean_bytes / BYTES_PER_TOKEN + TEMPLATE_TOKENS,
        longest_tokens=math.ceil(longest_bytes / BYTES_PER_TOKEN) + TEMPLATE_TOKENS,
        batch=int(sft.get("per_device_train_batch_size", 8)),
        accumulate=int(sft.get("gradient_accumulation_steps", 1)),
        epochs=float(sft.get("num_train_epochs", 3)),
        max_steps=int(steps) if steps and steps > 0 else None,
        checkpointing=bool(sft.get("gradient_checkpointing", True)),
        eight_bit_adam="8bit" in str(sft.get("optim", "")),
        quantize=quantize,
        packed=_pack(sft) if sft.get("packing") else None,
    )


def _pack(sft: Mapping[str, Any]) -> int:
    """Tokens of a pack; UserError where none is said, as the trainer would say it later."""
    length = sft.get("max_length")
    if not isinstance(length, int) or length < 1:
        raise UserError(f"sft.packing needs sft.max_length, the tokens of a pack; found {length!r}.")
    return length


def training_bytes(shape: Shape, load: Load, *, width: int = 2, triton: bool = True) -> dict[str, int]:
    """Peak memory of one training process, by part (see above), with ``width`` bytes a weight of the base.

    A bound: it takes every row of the largest batch to be as long as the longest, and every pack to be full.
    ``triton``: whether TRL has it for the loss, as on GPUs.
    """
    T = load.batch * load.longest_example
    base = float(width * shape.parameters)
    if load.quantize == "nf4":
        base = 2 * (shape.parameters - shape.matrices) + NF4_BYTES * shape.matrices + 2 * shape.largest
    kept = width * T * shape.hidden * shape.layers
    if load.checkpointing:
        layers = kept + T * (30 * shape.hidden + 14 * shape.intermediate) * width // 2
    else:
        kept = layers = T * shape.layers * (22 * shape.hidden + 10 * shape.intermediate) * width // 2
    return {
        "base": int(base),
        "adapter": (10 if load.eight_bit_adam else 16) * shape.adapter,
        "activations": max(layers, kept + loss_bytes(shape, T, width=width, triton=triton)),
    }


def loss_bytes(shape: Shape, tokens: int, *, width: int, triton: bool) -> int:
    """Peak memory of the loss over ``tokens``; without Triton a tile has float32 companions."""
    n = min(tokens, _TILE_TOKENS)
    tile = width * n * _TILE_WIDTH
    if not triton:
        tile += 27 * n * min(shape.vocabulary, _TILE_WIDTH)
    return 8 * tokens * shape.hidden + tile


def training_flops(shape: Shape, load: Load) -> float:
    """Floating-point operations of a stage: two a parameter and token forward, two back, two for what is computed anew.

    The base's own gradient is never made, which saves the third pair.
    """
    passes = 3 if load.checkpointing else 2
    return 2.0 * passes * (shape.parameters - (0 if shape.tied else shape.head)) * load.tokens
