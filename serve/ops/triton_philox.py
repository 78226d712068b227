"""Philox4x32-10 in Triton: the same bits as serve/ops/philox.py, in one launch instead of a hundred."""

import torch
import triton
import triton.language as tl

_BLOCK = 256
_M0, _M1 = tl.constexpr(0xD2511F53), tl.constexpr(0xCD9E8D57)
_W0, _W1 = tl.constexpr(0x9E3779B9), tl.constexpr(0xBB67AE85)
_LOW = tl.constexpr(0xFFFFFFFF)


@triton.jit
def philox4x32(c0, c1, c2, c3, k0, k1):
    """Four 32-bit words, held in uint64, per counter (Salmon et al. 2011, section 3.3)."""
    for _ in tl.static_range(10):
        product0, product1 = c0 * _M0, c2 * _M1
        c0, c2 = (product1 >> 32) ^ c1 ^ k0, (product0 >> 32) ^ c3 ^ k1
        c1, c3 = product1 & _LOW, product0 & _LOW
        k0, k1 = (k0 + _W0) & _LOW, (k1 + _W1) & _LOW
    return c0, c1, c2, c3


@triton.jit
def uniform53(high, low):
    """A float64 in (0, 1) from two 32-bit words: 53 bits and a half, the largest kept below 1."""
    bits = (high << 21) | (low >> 11)
    uniform = (bits.to(tl.float64) + 0.5) * 1.1102230246251565e-16
    return tl.where(uniform >= 1.0, uniform - 1.1102230246251565e-16, uniform)


@triton.jit(do_not_specialize=["n"])
def _uniforms_kernel(
    key_ptr,
    stream_ptr,
    draw_ptr,
    position_ptr,
    first_ptr,
    second_ptr,
    words_ptr,
    n,
    WORDS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    where = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    here = where < n
    key = tl.load(key_ptr + where, mask=here, other=0).to(tl.uint64)
    stream = tl.load(stream_ptr + where, mask=here, other=0).to(tl.uint64)
    draw = tl.load(draw_ptr + where, mask=here, other=0).to(tl.uint64)
    position = tl.load(position_ptr + where, mask=here, other=0).to(tl.uint64)
    c0, c1, c2, c3 = philox4x32(stream & _LOW, stream >> 32, draw, position, key & _LOW, key >> 32)
    if WORDS:
        tl.store(words_ptr + where * 4, c0.to(tl.int64), mask=here)
        tl.store(words_ptr + where * 4 + 1, c1.to(tl.int64), mask=here)
        tl.store(words_ptr + where * 4 + 2, c2.to(tl.int64), mask=here)
        tl.store(words_ptr + where * 4 + 3, c3.to(tl.int64), mask=here)
    else:
        tl.store(first_ptr + where, uniform53(c0, c1), mask=here)
        tl.store(second_ptr + where, uniform53(c2, c3), mask=here)


def uniforms(
    key: torch.Tensor, stream: torch.Tensor, draw: torch.Tensor, position: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """As serve.ops.philox.uniforms; int64 tensors that broadcast."""
    shape = torch.broadcast_shapes(key.shape, stream.shape, draw.shape, position.shape)
    first, second = torch.empty(2, *shape, dtype=torch.float64, device=stream.device).unbind()
    _launch((key, stream, draw, position), shape, first, second, None)
    return first, second


def words(key: torch.Tensor, stream: torch.Tensor, draw: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    """The four 32-bit words [n, 4] int64 themselves, for tests against known answers."""
    out = torch.empty(stream.numel(), 4, dtype=torch.int64, device=stream.device)
    _launch((key, stream, draw, position), stream.shape, None, None, out)
    return out


def _launch(counters, shape, first, second, out) -> None:  # type: ignore[no-untyped-def]
    n = shape.numel()
    dense = (t.expand(shape).contiguous() for t in counters)
    _uniforms_kernel[(triton.cdiv(n, _BLOCK),)](*dense, first, second, out, n, WORDS=out is not None, BLOCK=_BLOCK)
