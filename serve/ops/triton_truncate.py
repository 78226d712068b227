"""Truncated draws in Triton: choose tiles, settle the kept set among their values, draw. See serve/ops/truncate.py.

There is no sort. Numbers become integers in the same order, and the integer at which a count or a
mass is reached is found by bisection, bit by bit, on values that stay in registers. A row that the
opened tiles do not settle is bisected over its logits in memory, or in the L2 cache when few rows are.
"""

import torch
import triton
import triton.language as tl

from serve.ops.filters import EXACT_ERROR, MARGIN, OPENED, SKETCH_ERROR, Filters, Truncated
from serve.ops.rules import NO_RULES, Rules
from serve.ops.sketch import Sketch
from serve.ops.sources import LogitsSource
from serve.ops.triton_draw import draw
from serve.ops.triton_tiles import penalise, rule_args, tile_values

_BLOCK = 4096  # columns per step over a row in memory
_LOWEST, _HIGHEST = tl.constexpr(-(2**31)), tl.constexpr(2**31 - 1)
_STEPS = tl.constexpr(32)
_SKETCH_ERROR, _EXACT_ERROR = tl.constexpr(SKETCH_ERROR), tl.constexpr(EXACT_ERROR)


@triton.jit
def _key(x):
    """Integers in the order of the float32 numbers x; 0 and -0 are one number."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64)


@triton.jit
def _open_kernel(maxima_ptr, tiles_ptr, tau_ptr, n_tiles, opened, TILES: tl.constexpr):
    """The ``opened`` tiles of largest maximum in token order (lower tile first on ties), and the next maximum."""
    row = tl.program_id(0).to(tl.int64)
    tiles = tl.arange(0, TILES)
    there = tiles < n_tiles
    maxima = tl.load(maxima_ptr + row * n_tiles + tiles, mask=there, other=float("-inf"))
    key = tl.where(there, _key(maxima), _LOWEST)
    low, high = row * 0 + _LOWEST, row * 0 + _HIGHEST
    for _ in range(_STEPS):  # the largest key that ``opened`` tiles reach
        middle = (low + high + 1) >> 1
        enough = tl.sum((key >= middle).to(tl.int32), axis=0) >= opened
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle - 1)
    above, tie = key > low, (key == low) & there
    rank = tl.cumsum(tie.to(tl.int32), axis=0) - 1
    chosen = above | (tie & (rank < opened - tl.sum(above.to(tl.int32), axis=0)))
    place = tl.cumsum(chosen.to(tl.int32), axis=0) - 1
    tl.store(tiles_ptr + row * opened + place, tiles.to(tl.int64), mask=chosen)
    tl.store(tau_ptr + row, tl.max(tl.where(there & (~chosen), maxima, float("-inf")), axis=0))


@triton.jit
def _tally(x, key, bound, peak, scale):
    """How many of the values have a key of at least ``bound``, and their weight."""
    at_least = (key >= bound) & (x > float("-inf"))
    weights = tl.where(at_least, tl.exp((x.to(tl.float64) - peak) * scale), 0.0)
    return tl.sum(at_least.to(tl.int64), axis=0), tl.sum(weights, axis=0)


@triton.jit
def _tally_row(logits_ptr, row, bound, peak, scale, rules, vocab, BLOCK: tl.constexpr):
    """The same over a row in memory."""
    count = row * 0
    mass = peak * 0.0
    for start in range(0, vocab, BLOCK):
        x = _row_values(logits_ptr, row, start, rules, vocab, BLOCK)
        n, w = _tally(x, _key(x), bound, peak, scale)
        count += n
        mass += w
    return count, mass


@triton.jit
def _row_values(logits_ptr, row, start, rules, vocab, BLOCK: tl.constexpr):
    ids = start + tl.arange(0, BLOCK)
    x = tl.load(logits_ptr + ids, mask=ids < vocab, other=float("-inf")).to(tl.float32)
    return penalise(x, ids, row, rules[0], rules[1], rules[2], rules[3], rules[4], rules[5])


@triton.jit
def _row_top(logits_ptr, row, rules, vocab, BLOCK: tl.constexpr):
    """The largest value of a row in memory."""
    top = tl.full((), float("-inf"), tl.float32)
    for start in range(0, vocab, BLOCK):
        top = tl.maximum(top, tl.max(_row_values(logits_ptr, row, start, rules, vocab, BLOCK), axis=0))
    return top


@triton.jit
def _count_or_mass(x, logits_ptr, row, bound, peak, scale, rules, vocab, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    if WIDE:
        count, mass = _tally_row(logits_ptr, row, bound, peak, scale, rules, vocab, BLOCK)
    else:
        count, mass = _tally(x, _key(x), bound, peak, scale)
    return count, mass


@triton.jit
def _reach(x, logits_ptr, row, n, limit, peak, scale, rules, vocab, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    """The largest key at which n values or the weight ``limit`` are reached; count and weight above it."""
    low, high = row * 0 + _LOWEST, row * 0 + _HIGHEST
    for _ in range(_STEPS):
        middle = (low + high + 1) >> 1
        count, mass = _count_or_mass(x, logits_ptr, row, middle, peak, scale, rules, vocab, WIDE, BLOCK)
        enough = (count >= n) | (mass >= limit)
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle - 1)
    count, mass = _count_or_mass(x, logits_ptr, row, low + 1, peak, scale, rules, vocab, WIDE, BLOCK)
    return low, count, mass


@triton.jit
def _weight_of(key, peak, scale):
    """The weight of the number with this key."""
    bits = tl.where(key < 0, key ^ 0x7FFFFFFF, key).to(tl.int32)
    x = bits.to(tl.float32, bitcast=True)
    return tl.where(key <= _LOWEST + 0x7FFFFF, 0.0, tl.exp((x.to(tl.float64) - peak) * scale))


@triton.jit
def _settle_kernel(
    values_ptr, logits_ptr, row_stride, tiles_ptr, tau_ptr, slack_ptr, row_max_ptr, scale_ptr, total_ptr, greedy_ptr,
    top_k_ptr, top_p_ptr, min_p_ptr, uniforms_ptr,
    settled_ptr, n_kept_ptr, certified_ptr, tokens_ptr, chosen_ptr, mass_ptr, n_draws, opened,
    seen_ptr, repetition_ptr, presence_ptr, allow_ptr, n_words, n_valid, vocab,
    WIDE: tl.constexpr, VLLM: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row: how many tokens are kept, whether what is seen settles that, and the draws if it does.

    Narrow, x holds the values of the opened tiles; WIDE, every value is read again from memory.
    """
    row = tl.program_id(0).to(tl.int64)
    if tl.load(settled_ptr + row) == 0:
        rules = (seen_ptr, repetition_ptr, presence_ptr, allow_ptr, n_words, n_valid)
        peak, scale = tl.load(row_max_ptr + row), tl.load(scale_ptr + row)
        top_p, min_p = tl.load(top_p_ptr + row), tl.load(min_p_ptr + row)
        top_k = tl.where(tl.load(greedy_ptr + row) != 0, 1, tl.load(top_k_ptr + row))
        if WIDE:
            here = logits_ptr + row * row_stride
            tau = tl.full((), float("-inf"), tl.float32)
            x = tau
        else:
            here = values_ptr + row * BLOCK
            tau = tl.load(tau_ptr + row)
            x = tl.load(here + tl.arange(0, BLOCK))
        whole = tau == float("-inf")
        known_bound = tl.where(whole, _LOWEST, _key(tau) + 1)
        known, known_mass = _count_or_mass(x, here, row, known_bound, peak, scale, rules, vocab, WIDE, BLOCK)

        # min-p keeps (x - top) * scale >= ln(min_p), evaluated in float64: the bound's key is found by bisection.
        # The top is that of the values seen here: the sketch's maximum may come from another product.
        highest = _row_top(here, row, rules, vocab, BLOCK) if WIDE else tl.max(x, axis=0)
        top = highest.to(tl.float64)
        floor = tl.where(min_p > 0.0, tl.log(min_p), float("-inf"))
        low, high = row * 0 + _LOWEST, _key(highest)
        for _ in range(_STEPS):
            middle = (low + high) >> 1
            bits = tl.where(middle < 0, middle ^ 0x7FFFFFFF, middle).to(tl.int32)
            passes = (bits.to(tl.float32, bitcast=True).to(tl.float64) - top) * scale >= floor
            high = tl.where(passes, middle, high)
            low = tl.where(passes, low, tl.minimum(middle + 1, high))
        n_min_p = known
        if min_p > 0.0:
            n_min_p, _min_p_mass = _count_or_mass(x, here, row, high, peak, scale, rules, vocab, WIDE, BLOCK)
            n_min_p = tl.minimum(n_min_p, known)
        min_p_known = whole | ((tau.to(tl.float64) - top) * scale < floor)
        n_top_k = tl.minimum(top_k, known)
        top_k_known = whole | (top_k <= known)
        either_known = min_p_known | top_k_known
        if VLLM:
            n_first, first_known = tl.minimum(n_top_k, n_min_p), either_known
            open_ended = (top_k >= vocab) & (min_p <= 0.0)
        else:
            n_first, first_known = n_top_k, top_k_known
            open_ended = top_k >= vocab

        n, settled, certified = n_first, either_known, top_p >= 1.0
        if top_p < 1.0:
            by_sketch = open_ended & (tau > float("-inf"))
            mass = tl.load(total_ptr + row)
            slack = peak * 0.0
            if slack_ptr is not None:
                slack = tl.load(slack_ptr + row).to(tl.float64)
            error = tl.where(by_sketch, _SKETCH_ERROR + slack * scale, _EXACT_ERROR).to(tl.float64)
            if not by_sketch:
                key, count, above = _reach(x, here, row, n_first, float("inf"), peak, scale, rules, vocab, WIDE, BLOCK)
                mass = above + (n_first - count).to(tl.float64) * _weight_of(key, peak, scale)
            limit = top_p * mass
            key, count, above = _reach(x, here, row, vocab + 1, limit, peak, scale, rules, vocab, WIDE, BLOCK)
            weight = _weight_of(key, peak, scale)
            # of the values with this key, which come in token order, those with less than the limit before them
            weight = tl.where(weight > 0.0, weight, 1.0)  # not reached: the row is not settled
            ties = tl.ceil((limit - above) / weight).to(tl.int64)
            ties = tl.where(above + (ties - 1).to(tl.float64) * weight >= limit, ties - 1, ties)
            ties = tl.where(above + ties.to(tl.float64) * weight < limit, ties + 1, ties)
            n = tl.minimum(count + ties, n_first)
            before_last = above + (n - 1 - count).to(tl.float64) * weight
            before_next = above + (n - count).to(tl.float64) * weight
            certified = (before_last < limit * (1.0 - error)) & (
                (n >= n_first) | (before_next >= limit * (1.0 + error))
            )
            settled = tl.where(by_sketch, (known_mass >= limit * (1.0 + error)) & certified, first_known)
        n = tl.maximum(tl.minimum(n, n_min_p), 1)  # 0 only in broken rows
        tl.store(settled_ptr + row, settled.to(tl.int8))
        if settled:
            tl.store(n_kept_ptr + row, n)
            tl.store(certified_ptr + row, certified.to(tl.int8))
            key, count, above = _reach(x, here, row, n, float("inf"), peak, scale, rules, vocab, WIDE, BLOCK)
            _draw_kept(
                x, here, row, key, n - count, peak, scale, rules, vocab, uniforms_ptr, tiles_ptr, tokens_ptr,
                chosen_ptr, mass_ptr, n_draws, opened, WIDE, TILE, BLOCK,
            )  # fmt: skip


