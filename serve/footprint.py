"""What one variant takes while it answers on the torch engine: memory of the device and of the host, and time at best.

Bytes on the device, with w bytes a weight, P parameters, V x H the head, and K numbers a token keeps
in the cache:

    weights     w P, and in bf16 the head once more in float32 (serve/loading.py)
    cache       w K batch_tokens
    logits      4 x 512 MiB: a step's logits in float32 and what is made of them (serve/torch_engine.py)

An adapter is merged in float32 on the host, which takes 4 P there while the variant is loaded.
"""

from dataclasses import dataclass

from serve.config import Ask, EngineConfig
from train.footprint import Shape

_WIDTH = {"float32": 4, "bfloat16": 2, "float64": 8}
_LOGITS = 1 << 27  # numbers of a step, as serve/torch_engine.py cuts its groups


@dataclass(frozen=True, slots=True)
class Asked:
    """The prompts of one format."""

    prompts: int
    mean_tokens: float


def serving_bytes(shape: Shape, engine: EngineConfig) -> dict[str, int]:
    """Memory of the device, by part."""
    width = _WIDTH[engine.dtype]
    head = (4 * shape.head - (0 if shape.tied else width * shape.head)) if engine.dtype == "bfloat16" else 0
    return {
        "weights": width * shape.parameters + head,
        "cache": width * shape.cache * engine.batch_tokens,
        "logits": 4 * 4 * _LOGITS,
    }


def host_bytes(shape: Shape, engine: EngineConfig, *, adapter: bool) -> int:
    """Memory of the host while a variant is loaded."""
    return (4 if adapter else _WIDTH[engine.dtype]) * shape.parameters


def serving_seconds(
    shape: Shape, engine: EngineConfig, ask: Ask, asked: Asked, *, flops: float, bandwidth: float
) -> float:
    """Seconds to ask one format, at ``flops`` and ``bandwidth`` (bytes) a second: a floor, start-up left out.

    Reading costs two operations a parameter and token; each step of writing reads the weights once.
    A closed question is taken to cost three reads: its prompt, and the tree of its answers.
    """
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
