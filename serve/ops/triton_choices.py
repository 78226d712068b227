"""Choices in Triton: values of listed tokens, and counts of draws from a few options. See serve/ops/choices.py."""

import torch
import triton
import triton.language as tl

from serve.ops.triton_tiles import values_at

__all__ = ["choice_draw", "values_at"]

_BLOCK = 64  # draws compared with the options at a time


@triton.jit
def _counts_kernel(
    logprobs_ptr, uniforms_ptr, counts_ptr, n_options, n_draws, OPTIONS: tl.constexpr, BLOCK: tl.constexpr
):
    """Counts of one row: a draw falls to the first option whose cumulative probability is above it."""
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, OPTIONS)
    logprobs = tl.load(logprobs_ptr + row * n_options + lanes, mask=lanes < n_options, other=float("-inf"))
    edges = tl.cumsum(tl.exp(logprobs), axis=0)
    counts = tl.zeros((OPTIONS,), dtype=tl.int64)
    for start in range(0, n_draws, BLOCK):
        draws = start + tl.arange(0, BLOCK)
        uniforms = tl.load(uniforms_ptr + row * n_draws + draws, mask=draws < n_draws, other=0.0)
        at_least = (uniforms[:, None] >= edges[None, :]) & (lanes < n_options)[None, :]
        places = tl.sum(at_least.to(tl.int32), axis=1)
        hits = (places[:, None] == lanes[None, :]) & (draws < n_draws)[:, None]
        counts += tl.sum(hits.to(tl.int64), axis=0)
    tl.store(counts_ptr + row * (n_options + 1) + lanes, counts, mask=lanes <= n_options)


def choice_draw(logprobs: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """Counts [rows, k + 1] (serve.ops.choices.choice_draw)."""
    rows, k = logprobs.shape
    counts = torch.empty(rows, k + 1, dtype=torch.int64, device=logprobs.device)
    options = max(16, triton.next_power_of_2(k + 1))
    _counts_kernel[(rows,)](
        logprobs.contiguous(), uniforms.contiguous(), counts, k, uniforms.shape[1], OPTIONS=options, BLOCK=_BLOCK
    )
    return counts