@triton.jit
def _kept_weights(x, key, bound, ties, seen_ties, peak, scale):
    """Which values are kept, cumulative weights of those, and how many ties have been passed."""
    tie = (key == bound) & (x > float("-inf"))
    rank = seen_ties + tl.cumsum(tie.to(tl.int64), axis=0) - tie.to(tl.int64)
    kept = (key > bound) | (tie & (rank < ties))
    weights = tl.where(kept, tl.exp((x.to(tl.float64) - peak) * scale), 0.0)
    return kept, tl.cumsum(weights, axis=0), seen_ties + tl.sum(tie.to(tl.int64), axis=0)


@triton.jit
def _draw_kept(
    x, here, row, bound, ties, peak, scale, rules, vocab, uniforms_ptr, tiles_ptr, tokens_ptr, chosen_ptr, mass_ptr,
    n_draws, opened, WIDE: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Invert the CDF over what is kept, in token order."""
    lanes = tl.arange(0, BLOCK)
    if WIDE:
        total, seen_ties = peak * 0.0, row * 0
        for start in range(0, vocab, BLOCK):
            values = _row_values(here, row, start, rules, vocab, BLOCK)
            kept, edges, seen_ties = _kept_weights(values, _key(values), bound, ties, seen_ties, peak, scale)
            total += tl.max(edges, axis=0)
        for i in range(n_draws):
            target = tl.load(uniforms_ptr + row * n_draws + i) * total
            token, chosen = row * 0 + vocab, peak * 0.0
            passed, seen_ties = peak * 0.0, row * 0
            for start in range(0, vocab, BLOCK):
                values = _row_values(here, row, start, rules, vocab, BLOCK)
                kept, edges, seen_ties = _kept_weights(values, _key(values), bound, ties, seen_ties, peak, scale)
                edges += passed
                found = tl.min(tl.where(kept & ((edges > target) | (edges >= total)), lanes, BLOCK), axis=0)
                first = (found < BLOCK) & (token == vocab)
                value = tl.sum(tl.where(lanes == found, values, 0.0), axis=0).to(tl.float64)
                chosen = tl.where(first, value, chosen)
                token = tl.where(first, start + found, token)
                passed = tl.max(edges, axis=0)
            tl.store(tokens_ptr + row * n_draws + i, tl.minimum(token, vocab - 1))  # none found in broken rows
            tl.store(chosen_ptr + row * n_draws + i, chosen)
        tl.store(mass_ptr + row, total)
    else:
        kept, edges, seen_ties = _kept_weights(x, _key(x), bound, ties, row * 0, peak, scale)
        total = tl.max(edges, axis=0)
        for i in range(n_draws):
            target = tl.load(uniforms_ptr + row * n_draws + i) * total
            place = tl.sum(((edges <= target) & (edges < total)).to(tl.int32), axis=0)
            value = tl.sum(tl.where(lanes == place, x, 0.0), axis=0).to(tl.float64)
            tile = tl.load(tiles_ptr + row * opened + place // TILE)
            tl.store(tokens_ptr + row * n_draws + i, tl.minimum(tile * TILE + place % TILE, vocab - 1))
            tl.store(chosen_ptr + row * n_draws + i, value)
        tl.store(mass_ptr + row, total)


def open_tiles(maxima: torch.Tensor, opened: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tiles [rows, opened] in token order, and tau [rows] float32: the largest maximum not opened."""
    rows, n_tiles = maxima.shape
    device = maxima.device
    if opened >= n_tiles:
        tiles = torch.arange(opened, device=device).clamp(max=n_tiles).repeat(rows, 1)
        return tiles, torch.full((rows,), float("-inf"), device=device)
    tiles = torch.empty(rows, opened, dtype=torch.int64, device=device)
    tau = torch.empty(rows, dtype=torch.float32, device=device)
    _open_kernel[(rows,)](maxima, tiles, tau, n_tiles, opened, TILES=triton.next_power_of_2(n_tiles))
    return tiles, tau


def truncated_draw(sketch: Sketch, uniforms: torch.Tensor, filters: Filters) -> Truncated:
    """serve.ops.truncate.truncated_draw, for rows whose logits are float32 or narrower."""
    rows, n_draws = uniforms.shape
    device = uniforms.device
    opened = max(1, OPENED // sketch.tile)
    tiles, tau = open_tiles(sketch.maxima, opened)
    owners = torch.arange(rows, device=device).repeat_interleave(opened, output_size=rows * opened)
    values = tile_values(sketch.source, owners, tiles.view(-1), sketch.tile)
    slack = None
    if sketch.source.recomputes and opened < sketch.maxima.shape[1]:  # as in serve.ops.truncate
        seen, expected = values.view(rows, opened, sketch.tile).amax(dim=2), sketch.maxima.gather(1, tiles)
        slack = MARGIN * (seen - expected).masked_fill(seen == expected, 0.0).abs().amax(dim=1)
        tau = tau + slack
    # rows whose filters are all off are ordinary draws
    off = (filters.top_k >= sketch.source.vocab) & (filters.top_p >= 1) & (filters.min_p <= 0) & ~sketch.greedy
    plain = draw(sketch, uniforms)
    settled = off.to(torch.int8)
    n_kept = torch.full((rows,), sketch.source.vocab, dtype=torch.int64, device=device)
    certified = torch.ones(rows, dtype=torch.int8, device=device)
    tokens, chosen = plain
    chosen = chosen.double()
    mass = sketch.total.clone()
    greedy, uniforms = sketch.greedy.to(torch.int8), uniforms.contiguous()

    def settle(logits: torch.Tensor | None, rules: Rules) -> None:
        wide = logits is not None
        _settle_kernel[(rows,)](
            values, logits, logits.stride(0) if logits is not None else 0, tiles, tau, slack,
            sketch.row_max, sketch.inv_temp,
            sketch.total, greedy, filters.top_k, filters.top_p, filters.min_p, uniforms,
            settled, n_kept, certified, tokens, chosen, mass, n_draws, opened,
            *rule_args(rules, sketch.source.vocab), sketch.source.vocab,
            WIDE=wide, VLLM=filters.order == "vllm", TILE=sketch.tile, BLOCK=_BLOCK if wide else opened * sketch.tile,
        )  # fmt: skip

    settle(None, NO_RULES)  # the values of opened tiles are penalised already
    if sketch.maxima.shape[1] > opened:
        if isinstance(sketch.source, LogitsSource):
            settle(sketch.source.logits, sketch.source.rules)
        elif not bool(settled.all()):
            # The logits were never written, and asking whether they are needed makes the host wait.
            # Requests with wide nuclei are better served from logits in memory.
            settle(_every_value(sketch), NO_RULES)
    below = chosen - sketch.row_max[:, None]
    scaled = below * sketch.inv_temp[:, None]
    return Truncated(
        tokens=tokens,
        logprobs=scaled - sketch.total.log()[:, None],
        kept_logprobs=scaled - mass.log()[:, None],
        raw_logprobs=None if sketch.raw_total is None else below - sketch.raw_total.log()[:, None],
        n_kept=n_kept,
        certified=certified.bool() & ~sketch.broken(),
    )


def _every_value(sketch: Sketch) -> torch.Tensor:
    """Penalised logits [rows, columns] of a source that has to compute them."""
    rows, n_tiles = sketch.maxima.shape
    every = torch.arange(rows * n_tiles, device=sketch.maxima.device)
    return tile_values(sketch.source, every // n_tiles, every % n_tiles, sketch.tile).view(rows, -1)
