"""The sketch in Triton: from logits in memory, from cuBLAS chunk by chunk, or inside the matrix product.

Same algorithm and same results up to float32 rounding as serve/ops/sketch.py. A row's numbers do not
depend on the other rows: tiles are summed by one program each, in one order, and the product runs
over the hidden size in steps of a fixed size.
"""

import torch
import triton
import triton.language as tl

from serve.ops.sources import HeadSource, LogitsSource
from serve.ops.tiles import Tiles
from serve.ops.triton_tiles import penalise, processors, rule_args

_VALUES = 4096  # logits per program: 32 registers a thread
_ROWS, _DEPTH = 64, 64  # of the product's blocks; its third side is the tile
_CHUNK_BYTES = 30 << 20  # logits of a chunk, so that they are read back from the L2 cache


@triton.jit
def _store_tiles(x, row, tile, there, scale, maxima_ptr, sums_ptr, moments_ptr, raw_ptr, n_tiles, AXIS: tl.constexpr):
    """Sum up values x along AXIS = 1; ``row`` and ``tile`` say whose they are, ``scale`` is per first index."""
    peak = tl.max(x, axis=AXIS)
    base = tl.where(peak == float("-inf"), 0.0, peak)
    below = x - tl.expand_dims(base, 1)
    weights = tl.exp(below * scale)
    where = row * n_tiles + tile
    tl.store(maxima_ptr + where, peak, mask=there)
    tl.store(sums_ptr + where, tl.sum(weights, axis=AXIS), mask=there)
    if moments_ptr is not None:
        tl.store(moments_ptr + where, tl.sum(tl.where(weights == 0.0, 0.0, below) * weights, axis=AXIS), mask=there)
    if raw_ptr is not None:
        tl.store(raw_ptr + where, tl.sum(tl.exp(below), axis=AXIS), mask=there)


