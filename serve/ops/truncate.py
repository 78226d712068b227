"""Draw after top-k, top-p and min-p: exact, from the few tiles that can hold what is kept.

Every filter keeps a beginning of the order (logit descending, token id ascending), so a row's kept set is
a number of tokens. The sketch says which tiles can hold them: a token at least as large as the largest
maximum among unopened tiles, tau, lies in an opened one, and all tokens above tau are therefore known.
Tiles are opened in decreasing maximum until the set is settled within the tokens above tau; a row for
which neither a first helping nor eight times as many suffice is looked at as a whole. So logits are read
once for the sketch and at most once more, not counting the tiles opened in vain: a quarter of a row at most at
a vocabulary of 152k. The kernels open a first helping only (serve/ops/triton_truncate.py).

What is kept is decided on exact float64 masses of single tokens. The sketch's float32 sums enter only
as the normaliser of top-p without top-k, and only when the decision is the same over their whole error;
otherwise the row is looked at as a whole. ``certified`` is False where even float64 leaves the boundary
within its own rounding error.

Of hidden states, the logits are those of the product that looks at tiles again: what the sketch's product
differs from it by is measured on the opened tiles, and counts as an error of tau and of the sketch's sums.

Orders: ``vllm`` is min-p, top-k, top-p; ``hf`` is top-k, top-p, min-p, as in Hugging Face.
"""

from typing import get_args

import torch

from serve.ops.backends import choose
from serve.ops.checks import check_uniforms, per_row
from serve.ops.draw import draw, find
from serve.ops.filters import EXACT_ERROR, MARGIN, OPENED, SKETCH_ERROR, Filters, Order, Truncated
from serve.ops.sketch import Sketch


def make_filters(
    sketch: Sketch,
    *,
    top_k: int | torch.Tensor | None = None,
    top_p: float | torch.Tensor = 1.0,
    min_p: float | torch.Tensor = 0.0,
    order: Order = "vllm",
) -> Filters:
    """Checked filters for the rows of a sketch."""
    if order not in get_args(Order):
        raise ValueError(f"order is {order!r}; it must be one of {', '.join(get_args(Order))}.")
    rows, vocab, device = sketch.n_rows, sketch.source.vocab, sketch.source.device
    k = per_row(
        "top_k",
        vocab if top_k is None else top_k,
        rows,
        rule="it must be at least 1, or None for no limit",
        low=1,
        dtype=torch.int64,
        device=device,
    )
    p = per_row(
        "top_p", top_p, rows, rule="it must be above 0 and at most 1", low=0.0, high=1.0, open_low=True, device=device
    )
    m = per_row("min_p", min_p, rows, rule="it must be from 0 to 1", low=0.0, high=1.0, device=device)
    valid = vocab if sketch.source.rules.n_valid is None else sketch.source.rules.n_valid
    return Filters(k.masked_fill(k >= valid, vocab), p, m, order)  # as many as there are: no limit


def truncated_draw(
    sketch: Sketch,
    uniforms: torch.Tensor,
    *,
    top_k: int | torch.Tensor | None = None,
    top_p: float | torch.Tensor = 1.0,
    min_p: float | torch.Tensor = 0.0,
    order: Order = "vllm",
    backend: str | None = None,
) -> Truncated:
    """Tokens for uniforms [rows, n] in (0, 1) from what the filters leave of each row.

    The inverse CDF runs in token order over what is kept, so that filters that cut nothing change no token.
    Each filter is one number or [rows]. Greedy rows keep one token.
    """
    rows, device = sketch.n_rows, sketch.source.device
    check_uniforms(uniforms, rows, device)
    filters = make_filters(sketch, top_k=top_k, top_p=top_p, min_p=min_p, order=order)
    if choose("finish", device=device, rows=rows, backend=backend, dtype=sketch.source.dtype) == "triton":
        from serve.ops import triton_truncate

        return triton_truncate.truncated_draw(sketch, uniforms, filters)
    return _truncated_draw(sketch, uniforms, filters)


