"""What one variant takes while it answers: memory of the device and of the host, time at best, and disk.

Bytes on the device, with w bytes a weight, P parameters, V x H the head, and K numbers a token keeps
in the cache:

    weights     w P, and in bf16 the head once more in float32 (serve/loading.py)
    cache       w K batch_tokens
    logits      4 x 512 MiB: a step's logits in float32 and what is made of them (serve/torch_engine.py)

With vLLM the cache must hold one context at least and takes what is left; a step's logits are those of
max_sequences rows. Weights and cache are divided by the GPUs that share the model, logits are not.

On the host an adapter is merged in float32, and PEFT's copy of the model, which every variant is held
against before it answers, takes 4 P (serve/attest.py): beside the engine's own weights where these
stay on the host, after them where they have gone to a GPU. Answers lie on disk twice, in the store and in the tables.
"""

from dataclasses import dataclass

from serve.config import Ask, EngineConfig, VllmConfig
from train.footprint import Shape

_WIDTH = {"float32": 4, "bfloat16": 2, "float64": 8}
_LOGITS = 1 << 27  # numbers of a step, as serve/torch_engine.py cuts its groups
# Bytes on disk, as tests/evaluate/test_preflight.py holds against written tables: of a reply without its text, of a
# token of text, of a distribution without its options, of one option.
_REPLY, _TOKEN, _DISTRIBUTION, _OPTION = 64, 4.5, 96, 12


@dataclass(frozen=True, slots=True)
class Asked:
    """The prompts of one format."""

    prompts: int
    mean_tokens: float
    mean_options: float = 0.0


def sharing(engine: EngineConfig) -> int:
    """GPUs that share one model."""
    return engine.vllm.tensor_parallel if engine.vllm is not None else 1


def serving_bytes(shape: Shape, engine: EngineConfig) -> dict[str, int]:
    """Memory of one device, by part."""
    width = _WIDTH[engine.dtype]
    weights = width * shape.parameters + _wide_head(shape, engine)
    cached, logits = engine.batch_tokens, _LOGITS
    if engine.name == "vllm":
        vllm = engine.vllm or VllmConfig()
        cached, logits = vllm.context or shape.context, vllm.max_sequences * shape.vocabulary
    return {
        "weights": weights // sharing(engine),
        "cache": width * shape.cache * cached // sharing(engine),
        "logits": 4 * 4 * logits,
    }


def _wide_head(shape: Shape, engine: EngineConfig) -> int:
    """Bytes that the head takes more than its share of the weights: in bf16 it is computed in float32."""
    if engine.dtype != "bfloat16":
        return 0
    return 4 * shape.head - (0 if shape.tied else _WIDTH[engine.dtype] * shape.head)


def host_bytes(shape: Shape, engine: EngineConfig, *, attested: bool) -> int:
    """Memory of the host while a model is loaded, and ``attested``: held against PEFT's, as variants are."""
    own = _WIDTH[engine.dtype] * shape.parameters + _wide_head(shape, engine)
    reference = 4 * shape.parameters if attested else 0
    return own + reference if engine.device == "cpu" else max(own, reference)


def stored_bytes(ask: Ask, asked: Asked) -> int:
    """Bytes on disk of the answers to one format: a bound, every reply as long as it may be."""
    row = _DISTRIBUTION + _OPTION * asked.mean_options
    if ask.mode == "sampled":
        row = ask.n * (_REPLY + _TOKEN * ask.max_tokens)
    return int(2 * asked.prompts * row)


def serving_seconds(
    shape: Shape, engine: EngineConfig, ask: Ask, asked: Asked, *, flops: float, bandwidth: float
) -> float:
    """Seconds to ask one format, at ``flops`` and ``bandwidth`` (bytes) a second of each GPU: a floor without start-up.

    Reading costs two operations a parameter and token; each step of writing reads the weights once.
    A closed question is taken to cost three reads: its prompt, and the tree of its answers.
    """
    flops, bandwidth = flops * sharing(engine), bandwidth * sharing(engine)
    work = 2.0 * (shape.parameters - (0 if shape.tied else shape.head))
    reading = work * asked.prompts * asked.mean_tokens / flops
    if ask.mode == "exact":
        return 3 * reading
    width = _WIDTH[engine.dtype]
    most = max(1, _LOGITS // shape.vocabulary)
    together = max(1, min(most, int(engine.batch_tokens // (asked.mean_tokens + ask.max_tokens))))
    groups = -(-asked.prompts * ask.n // together)
    step = max(width * shape.parameters / bandwidth, work * together / flops)
    return reading + groups * ask.max_tokens * step
