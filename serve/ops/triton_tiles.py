"""Look at single tiles or tokens again, in Triton: from logits in memory, or by small products.

A product here is summed over the hidden size in one fixed order by one program per tile, so a value
does not depend on the batch it is asked in.
"""

import torch
import triton
import triton.language as tl

from serve.ops.rules import Rules
from serve.ops.sources import HeadSource, LogitsSource, Source

_VALUES = 4096  # values copied per program
_DEPTH = 128  # of the hidden size, per step of a product


@triton.jit
def penalise(x, ids, row, seen_ptr, repetition_ptr, presence_ptr, allow_ptr, n_words, n_valid):
    """Penalised values of tokens ``ids`` of one row or of a column of rows (serve.ops.rules)."""
    if seen_ptr is not None:
        word = tl.load(seen_ptr + row * n_words + tl.minimum(ids // 32, n_words - 1))
        penalty = tl.load(repetition_ptr + row)
        changed = tl.where(x > 0, x / penalty, x * penalty) - tl.load(presence_ptr + row)
        x = tl.where(((word >> (ids % 32)) & 1) != 0, changed, x)
    if allow_ptr is not None:
        word = tl.load(allow_ptr + row * n_words + tl.minimum(ids // 32, n_words - 1))
        x = tl.where(((word >> (ids % 32)) & 1) != 0, x, float("-inf"))
    return tl.where(ids < n_valid, x, float("-inf"))


@triton.jit
def _logits_kernel(
    logits_ptr, row_stride, rows_ptr, tiles_ptr, out_ptr, n_all,
    seen_ptr, repetition_ptr, presence_ptr, allow_ptr, n_words, n_valid,
    TILES: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    which = tl.program_id(0).to(tl.int64) * TILES + tl.arange(0, TILES)
    here = (which < n_all)[:, None]
    row = tl.load(rows_ptr + which, mask=which < n_all, other=0)[:, None]
    tile = tl.load(tiles_ptr + which, mask=which < n_all, other=0)[:, None]
    ids = tile * TILE + tl.arange(0, TILE)[None, :]
    mask = here & (ids < n_valid)
    x = tl.load(logits_ptr + row * row_stride + ids, mask=mask, other=float("-inf")).to(tl.float32)
    x = penalise(x, ids, row, seen_ptr, repetition_ptr, presence_ptr, allow_ptr, n_words, n_valid)
    tl.store(out_ptr + which[:, None] * TILE + tl.arange(0, TILE)[None, :], x, mask=here)


@triton.jit
def _head_kernel(
    hidden_ptr, hidden_stride, weight_ptr, weight_stride, rows_ptr, ids_ptr, out_ptr, n_ids, d,
    seen_ptr, repetition_ptr, presence_ptr, allow_ptr, n_words, n_valid,
    TILES: tl.constexpr, WIDTH: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Values of WIDTH tokens of one row: a tile named by its number, or tokens listed one by one."""
    which = tl.program_id(0).to(tl.int64)
    row = tl.load(rows_ptr + which)
    lanes = tl.arange(0, WIDTH)
    if TILES:
        ids = tl.load(ids_ptr + which) * WIDTH + lanes
        there = ids < n_valid
    else:
        there = lanes < n_ids
        ids = tl.load(ids_ptr + which * n_ids + lanes, mask=there, other=0)
    total = tl.zeros((WIDTH,), dtype=tl.float32)
    for start in range(0, d, DEPTH):
        inner = start + tl.arange(0, DEPTH)
        h = tl.load(hidden_ptr + row * hidden_stride + inner, mask=inner < d, other=0.0).to(tl.float32)
        mask = there[:, None] & (inner < d)[None, :]
        w = tl.load(weight_ptr + ids[:, None] * weight_stride + inner[None, :], mask=mask, other=0.0).to(tl.float32)
        total += tl.sum(w * h[None, :], axis=1)
    x = penalise(total, ids, row, seen_ptr, repetition_ptr, presence_ptr, allow_ptr, n_words, n_valid)
    if TILES:
        tl.store(out_ptr + which * WIDTH + lanes, x)
    else:
        tl.store(out_ptr + which * n_ids + lanes, x, mask=there)


def processors(device: torch.device) -> int:
    """How many programs that take up a processor each run at once; some in the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8


def rule_args(rules: Rules, vocab: int) -> tuple[torch.Tensor | int | None, ...]:
    """What ``penalise`` takes after the row."""
    mask = rules.seen if rules.seen is not None else rules.allow
    tensors = [
        None if t is None else t.contiguous() for t in (rules.seen, rules.repetition, rules.presence, rules.allow)
    ]
    return *tensors, 0 if mask is None else mask.shape[1], vocab if rules.n_valid is None else rules.n_valid


def tile_values(source: Source, rows: torch.Tensor, tiles: torch.Tensor, tile: int) -> torch.Tensor:
    """Penalised values [n, tile] float32 (Source.tiles)."""
    out = torch.empty(len(rows), tile, dtype=torch.float32, device=source.device)
    rules = rule_args(source.rules, source.vocab)
    if isinstance(source, LogitsSource):
        logits = source.logits
        per_program = max(1, _VALUES // tile)
        _logits_kernel[(triton.cdiv(len(rows), per_program),)](
            logits, logits.stride(0), rows, tiles, out, len(rows), *rules, TILES=per_program, TILE=tile
        )
    else:
        assert isinstance(source, HeadSource)
        _head(source, rows, tiles, out, 0, rules, TILES=True, WIDTH=tile)
    return out


def values_at(source: Source, ids: torch.Tensor) -> torch.Tensor:
    """Penalised values [rows, k] float32 of the tokens ``ids`` [rows, k]; ids below 0 give anything."""
    if isinstance(source, LogitsSource):
        return source.at(ids.clamp(min=0))
    assert isinstance(source, HeadSource)
    rows = torch.arange(source.n_rows, device=source.device)
    out = torch.empty(ids.shape, dtype=torch.float32, device=source.device)
    width = max(16, triton.next_power_of_2(ids.shape[1]))
    listed = ids.clamp(min=0).contiguous()
    _head(source, rows, listed, out, ids.shape[1], rule_args(source.rules, source.vocab), TILES=False, WIDTH=width)
    return out


def _head(source, rows, ids, out, n_ids, rules, **sizes) -> None:  # type: ignore[no-untyped-def]
    _head_kernel[(len(rows),)](
        source.hidden, source.hidden.stride(0), source.weight, source.weight.stride(0),
        rows, ids, out, n_ids, source.width, *rules, DEPTH=_DEPTH, **sizes,
    )  # fmt: skip
