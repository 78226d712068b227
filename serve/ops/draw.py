"""Draw tokens from a sketch: exact inverse CDF, one 53-bit uniform a draw, any number of draws a row.

Why not ``torch.multinomial``: its random numbers come from a global stream, so a reply would depend
on the batch it was made in, and float32 noise cannot reach the tail. Here a uniform in float64 is
compared with the cumulative weights of the tiles, and what is left of it with the cumulative weights
inside the chosen tile: as exact as one long sum, in token order, and only one tile is looked at again.

One uniform serves both steps, so that a token does not depend on how wide the tiles are.
"""

from dataclasses import dataclass

import torch

from serve.ops.backends import choose
from serve.ops.checks import check_uniforms
from serve.ops.sketch import Sketch

_AT_A_TIME = 1 << 17  # looked-up values at a time: what stays in a core's cache


@dataclass(frozen=True, slots=True)
class Drawn:
    """Draws [rows, n]."""

    tokens: torch.Tensor  # int64
    logprobs: torch.Tensor  # float64, nats, of the law drawn from; of temperature 1 in greedy rows
    raw_logprobs: torch.Tensor | None  # float64, at temperature 1; None when the sketch has no raw sums


def draw(sketch: Sketch, uniforms: torch.Tensor, *, backend: str | None = None) -> Drawn:
    """Tokens for uniforms [rows, n] in (0, 1), float64.

    Each draw depends on its row and its uniform alone. A greedy row takes its largest logit, the
    lowest id on ties. Ruled-out tokens are never drawn.
    """
    rows, device = sketch.n_rows, sketch.source.device
    check_uniforms(uniforms, rows, device)
    if choose("finish", device=device, rows=rows, backend=backend, dtype=sketch.source.dtype) == "triton":
        from serve.ops import triton_draw

        tokens, values = triton_draw.draw(sketch, uniforms)
    else:
        tokens, values = _draw(sketch, uniforms)
    below = values.double() - sketch.row_max[:, None]
    logprobs = below * sketch.inv_temp[:, None] - sketch.total.log()[:, None]
    raw = None if sketch.raw_total is None else below - sketch.raw_total.log()[:, None]
    return Drawn(tokens, logprobs, raw)


def _draw(sketch: Sketch, uniforms: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and their penalised logits, each [rows, n]."""
    rows, n = uniforms.shape
    tiles, inside = find(sketch.edges, uniforms)
    if sketch.any_greedy:
        tiles = torch.where(sketch.greedy[:, None], sketch.maxima.argmax(dim=1, keepdim=True), tiles)
    owners = torch.arange(rows, device=tiles.device)[:, None].expand(rows, n).reshape(-1)
    flat_tiles, flat_inside = tiles.reshape(-1), inside.reshape(-1)
    if sketch.source.recomputes and n > 1:  # many draws fall into one tile, and looking at it costs a product
        pairs, place = torch.unique(owners * sketch.edges.shape[1] + flat_tiles, return_inverse=True)
        looked = sketch.source.tiles(pairs // sketch.edges.shape[1], pairs % sketch.edges.shape[1], sketch.tile)
    else:
        looked, place = None, None
    tokens = torch.empty(rows * n, dtype=torch.int64, device=tiles.device)
    last = sketch.source.vocab - 1
    values = torch.empty(rows * n, dtype=sketch.source.dtype, device=tiles.device)
    step = max(1, _AT_A_TIME // sketch.tile)
    for first in range(0, rows * n, step):
        part = slice(first, first + step)
        if looked is None or place is None:
            seen = sketch.source.tiles(owners[part], flat_tiles[part], sketch.tile)
        else:
            seen = looked[place[part]]
        offsets = _choose_inside(sketch, owners[part], seen, flat_inside[part])
        # in a broken row NaN is searched to the last tile's end, which may lie beyond the vocabulary
        tokens[part] = (flat_tiles[part] * sketch.tile + offsets).clamp_(max=last)
        values[part] = seen.gather(1, offsets[:, None]).squeeze(1)
    return tokens.view(rows, n), values.view(rows, n)


def _choose_inside(sketch: Sketch, rows: torch.Tensor, values: torch.Tensor, inside: torch.Tensor) -> torch.Tensor:
    """Column [n] within tiles of values [n, tile], at the share ``inside`` [n] of the tile's weight."""
    below = values - values.amax(dim=1, keepdim=True)
    if not sketch.plain:
        below = below * sketch.inv_temp[rows, None].to(below.dtype)
    edges = below.exp_().cumsum(dim=1, dtype=torch.float64)
    offsets, _ = find(edges, inside[:, None])
    if sketch.any_greedy:
        offsets = torch.where(sketch.greedy[rows, None], values.argmax(dim=1, keepdim=True), offsets)
    return offsets.squeeze(1)


def find(edges: torch.Tensor, shares: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Invert cumulative weights ``edges`` [rows, m] at ``shares`` [rows, n] of their total.

    Returns the index [rows, n] of the first edge above the share, and what share of that entry's own
    weight lies below, in [0, 1]. Entries of weight zero are never found, also where rounding takes a
    share to the last edge.
    """
    total = edges[:, -1:].contiguous()
    target = shares * total
    found = torch.searchsorted(edges, target, right=True)
    last = torch.searchsorted(edges, total)  # the last entry with any weight
    found = torch.minimum(found, last).clamp_(max=edges.shape[1] - 1)  # NaN would be searched beyond the end
    above = edges.gather(1, found)
    left = edges.gather(1, (found - 1).clamp(min=0)).masked_fill(found == 0, 0.0)
    return found, ((target - left) / (above - left)).clamp(0.0, 1.0)