def _truncated_draw(sketch: Sketch, uniforms: torch.Tensor, filters: Filters) -> Truncated:
    top_k = filters.top_k.masked_fill(sketch.greedy, 1)
    filters = Filters(top_k, filters.top_p, filters.min_p, filters.order)
    off = (filters.top_k >= sketch.source.vocab) & (filters.top_p >= 1) & (filters.min_p <= 0)
    out = Truncated(
        tokens=torch.empty(uniforms.shape, dtype=torch.int64, device=uniforms.device),
        logprobs=torch.empty_like(uniforms),
        kept_logprobs=torch.empty_like(uniforms),
        raw_logprobs=None if sketch.raw_total is None else torch.empty_like(uniforms),
        n_kept=torch.full_like(filters.top_k, sketch.source.vocab),
        certified=torch.ones_like(off),
    )
    if bool(off.any()):
        plain = draw(sketch, uniforms)
        out.tokens.copy_(plain.tokens)
        out.logprobs.copy_(plain.logprobs)
        out.kept_logprobs.copy_(plain.logprobs)
        if out.raw_logprobs is not None and plain.raw_logprobs is not None:
            out.raw_logprobs.copy_(plain.raw_logprobs)
    waiting = (~off).nonzero().flatten()
    n_tiles = sketch.maxima.shape[1]
    first = max(1, OPENED // sketch.tile)
    for opened in sorted({min(n, n_tiles) for n in (first, 8 * first, n_tiles)}):
        if len(waiting) == 0:
            break
        waiting = _settle(sketch, uniforms, filters, waiting, opened, out)
    assert len(waiting) == 0, waiting
    out.certified.logical_and_(~sketch.broken())
    return out


def _settle(
    sketch: Sketch, uniforms: torch.Tensor, filters: Filters, waiting: torch.Tensor, opened: int, out: Truncated
) -> torch.Tensor:
    """Draw for those of the rows ``waiting`` that ``opened`` tiles settle; the rows that are left."""
    left = []
    step = max(1, (1 << 22) // (opened * sketch.tile))
    for rows in torch.split(waiting, step):
        values, ids, tau, slack = _open(sketch, rows, opened)
        best, ranking = values.sort(dim=1, descending=True, stable=True)
        n_kept, settled, certified = _count_kept(sketch, filters.rows(rows), rows, best, tau, slack)
        done = rows[settled]
        if len(done):
            ranks = torch.arange(values.shape[1], device=rows.device)
            kept = torch.empty_like(values, dtype=torch.bool).scatter_(1, ranking, ranks < n_kept[:, None])
            _draw_kept(sketch, uniforms[done], done, values[settled], ids[settled], kept[settled], out)
            out.n_kept[done] = n_kept[settled]
            out.certified[done] = certified[settled]
        left.append(rows[~settled])
    return torch.cat(left)


def _open(
    sketch: Sketch, rows: torch.Tensor, opened: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Values [rows, m] of the opened tiles in token order, their ids, tau [rows] and slack [rows].

    tau is the largest an unopened value can be: the largest unopened maximum, and for a head what the product
    made here may give above that of the sketch, which is ``slack``.
    """
    maxima = sketch.maxima[rows]
    if opened == maxima.shape[1]:
        tiles = torch.arange(opened, device=rows.device).expand(len(rows), -1)
        tau = torch.full((len(rows),), float("-inf"), dtype=torch.float64, device=rows.device)
    else:
        best = maxima.topk(opened + 1, dim=1)
        tiles = best.indices[:, :opened].sort(dim=1).values
        tau = best.values[:, opened].double()
    owners = rows[:, None].expand_as(tiles).reshape(-1)
    values = sketch.source.tiles(owners, tiles.reshape(-1), sketch.tile).view(len(rows), -1)
    slack = torch.zeros_like(tau)
    if sketch.source.recomputes and opened < maxima.shape[1]:
        seen = values.view(len(rows), opened, sketch.tile).amax(dim=2).double()
        expected = maxima.gather(1, tiles).double()
        slack = MARGIN * (seen - expected).masked_fill(seen == expected, 0.0).abs().amax(dim=1)  # -inf less -inf is NaN
        tau = tau + slack
    ids = (tiles[:, :, None] * sketch.tile + torch.arange(sketch.tile, device=rows.device)).view(len(rows), -1)
    return values, ids, tau, slack


def _count_kept(
    sketch: Sketch, filters: Filters, rows: torch.Tensor, best: torch.Tensor, tau: torch.Tensor, slack: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """How many of ``best`` [rows, m], best first, are kept [rows], whether that is settled, and beyond rounding."""
    best = best.double()
    # Weights are relative to the sketch's maximum, min-p to the largest value seen here: a head's values come
    # from a second product, whose rounding may put its maximum below that of the first.
    scale, peak, top = sketch.inv_temp[rows, None], sketch.row_max[rows, None], best[:, :1]
    below = (best - peak) * scale
    known = ((best > tau[:, None]) & (best > float("-inf"))).sum(dim=1)  # all of these are the row's best
    whole = tau == float("-inf")
    before = torch.nn.functional.pad(below.exp().cumsum(dim=1), (1, 0))  # [rows, m + 1] mass before each rank

    floor = torch.where(filters.min_p > 0, filters.min_p.log(), -torch.inf)[:, None]
    n_min_p = torch.minimum(((best - top) * scale >= floor).sum(dim=1), known)
    min_p_known = whole | ((tau[:, None] - top) * scale < floor)[:, 0]
    n_top_k = torch.minimum(filters.top_k, known)
    top_k_known = whole | (filters.top_k <= known)

    # A token above tau that fails min-p proves that all below fail; so one of the two being known is enough.
    either_known = min_p_known | top_k_known
    if filters.order == "vllm":
        n_first, first_known = torch.minimum(n_top_k, n_min_p), either_known
        open_ended = (filters.top_k >= sketch.source.vocab) & (filters.min_p <= 0)
    else:
        n_first, first_known = n_top_k, top_k_known
        open_ended = filters.top_k >= sketch.source.vocab
    by_sketch = open_ended & ~whole  # the normaliser of top-p is that of the whole row
    mass = torch.where(by_sketch, sketch.total[rows], before.gather(1, n_first[:, None])[:, 0])
    error = torch.where(by_sketch, SKETCH_ERROR + slack * scale[:, 0], EXACT_ERROR)  # float64, or 1 + error is 1
    limit = (filters.top_p * mass)[:, None]
    room = torch.arange(best.shape[1], device=rows.device) < n_first[:, None]

    def cut(at: torch.Tensor) -> torch.Tensor:
        return ((before[:, :-1] < at) & room).sum(dim=1)

    low, n_top_p, high = cut(limit * (1 - error[:, None])), cut(limit), cut(limit * (1 + error[:, None]))
    # top-p ends within what is known when the mass known reaches the limit, whatever comes after
    reached = before.gather(1, known[:, None])[:, 0] >= limit[:, 0] * (1 + error)
    top_p_known = torch.where(by_sketch, reached & (low == high), first_known)
    has_p = filters.top_p < 1
    n = torch.minimum(torch.where(has_p, n_top_p, n_first), n_min_p).clamp(min=1)  # 0 only in broken rows
    return n, torch.where(has_p, top_p_known, either_known), ~has_p | (low == high)


def _draw_kept(
    sketch: Sketch,
    uniforms: torch.Tensor,
    rows: torch.Tensor,
    values: torch.Tensor,
    ids: torch.Tensor,
    kept: torch.Tensor,
    out: Truncated,
) -> None:
    """Invert the CDF over those of the values [rows, m] that are ``kept``, in token order."""
    below = values.double() - sketch.row_max[rows, None]
    scale = sketch.inv_temp[rows, None]
    edges = (below * scale).exp().masked_fill_(~kept, 0.0).cumsum(dim=1)
    place, _ = find(edges, uniforms)
    out.tokens[rows] = ids.gather(1, place).clamp_(max=sketch.source.vocab - 1)  # NaN finds the last column
    chosen = below.gather(1, place)
    out.logprobs[rows] = chosen * scale - sketch.total[rows, None].log()
    out.kept_logprobs[rows] = chosen * scale - edges[:, -1:].log()
    if out.raw_logprobs is not None and sketch.raw_total is not None:
        out.raw_logprobs[rows] = chosen - sketch.raw_total[rows, None].log()