@triton.jit
def _logits_kernel(
    logits_ptr, row_stride, scale_ptr, maxima_ptr, sums_ptr, moments_ptr, raw_ptr, n_tiles, first_tile, first_id, width,
    seen_ptr, repetition_ptr, presence_ptr, allow_ptr, n_words, n_valid,
    TILES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Tiles of one row of logits [rows, width] whose first column is the token ``first_id``."""
    row = tl.program_id(0).to(tl.int64)  # rows x vocab passes 2^31 at ordinary batch sizes
    tiles = tl.program_id(1) * TILES + tl.arange(0, TILES)
    columns = tiles[:, None] * TILE + tl.arange(0, TILE)[None, :]
    x = tl.load(logits_ptr + row * row_stride + columns, mask=columns < width, other=float("-inf")).to(tl.float32)
    x = penalise(x, first_id + columns, row, seen_ptr, repetition_ptr, presence_ptr, allow_ptr, n_words, n_valid)
    scale = tl.load(scale_ptr + row).to(tl.float32)
    there = tiles * TILE < width
    _store_tiles(x, row, first_tile + tiles, there, scale, maxima_ptr, sums_ptr, moments_ptr, raw_ptr, n_tiles, AXIS=1)


@triton.jit
def _head_kernel(
    hidden_ptr, hidden_stride, weight_ptr, weight_stride, scale_ptr, maxima_ptr, sums_ptr, moments_ptr, raw_ptr,
    n_tiles, n_rows, d, vocab,
    seen_ptr, repetition_ptr, presence_ptr, allow_ptr, n_words, n_valid,
    WIDEN: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Logits of a block of rows and one tile, summed up while they are on chip.

    Programs walk over the blocks of rows first, so that a tile of the matrix is read from memory once.
    """
    n_blocks = tl.cdiv(n_rows, ROWS)
    for block in range(tl.program_id(0), n_blocks * n_tiles, tl.num_programs(0)):
        rows = (block % n_blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        tile = block // n_blocks
        ids = tile.to(tl.int64) * TILE + tl.arange(0, TILE)
        total = tl.zeros((ROWS, TILE), dtype=tl.float32)
        for start in range(0, d, DEPTH):
            inner = start + tl.arange(0, DEPTH)
            h_mask = (rows < n_rows)[:, None] & (inner < d)[None, :]
            w_mask = (ids < vocab)[None, :] & (inner < d)[:, None]
            h = tl.load(hidden_ptr + rows[:, None] * hidden_stride + inner[None, :], mask=h_mask, other=0.0)
            w = tl.load(weight_ptr + ids[None, :] * weight_stride + inner[:, None], mask=w_mask, other=0.0)
            if WIDEN:  # the interpreter gets products of bfloat16 wrong
                h, w = h.to(tl.float32), w.to(tl.float32)
            total = tl.dot(h, w, total, input_precision="ieee")
        owner = tl.minimum(rows, n_rows - 1)
        x = penalise(
            total, ids[None, :], owner[:, None], seen_ptr, repetition_ptr, presence_ptr, allow_ptr, n_words, n_valid
        )
        scale = tl.load(scale_ptr + owner).to(tl.float32)[:, None]
        _store_tiles(x, rows, tile, rows < n_rows, scale, maxima_ptr, sums_ptr, moments_ptr, raw_ptr, n_tiles, AXIS=1)


@triton.jit
def _finish_kernel(
    scale_ptr, maxima_ptr, sums_ptr, moments_ptr, raw_ptr, row_max_ptr, edges_ptr, total_ptr, raw_total_ptr,
    entropy_ptr, n_tiles, TILES: tl.constexpr,
):  # fmt: skip
    """From tiles to one row, in float64."""
    row = tl.program_id(0).to(tl.int64)
    tiles = tl.arange(0, TILES)
    there = tiles < n_tiles
    where = row * n_tiles + tiles
    maxima = tl.load(maxima_ptr + where, mask=there, other=float("-inf"))
    sums = tl.load(sums_ptr + where, mask=there, other=0.0).to(tl.float64)
    scale = tl.load(scale_ptr + row)
    row_max = tl.max(maxima, axis=0).to(tl.float64)
    below = maxima.to(tl.float64) - row_max
    lift = tl.where(there, tl.exp(below * scale), 0.0)
    edges = tl.cumsum(sums * lift, axis=0)
    total = tl.max(tl.where(there, edges, 0.0), axis=0)
    bad = tl.sum((edges != edges).to(tl.int32), axis=0) > 0  # a maximum may pass over NaN
    total = tl.where(bad, float("nan"), total)
    tl.store(row_max_ptr + row, row_max)
    tl.store(edges_ptr + where, edges, mask=there)
    tl.store(total_ptr + row, total)
    if raw_ptr is not None:
        raw = tl.load(raw_ptr + where, mask=there, other=0.0).to(tl.float64)
        tl.store(raw_total_ptr + row, tl.sum(tl.where(there, raw * tl.exp(below), 0.0), axis=0))
    if moments_ptr is not None:
        moments = tl.load(moments_ptr + where, mask=there, other=0.0).to(tl.float64)
        moments = lift * (moments + tl.where(lift == 0.0, 0.0, below) * sums)
        tl.store(entropy_ptr + row, tl.log(total) - scale * tl.sum(moments, axis=0) / total)


def fill(tiles: Tiles, source: LogitsSource | HeadSource, scale: torch.Tensor, tile: int, backend: str) -> None:
    """Sum up every tile of a source."""
    if tile < 16 or tile & (tile - 1):
        raise ValueError(f"tile is {tile}; for the Triton kernels it must be a power of two of at least 16.")
    if isinstance(source, LogitsSource):
        _fill_logits(tiles, source.logits, 0, source, scale, tile)
    elif backend == "triton":
        _fill_head(tiles, source, scale, tile)
    else:
        columns = max(tile, _CHUNK_BYTES // (4 * source.n_rows) // tile * tile)
        for first in range(0, source.vocab, columns):
            chunk = source.columns(slice(first, min(first + columns, source.vocab)))
            _fill_logits(tiles, chunk, first, source, scale, tile)


def _fill_logits(
    tiles: Tiles, logits: torch.Tensor, first: int, source: LogitsSource | HeadSource, scale: torch.Tensor, tile: int
) -> None:
    """Sum up logits [rows, columns] whose first column is the token ``first``."""
    rows, width = logits.shape
    per_program = max(1, _VALUES // tile)
    grid = (rows, triton.cdiv(triton.cdiv(width, tile), per_program))
    _logits_kernel[grid](
        logits, logits.stride(0), scale, *_parts(tiles), tiles.maxima.shape[1], first // tile, first, width,
        *rule_args(source.rules, source.vocab), TILES=per_program, TILE=tile,
    )  # fmt: skip


def _fill_head(tiles: Tiles, source: HeadSource, scale: torch.Tensor, tile: int) -> None:
    n_tiles = tiles.maxima.shape[1]
    blocks = triton.cdiv(source.n_rows, _ROWS) * n_tiles
    _head_kernel[(min(blocks, processors(source.device)),)](
        source.hidden, source.hidden.stride(0), source.weight, source.weight.stride(0), scale, *_parts(tiles),
        n_tiles, source.n_rows, source.width, source.vocab, *rule_args(source.rules, source.vocab),
        WIDEN=triton.knobs.runtime.interpret, ROWS=_ROWS, TILE=tile, DEPTH=_DEPTH,
    )  # fmt: skip


def finish(
    tiles: Tiles, scale: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """row_max [rows], edges [rows, tiles], total [rows], raw_total, entropy (serve.ops.sketch.Sketch)."""
    rows, n_tiles = tiles.maxima.shape
    edges = torch.empty(rows, n_tiles, dtype=torch.float64, device=scale.device)
    row_max, total, raw_total, entropy = torch.empty(4, rows, dtype=torch.float64, device=scale.device).unbind()
    padded = triton.next_power_of_2(n_tiles)
    _finish_kernel[(rows,)](scale, *_parts(tiles), row_max, edges, total, raw_total, entropy, n_tiles, TILES=padded)
    return (
        row_max,
        edges,
        total,
        None if tiles.raw_sums is None else raw_total,
        None if tiles.moments is None else entropy,
    )


def _parts(tiles: Tiles) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    return tiles.maxima, tiles.sums, tiles.moments, tiles.raw_sums
