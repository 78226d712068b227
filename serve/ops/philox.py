"""Counter-based random numbers: Philox4x32-10, the same bits in numpy, torch and Triton.

A draw's random numbers must depend on (study seed, variant, prompt, draw, position) and on nothing
else: not on the batch, the order of work or a restart. A counter-based generator gives that without
any state: the key is the study and the variant, the counter is (stream of the prompt, draw,
position), and one call turns them into 128 random bits.

Salmon, Moraes, Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", SC 2011. The test holds
the known-answer vectors of the authors' Random123.
"""

import numpy as np
import torch
from numpy.typing import NDArray

from serve.ops.backends import choose

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = 0xFFFFFFFF
_ROUNDS = 10
# (x + 0.5) / 2^53 rounds to 1 for the largest x; an inverse CDF needs a number below 1.
_BELOW_ONE = 1.0 - 2.0**-53

Words = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
UInts = NDArray[np.uint64]


def split64(value: int) -> tuple[int, int]:
    """Low and high 32-bit word of a 64-bit integer."""
    return _unsigned(value, 64, "key") & _LOW, value >> 32


def signed64(value: int) -> int:
    """The int64 with the same bits as an unsigned 64-bit integer; torch has no unsigned arithmetic."""
    return value - 2**64 if _unsigned(value, 64, "key or stream") >= 2**63 else value


def _unsigned(value: int, bits: int, name: str) -> int:
    """The number itself; ValueError when it has more bits or a sign."""
    if not 0 <= value < 2**bits:
        raise ValueError(f"{name} is {value}; it must be from 0 to 2^{bits} - 1.")
    return value


def philox_torch(counter: Words, key: tuple[int, int] | tuple[torch.Tensor, torch.Tensor]) -> Words:
    """Four 32-bit words (held in int64) per counter; tensors broadcast.

    A product of two 32-bit words wraps in int64, but only modulo 2^64: its bits are right, and
    masking after the arithmetic shift gives the high word.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c2 = ((product1 >> 32) & _LOW) ^ c1 ^ k0, ((product0 >> 32) & _LOW) ^ c3 ^ k1
        c1, c3 = product1 & _LOW, product0 & _LOW
        k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
    return c0, c1, c2, c3


def philox_numpy(counter: tuple[UInts, UInts, UInts, UInts], key: tuple[int, int]) -> tuple[UInts, UInts, UInts, UInts]:
    """The same as ``philox_torch`` on uint64 arrays that hold 32-bit words."""
    low, shift = np.uint64(_LOW), np.uint64(32)
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        product0, product1 = c0 * np.uint64(_MULTIPLIERS[0]), c2 * np.uint64(_MULTIPLIERS[1])
        c0, c2 = (product1 >> shift) ^ c1 ^ np.uint64(k0), (product0 >> shift) ^ c3 ^ np.uint64(k1)
        c1, c3 = product1 & low, product0 & low
        k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
    return c0, c1, c2, c3


def uniforms(
    key: int | torch.Tensor, stream: torch.Tensor, draw: torch.Tensor, position: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Two float64 uniforms in (0, 1), of 53 bits each, per (stream, draw, position); tensors broadcast.

    ``key`` is one key, or a tensor of them; a tensor holds int64 with the bits of the unsigned key, as
    ``stream`` does of the unsigned stream (``signed64``). draw and position are from 0 to 2^32 - 1.
    """
    keys = torch.tensor(signed64(key), device=stream.device) if isinstance(key, int) else key
    for name, value in (("key", keys), ("stream", stream), ("draw", draw), ("position", position)):
        if value.dtype != torch.int64 or value.device != stream.device:
            raise ValueError(
                f"{name} is {value.dtype} on {value.device}; it must be torch.int64 on {stream.device}, as stream is."
            )
    if stream.device.type == "cpu":
        for name, value in (("draw", draw), ("position", position)):
            for end in torch.aminmax(value) if value.numel() else ():
                _unsigned(int(end), 32, name)
    if choose("finish", device=stream.device, rows=stream.numel()) == "triton":
        from serve.ops import triton_philox

        return triton_philox.uniforms(keys, stream, draw, position)
    halves: tuple[int, int] | tuple[torch.Tensor, torch.Tensor]
    halves = split64(key) if isinstance(key, int) else (keys & _LOW, (keys >> 32) & _LOW)
    zero = torch.zeros_like(stream)
    words = philox_torch((stream & _LOW, (stream >> 32) & _LOW, draw + zero, position + zero), halves)
    return _uniform(words[0], words[1]), _uniform(words[2], words[3])


def _uniform(high: torch.Tensor, low: torch.Tensor) -> torch.Tensor:
    bits = (high << 21) | (low >> 11)
    return ((bits.to(torch.float64) + 0.5) * 2.0**-53).clamp_(max=_BELOW_ONE)


def uniforms_numpy(
    key: int, stream: UInts, draw: UInts, position: UInts
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The same as ``uniforms`` on uint64 arrays; ``stream`` is the unsigned stream itself."""
    zero = np.zeros_like(stream)
    low, shift = np.uint64(_LOW), np.uint64(32)
    words = philox_numpy((stream & low, stream >> shift, draw + zero, position + zero), split64(key))
    pairs = ((words[0], words[1]), (words[2], words[3]))
    first, second = (
        np.minimum((((a << np.uint64(21)) | (b >> np.uint64(11))).astype(np.float64) + 0.5) * 2.0**-53, _BELOW_ONE)
        for a, b in pairs
    )
    return first, second
