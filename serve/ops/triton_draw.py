"""Draws in Triton: find the tile of each uniform, look at it again, find the token. See serve/ops/draw.py."""

import torch
import triton
import triton.language as tl

from serve.ops.sketch import Sketch
from serve.ops.triton_tiles import tile_values

_DRAWS = 32  # draws per program: with a tile of 128, 32 values a thread


@triton.jit
def _find_kernel(
    edges_ptr, uniforms_ptr, greedy_ptr, best_ptr, tiles_ptr, inside_ptr, n_all, n_draws, n_tiles,
    STEPS: tl.constexpr, DRAWS: tl.constexpr,
):  # fmt: skip
    """The tile of each draw by bisection, and what share of the tile's weight lies below the draw."""
    which = tl.program_id(0).to(tl.int64) * DRAWS + tl.arange(0, DRAWS)
    here = which < n_all
    row = tl.minimum(which, n_all - 1) // n_draws
    edges = edges_ptr + row * n_tiles
    total = tl.load(edges + n_tiles - 1)
    target = tl.load(uniforms_ptr + which, mask=here, other=0.5) * total
    low, high = row * 0, row * 0 + n_tiles - 1
    for _ in range(STEPS):
        middle = (low + high) >> 1
        edge = tl.load(edges + middle)
        # the last edge counts as above: rounding may take the target there
        above = (edge > target) | (edge >= total)
        high = tl.where(above, middle, high)
        low = tl.where(above, low, tl.minimum(middle + 1, high))
    above = tl.load(edges + high)
    left = tl.load(edges + high - 1, mask=high > 0, other=0.0)
    inside = (target - left) / (above - left)
    tile = high
    if greedy_ptr is not None:
        tile = tl.where(tl.load(greedy_ptr + row) != 0, tl.load(best_ptr + row), tile)
    tl.store(tiles_ptr + which, tile, mask=here)
    tl.store(inside_ptr + which, tl.minimum(tl.maximum(inside, 0.0), 1.0), mask=here)


@triton.jit
def _pick_kernel(
    values_ptr, place_ptr, scale_ptr, greedy_ptr, tiles_ptr, inside_ptr, tokens_ptr, chosen_ptr, n_all, n_draws, vocab,
    DRAWS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The token of each draw inside its tile."""
    which = tl.program_id(0).to(tl.int64) * DRAWS + tl.arange(0, DRAWS)
    here = which < n_all
    row = tl.minimum(which, n_all - 1) // n_draws
    lanes = tl.arange(0, TILE)[None, :]
    slot = which
    if place_ptr is not None:
        slot = tl.load(place_ptr + which, mask=here, other=0)
    x = tl.load(values_ptr + slot[:, None] * TILE + lanes, mask=here[:, None], other=0.0)
    peak = tl.max(x, axis=1)[:, None]
    weights = tl.exp((x - peak) * tl.load(scale_ptr + row).to(tl.float32)[:, None])
    edges = tl.cumsum(weights.to(tl.float64), axis=1)
    total = tl.max(edges, axis=1)
    target = tl.load(inside_ptr + which, mask=here, other=0.5) * total
    # the first of any weight whose edge passes the target; a sum in parallel need not rise at every step
    found = (weights > 0.0) & ((edges > target[:, None]) | (edges >= total[:, None]))
    offset = tl.min(tl.where(found, lanes, TILE), axis=1)
    if greedy_ptr is not None:
        first = tl.min(tl.where(x == peak, lanes, TILE), axis=1)
        offset = tl.where(tl.load(greedy_ptr + row) != 0, first, offset)
    offset = tl.minimum(offset, TILE - 1)
    tile = tl.load(tiles_ptr + which, mask=here, other=0)
    # NaN finds the last tile's end, which may lie beyond the vocabulary
    tl.store(tokens_ptr + which, tl.minimum(tile * TILE + offset, vocab - 1), mask=here)
    tl.store(chosen_ptr + which, tl.sum(tl.where(lanes == offset[:, None], x, 0.0), axis=1), mask=here)


def draw(sketch: Sketch, uniforms: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and their penalised logits, each [rows, n]."""
    rows, n = uniforms.shape
    n_tiles = sketch.maxima.shape[1]
    device = uniforms.device
    tiles = torch.empty(rows, n, dtype=torch.int64, device=device)
    inside = torch.empty(rows, n, dtype=torch.float64, device=device)
    greedy = best = None
    if sketch.any_greedy:
        greedy, best = sketch.greedy.to(torch.int8), sketch.maxima.argmax(dim=1)
    grid = (triton.cdiv(rows * n, _DRAWS),)
    _find_kernel[grid](
        sketch.edges, uniforms.contiguous(), greedy, best, tiles, inside, rows * n, n, n_tiles,
        STEPS=n_tiles.bit_length(), DRAWS=_DRAWS,
    )  # fmt: skip
    owners = torch.arange(rows, device=device).repeat_interleave(n, output_size=rows * n)
    wanted, place = tiles.view(-1), None
    if sketch.source.recomputes and n > 1:  # many draws fall into one tile, and looking at it costs a product
        pairs, place = torch.unique(owners * n_tiles + wanted, return_inverse=True)
        owners, wanted = pairs // n_tiles, pairs % n_tiles
    values = tile_values(sketch.source, owners, wanted, sketch.tile)
    tokens = torch.empty_like(tiles)
    chosen = torch.empty(rows, n, dtype=torch.float32, device=device)
    _pick_kernel[grid](
        values, place, sketch.inv_temp, greedy, tiles, inside, tokens, chosen, rows * n, n,
        sketch.source.vocab, DRAWS=_DRAWS, TILE=sketch.tile,
    )  # fmt: skip
    return tokens, chosen
