"""Truncated draws in Triton: choose tiles, settle the kept set among their values, draw. See serve/ops/truncate.py.

There is no sort. Numbers become integers in the same order, and the integer at which a count or a
mass is reached is found by bisection, bit by bit, on values that stay in registers.

A row that the opened tiles do not settle is read once more. The maxima of all tiles and a sample of its columns say
between which two keys the boundary lies, give or take three standard errors; while the row is read, what lies above
is summed block by block and what lies between is listed, and the boundary is found in the list. Where
the sample misled, or a list is too short, the row is read again between other keys: the sample costs
reads, never exactness. A draw then reads the one block it falls into.
"""

import torch
import triton
import triton.language as tl

from serve.ops.filters import EXACT_ERROR, MARGIN, OPENED, SKETCH_ERROR, Filters, Truncated
from serve.ops.rules import NO_RULES, Rules
from serve.ops.sketch import Sketch
from serve.ops.sources import LogitsSource
from serve.ops.triton_draw import draw
from serve.ops.triton_tiles import penalise, processors, rule_args, tile_values

_BLOCK = 4096  # columns per step over a row in memory
_SAMPLE = 4096  # maxima of tiles and sampled columns together, at least
_LIST = 16384  # keys that can be listed; a row's boundary is narrowed down to about so many at the first reading
_RUN = tl.constexpr(8)  # columns of the sample that lie together: what memory is read in
_LOWEST, _HIGHEST = tl.constexpr(-(2**31)), tl.constexpr(2**31 - 1)
_STEPS = tl.constexpr(32)
_SKETCH_ERROR, _EXACT_ERROR = tl.constexpr(SKETCH_ERROR), tl.constexpr(EXACT_ERROR)


@triton.jit
def _key(x):
    """Integers in the order of the float32 numbers x; 0 and -0 are one number."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def _number(key):
    """The number with this key, in float64."""
    return tl.where(key < 0, key ^ 0x7FFFFFFF, key).to(tl.int32).to(tl.float32, bitcast=True).to(tl.float64)


@triton.jit
def _weigh(x, peak, scale):
    """Keys and weights of values; what is ruled out, or NaN, has the lowest key, which nothing asks for."""
    there = x > float("-inf")
    return tl.where(there, _key(x), _LOWEST), tl.where(there, tl.exp((x.to(tl.float64) - peak) * scale), 0.0)


@triton.jit
def _weight_of(key, peak, scale):
    """Weights of the numbers with these keys."""
    return tl.where(key <= _LOWEST + 0x7FFFFF, 0.0, tl.exp((_number(key) - peak) * scale))


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
def _tally(which, weights):
    """How many values these are, and their weight."""
    return tl.sum(which.to(tl.int64), axis=0), tl.sum(tl.where(which, weights, 0.0), axis=0)


@triton.jit
def _reach(key, weights, n, limit, each=1):
    """The largest key at which n values or the weight ``limit`` are reached; count and weight above it.

    Every value counts once, or as often as ``each`` says.
    """
    low, high = tl.full((), _LOWEST, tl.int64), tl.full((), _HIGHEST, tl.int64)
    for _ in range(_STEPS):
        middle = (low + high + 1) >> 1
        there = key >= middle.to(tl.int32)
        count, mass = tl.sum(tl.where(there, each, 0), axis=0), tl.sum(tl.where(there, weights, 0.0), axis=0)
        enough = (count >= n) | (mass >= limit)
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle - 1)
    count, mass = _tally(key > low.to(tl.int32), weights)
    return low, count, mass


@triton.jit
def _floor_of(min_p, top, scale):
    """The lowest key that min-p keeps: (x - top) * scale >= ln(min_p), evaluated in float64."""
    floor = tl.where(min_p > 0.0, tl.log(min_p), float("-inf"))
    low, high = tl.full((), _LOWEST, tl.int64), _key(top).to(tl.int64)
    for _ in range(_STEPS):
        middle = (low + high) >> 1
        passes = (_number(middle) - top.to(tl.float64)) * scale >= floor
        high = tl.where(passes, middle, high)
        low = tl.where(passes, low, tl.minimum(middle + 1, high))
    return high


@triton.jit
def _cut(limit, key, count, above, n_first, error, peak, scale):
    """How many tokens have less than the weight ``limit`` before them, and whether no rounding could change that.

    ``key`` reaches the limit and the ``count`` above it do not; values with this key come in token order.
    """
    weight = _weight_of(key, peak, scale)
    weight = tl.where(weight > 0.0, weight, 1.0)  # not reached: the row is not settled
    ties = tl.ceil((limit - above) / weight).to(tl.int64)
    ties = tl.where(above + (ties - 1).to(tl.float64) * weight >= limit, ties - 1, ties)
    ties = tl.where(above + ties.to(tl.float64) * weight < limit, ties + 1, ties)
    n = tl.minimum(count + ties, n_first)
    before_last = above + (n - 1 - count).to(tl.float64) * weight
    before_next = above + (n - count).to(tl.float64) * weight
    return n, (before_last < limit * (1.0 - error)) & ((n >= n_first) | (before_next >= limit * (1.0 + error)))


@triton.jit
def _kept(key, bound, ties, passed):
    """Which values are kept: those above the bound, and of those at it the first ``ties``, ``passed`` ones before."""
    tie = key == bound.to(tl.int32)
    rank = passed + tl.cumsum(tie.to(tl.int64), axis=0) - tie.to(tl.int64)
    return (key > bound.to(tl.int32)) | (tie & (rank < ties))


@triton.jit
def _pick(weights, target, LANES: tl.constexpr):
    """The first lane with a weight at which the sum passes the target, or the last one with any; LANES if none has."""
    edges = tl.cumsum(weights, axis=0)
    found = (weights > 0.0) & ((edges > target) | (edges >= tl.max(edges, axis=0)))
    return tl.min(tl.where(found, tl.arange(0, LANES), LANES), axis=0)


@triton.jit
def _settle_kernel(
    values_ptr, tiles_ptr, tau_ptr, slack_ptr, row_max_ptr, scale_ptr, total_ptr, greedy_ptr,
    top_k_ptr, top_p_ptr, min_p_ptr, uniforms_ptr,
    settled_ptr, n_kept_ptr, certified_ptr, tokens_ptr, chosen_ptr, mass_ptr,
    n_draws, opened, vocab, VLLM: tl.constexpr, TILE: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """One row: how many tokens are kept, whether the opened tiles settle that, and the draws if they do."""
    row = tl.program_id(0).to(tl.int64)
    if tl.load(settled_ptr + row) == 0:
        peak, scale = tl.load(row_max_ptr + row), tl.load(scale_ptr + row)
        top_p, min_p = tl.load(top_p_ptr + row), tl.load(min_p_ptr + row)
        top_k = tl.where(tl.load(greedy_ptr + row) != 0, 1, tl.load(top_k_ptr + row))
        lanes = tl.arange(0, LANES)
        x = tl.load(values_ptr + row * LANES + lanes)
        key, weights = _weigh(x, peak, scale)
        tau = tl.load(tau_ptr + row)
        whole = tau == float("-inf")
        known_from = tl.where(whole, _LOWEST + 1, _key(tau).to(tl.int64) + 1)
        known, known_mass = _tally(key >= known_from.to(tl.int32), weights)

        # The top is that of the values seen here: the sketch's maximum may come from another product.
        floor = _floor_of(min_p, tl.max(x, axis=0), scale)
        n_min_p = known
        if min_p > 0.0:
            n_min_p, _min_p_mass = _tally(key >= floor.to(tl.int32), weights)
            n_min_p = tl.minimum(n_min_p, known)
        n_top_k = tl.minimum(top_k, known)
        top_k_known = whole | (top_k <= known)
        either_known = top_k_known | (floor >= known_from)
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
                bound, count, above = _reach(key, weights, n_first, float("inf"))
                mass = above + (n_first - count).to(tl.float64) * _weight_of(bound, peak, scale)
            limit = top_p * mass
            bound, count, above = _reach(key, weights, vocab + 1, limit)
            n, certified = _cut(limit, bound, count, above, n_first, error, peak, scale)
            settled = tl.where(by_sketch, (known_mass >= limit * (1.0 + error)) & certified, first_known)
        n = tl.maximum(tl.minimum(n, n_min_p), 1)  # 0 only in broken rows
        tl.store(settled_ptr + row, settled.to(tl.int8))
        if settled:
            tl.store(n_kept_ptr + row, n)
            tl.store(certified_ptr + row, certified.to(tl.int8))
            bound, count, above = _reach(key, weights, n, float("inf"))
            weights = tl.where(_kept(key, bound, n - count, 0), weights, 0.0)
            total = tl.sum(weights, axis=0)
            for i in range(n_draws):
                place = _pick(weights, tl.load(uniforms_ptr + row * n_draws + i) * total, LANES)
                place = tl.minimum(place, LANES - 1)  # none found in broken rows
                value = tl.sum(tl.where(lanes == place, x, 0.0), axis=0).to(tl.float64)
                tile = tl.load(tiles_ptr + row * opened + place // TILE)
                tl.store(tokens_ptr + row * n_draws + i, tl.minimum(tile * TILE + place % TILE, vocab - 1))
                tl.store(chosen_ptr + row * n_draws + i, value)
            tl.store(mass_ptr + row, total)


# --- rows that the opened tiles do not settle ------------------------------------------------------------------------


@triton.jit
def _row_values(here, row, ids, rules, vocab):
    x = tl.load(here + ids, mask=ids < vocab, other=float("-inf")).to(tl.float32)
    x = penalise(x, ids, row, rules[0], rules[1], rules[2], rules[3], rules[4], rules[5])
    return tl.where(ids < vocab, x, float("-inf"))


@triton.jit
def _look(here, row, low, high, peak, scale, rules, vocab, lists, LIST: tl.constexpr, BLOCK: tl.constexpr):
    """Read a row: number and weight of the values with keys above ``high``, from ``low`` to ``high``, and of all.

    The keys from ``low`` to ``high`` are listed in token order as far as there is room; noted are, of each block, how
    many were listed before and the weight above.
    """
    tl.debug_barrier()  # what an earlier reading has listed was used by all threads
    n_between = row * 0
    counts, masses = tl.zeros((BLOCK,), tl.int64), tl.zeros((BLOCK,), tl.float64)  # lane by lane, summed up at the end
    above_counts, above_masses, between_masses = counts, masses, masses
    for start in range(0, vocab, BLOCK):
        key, weights = _weigh(_row_values(here, row, start + tl.arange(0, BLOCK), rules, vocab), peak, scale)
        is_above = key > high.to(tl.int32)
        is_between = (key >= low.to(tl.int32)) & (~is_above)
        weights_above = tl.where(is_above, weights, 0.0)
        tl.store(lists[1] + start // BLOCK, tl.sum(weights_above, axis=0))
        tl.store(lists[2] + start // BLOCK, n_between)
        place = n_between + tl.cumsum(is_between.to(tl.int32), axis=0) - 1
        tl.store(lists[0] + place, key, mask=is_between & (place < LIST))
        n_between += tl.sum(is_between.to(tl.int32), axis=0)
        counts += (key > _LOWEST).to(tl.int64)
        masses += weights
        above_counts += is_above.to(tl.int64)
        above_masses += weights_above
        between_masses += tl.where(is_between, weights, 0.0)
    tl.debug_barrier()  # what was listed can be read
    n_above, above, between = tl.sum(above_counts, axis=0), tl.sum(above_masses, axis=0), tl.sum(between_masses, axis=0)
    return n_above, above, n_between, between, tl.sum(counts, axis=0), tl.sum(masses, axis=0)


@triton.jit
def _guess(sample, first, last, known, known_mass, whole, n, limit, peak, scale, LIST: tl.constexpr):
    """Between which keys, ``first`` to ``last`` at most, n values or the weight ``limit`` are reached, and about where.

    From the maxima of the tiles and a sample of the rest, give or take three standard errors; of those above ``last``
    the number and weight are known, and the weight down to ``first``. The errors of a weight can be many times what a
    list holds, where few values weigh much; then from as many about the estimate as a list does hold.
    """
    key, weights, sampled, share = sample
    here = (key >= first.to(tl.int32)) & (key <= last.to(tl.int32))
    drawn = here & sampled
    weights = tl.where(here, weights, 0.0)
    of_drawn = tl.sum(tl.where(drawn, weights, 0.0), axis=0)
    of_maxima = tl.sum(weights, axis=0) - of_drawn
    # what was drawn stands for all that are no maxima: as many times its number, and their weight together is known
    weights = tl.where(drawn, weights * tl.maximum((whole - known_mass - of_maxima) / of_drawn, 0.0), weights)
    each = tl.where(here, tl.where(sampled, 1.0 / share, 1.0), 0.0)
    n, limit = n - known, limit - known_mass
    middle, _count, _mass = _reach(key, weights, n, limit, each)
    at_least = key >= middle.to(tl.int32)
    n_drawn, above = _tally(drawn & at_least, weights)
    n_all, mass = _tally(drawn, weights)
    spread = tl.where(drawn, tl.where(at_least, 1.0 - above / mass, above / mass) * weights, 0.0)
    weight = 3.0 * tl.sqrt(tl.sum(spread * spread, axis=0)) + 3.0 * _weight_of(middle, peak, scale) / share
    rank = (3.0 * tl.sqrt(tl.maximum(n_drawn * (1.0 - n_drawn.to(tl.float64) / n_all), 0.0)) + 3.0) / share
    low, _count, _mass = _reach(key, weights, n + rank, limit + weight, each)
    high, _count, _mass = _reach(key, weights, n - rank, limit - weight, each)
    from_rank = tl.maximum(tl.sum(tl.where(at_least, each, 0.0), axis=0) - 0.375 * LIST, 0.0)
    lowest, _count, _mass = _reach(key, weights, from_rank + 0.75 * LIST, 1e300, each)
    highest, _count, _mass = _reach(key, weights, from_rank, 1e300, each)
    low, high = tl.maximum(tl.maximum(low, lowest), first), tl.minimum(tl.minimum(high, highest), last)
    return low, high, tl.minimum(tl.maximum(middle, first), last)


@triton.jit
def _reach_wide(
    n, limit, low, high, n_above, above, n_between, between,
    whole, here, row, peak, scale, rules, vocab, lists, sample,
    LIST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """As ``_reach``, of a row in memory: from what its last reading found, or from another one, which comes back.

    Every reading that does not find the key narrows down where it can be, and says what the next guess starts from;
    after some guesses the range is halved.
    """
    first, last = tl.full((), _LOWEST + 1, tl.int64), tl.full((), _HIGHEST, tl.int64)
    known, known_mass = peak * 0.0, peak * 0.0
    guessed = row * 0
    over = (n_above > n) | (above >= limit)
    under = (n_above + n_between >= n) | (above + between >= limit)
    fits = (n_between <= LIST) | (low == high)
    while (over | (~under) | (~fits)) & (first <= last) & (whole == whole):  # NaN in broken rows
        first = tl.where(over, tl.maximum(first, high + 1), tl.where(under, tl.maximum(first, low), first))
        last = tl.where(over, last, tl.where(under, tl.minimum(last, high), tl.minimum(last, low - 1)))
        whole = tl.where(over, above, tl.where(under, above + between, whole))
        from_low = (~over) & (~under)
        known = tl.where(over, known, (n_above + tl.where(from_low, n_between, 0)).to(tl.float64))
        known_mass = tl.where(over, known_mass, above + tl.where(from_low, between, 0.0))
        low, high = (first + last + 1) >> 1, last
        if guessed < 4:
            low_guess, high_guess, middle = _guess(
                sample, first, last, known, known_mass, whole, n, limit, peak, scale, LIST
            )  # fmt: skip
            # nothing narrower, and too many for a list: there are ties, so that key alone
            if under & (~over) & (low_guess == first) & (high_guess == last):
                low_guess, high_guess = middle, middle
            low = tl.where(low_guess <= high_guess, low_guess, low)
            high = tl.where(low_guess <= high_guess, high_guess, high)
        guessed += 1
        n_above, above, n_between, between, _n, _mass = _look(
            here, row, low, high, peak, scale, rules, vocab, lists, LIST, BLOCK
        )
        over = (n_above > n) | (above >= limit)
        under = (n_above + n_between >= n) | (above + between >= limit)
        fits = (n_between <= LIST) | (low == high)
    bound, count, mass = high, n_above, above  # of a rank: with no tie kept where the n are all above
    if (low < high) & (n > n_above):
        lanes = tl.arange(0, LIST)
        key = tl.load(lists[0] + lanes, mask=lanes < n_between, other=_LOWEST)
        bound, count, mass = _reach(key, _weight_of(key, peak, scale), n - n_above, limit - above)
        count, mass = count + n_above, mass + above
    if first > last:  # a weight that rounding puts beyond that of the row, or a broken row: everything
        bound, count, mass = tl.full((), _LOWEST, tl.int64), row * 0 + vocab, above + between
    return bound, count, mass, low, high, n_above, above, n_between, between


@triton.jit
def _draw_wide(
    bound, ties, low, high, n_between, here, row, peak, scale, rules, vocab, lists, uniforms_ptr,
    tokens_ptr, chosen_ptr, n_draws, LIST: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Invert the CDF over what is kept: of blocks by what the last reading noted, then within one block."""
    blocks, n_blocks = tl.arange(0, BLOCKS), tl.cdiv(vocab, BLOCK)
    kept_mass = tl.load(lists[1] + blocks, mask=blocks < n_blocks, other=0.0)
    starts = tl.load(lists[2] + blocks, mask=blocks < n_blocks, other=n_between)
    ends = tl.load(lists[2] + blocks + 1, mask=blocks + 1 < n_blocks, other=n_between)
    passed = starts  # values at the bound before each block
    if low < high:
        lanes = tl.arange(0, LIST)
        key = tl.load(lists[0] + lanes, mask=lanes < n_between, other=_LOWEST)
        weights = tl.where(_kept(key, bound, ties, 0), _weight_of(key, peak, scale), 0.0)
        for block in range(n_blocks):
            start = tl.sum(tl.where(blocks == block, starts, 0), axis=0)
            end = tl.sum(tl.where(blocks == block, ends, 0), axis=0)
            mass = tl.sum(tl.where((lanes >= start) & (lanes < end), weights, 0.0), axis=0)
            n_tied = tl.sum(((key == bound.to(tl.int32)) & (lanes < start)).to(tl.int64), axis=0)
            kept_mass = tl.where(blocks == block, kept_mass + mass, kept_mass)
            passed = tl.where(blocks == block, n_tied, passed)
    else:  # all that lie between are ties, and were counted even where there was no room to list them
        n_tied = tl.minimum(tl.maximum(ties - starts, 0), ends - starts)
        kept_mass += n_tied.to(tl.float64) * _weight_of(bound, peak, scale)
    edges = tl.cumsum(kept_mass, axis=0)
    total = tl.sum(kept_mass, axis=0)
    for i in range(n_draws):
        target = tl.load(uniforms_ptr + row * n_draws + i) * total
        block = tl.minimum(_pick(kept_mass, target, BLOCKS), n_blocks - 1)  # none found in broken rows
        left = tl.max(tl.where(blocks < block, edges, 0.0), axis=0)
        seen = tl.sum(tl.where(blocks == block, passed, 0), axis=0)
        x = _row_values(here, row, block * BLOCK + tl.arange(0, BLOCK), rules, vocab)
        key, weights = _weigh(x, peak, scale)
        weights = tl.where(_kept(key, bound, ties, seen), weights, 0.0)
        place = tl.minimum(_pick(weights, target - left, BLOCK), BLOCK - 1)
        value = tl.sum(tl.where(tl.arange(0, BLOCK) == place, x, 0.0), axis=0).to(tl.float64)
        tl.store(tokens_ptr + row * n_draws + i, tl.minimum(block * BLOCK + place, vocab - 1))
        tl.store(chosen_ptr + row * n_draws + i, value)
    return total


@triton.jit
def _wide_kernel(
    logits_ptr, row_stride, maxima_ptr, top_ptr, row_max_ptr, scale_ptr, total_ptr, greedy_ptr,
    top_k_ptr, top_p_ptr, min_p_ptr, uniforms_ptr, list_ptr, above_ptr, starts_ptr,
    settled_ptr, n_kept_ptr, certified_ptr, tokens_ptr, chosen_ptr, mass_ptr, n_rows, n_draws, n_tiles,
    seen_ptr, repetition_ptr, presence_ptr, allow_ptr, n_words, n_valid, vocab,
    VLLM: tl.constexpr, TILE: tl.constexpr,
    SAMPLE: tl.constexpr, LIST: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """The rows that are not settled, one after the other: all their values are looked at."""
    rules = (seen_ptr, repetition_ptr, presence_ptr, allow_ptr, n_words, n_valid)
    program = tl.program_id(0).to(tl.int64)
    lists = (list_ptr + program * LIST, above_ptr + program * BLOCKS, starts_ptr + program * BLOCKS)
    never = tl.full((), 1e300, tl.float64)
    for each in range(tl.program_id(0), n_rows, tl.num_programs(0)):
        row = program * 0 + each  # in 64 bits
        if tl.load(settled_ptr + row) == 0:
            here = logits_ptr + row * row_stride
            peak, scale = tl.load(row_max_ptr + row), tl.load(scale_ptr + row)
            top_p, min_p = tl.load(top_p_ptr + row), tl.load(min_p_ptr + row)
            top_k = tl.where(tl.load(greedy_ptr + row) != 0, 1, tl.load(top_k_ptr + row))
            floor = _floor_of(min_p, tl.load(top_ptr + row), scale)

            # the maxima of the tiles, and of other values a sample, in the lanes that are left
            lanes = tl.arange(0, SAMPLE)
            place = lanes - n_tiles
            ids = place // _RUN * tl.maximum(vocab // ((SAMPLE - n_tiles) // _RUN), _RUN) + place % _RUN
            inside = (place >= 0) & (ids < vocab)
            tops = maxima_ptr + row * n_tiles
            top_of = tl.load(tops + tl.where(place < 0, lanes, ids // TILE), mask=inside | (place < 0), other=0.0)
            drawn = _row_values(here, row, tl.where(inside, ids, vocab), rules, vocab)
            before = _row_values(here, row, tl.where(inside, tl.maximum(ids - 1, 0), vocab), rules, vocab)
            is_top = (drawn == top_of) & (before != top_of)  # of equal neighbours one is the tile's maximum
            x = tl.where(place < 0, top_of, tl.where(is_top, float("-inf"), drawn))
            key, weights = _weigh(x, peak, scale)
            sample = (key, weights, place >= 0, tl.sum(inside.to(tl.float64), axis=0) / vocab)
            known, whole = peak * 0.0, tl.load(total_ptr + row)

            # The first reading: at the floor of min-p, else about the first boundary that is asked for.
            by_rank = top_k < vocab
            low, high = floor, floor
            if min_p <= 0.0:
                low, high, _middle = _guess(
                    sample, floor * 0 + _LOWEST + 1, floor * 0 + _HIGHEST, known, known, whole,
                    tl.where(by_rank, top_k.to(tl.float64), never), tl.where(by_rank, never, top_p * whole),
                    peak, scale, LIST,
                )  # fmt: skip
            n_above, above, n_between, between, n_all, everything = _look(
                here, row, low, high, peak, scale, rules, vocab, lists, LIST, BLOCK
            )
            n_min_p = tl.where(min_p > 0.0, n_above + n_between, n_all)
            n_first = tl.minimum(top_k, n_all)
            if VLLM:
                n_first = tl.minimum(n_first, n_min_p)

            # Three searches: where the weight that top-p is a share of ends, where top-p does, where what is kept does.
            n, limit, certified = n_first, top_p * everything, top_p >= 1.0
            bound, count = row * 0, row * 0
            for search in range(3):
                if (search == 2) | ((top_p < 1.0) & ((search == 1) | (n_first < n_all))):
                    bound, count, mass, low, high, n_above, above, n_between, between = _reach_wide(
                        tl.where(search == 1, never, n.to(tl.float64)), tl.where(search == 1, limit, never),
                        low, high, n_above, above, n_between, between, whole,
                        here, row, peak, scale, rules, vocab, lists, sample, LIST, BLOCK,
                    )  # fmt: skip
                    if search == 0:
                        limit = top_p * (mass + (n - count).to(tl.float64) * _weight_of(bound, peak, scale))
                    if search == 1:
                        n, certified = _cut(limit, bound, count, mass, n_first, _EXACT_ERROR, peak, scale)
                if search == 1:
                    n = tl.maximum(tl.minimum(n, n_min_p), 1)  # 0 only in broken rows
            mass = _draw_wide(
                bound, n - count, low, high, n_between, here, row, peak, scale, rules, vocab, lists, uniforms_ptr,
                tokens_ptr, chosen_ptr, n_draws, LIST, BLOCK, BLOCKS,
            )  # fmt: skip
            tl.store(n_kept_ptr + row, n)
            tl.store(certified_ptr + row, certified.to(tl.int8))
            tl.store(mass_ptr + row, mass)


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
    device, vocab = uniforms.device, sketch.source.vocab
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
    off = (filters.top_k >= vocab) & (filters.top_p >= 1) & (filters.min_p <= 0) & ~sketch.greedy
    tokens, chosen = draw(sketch, uniforms)
    chosen = chosen.double()
    settled = off.to(torch.int8)
    n_kept = torch.full((rows,), vocab, dtype=torch.int64, device=device)
    certified = torch.ones(rows, dtype=torch.int8, device=device)
    mass, uniforms = sketch.total.clone(), uniforms.contiguous()
    given = (
        sketch.row_max, sketch.inv_temp, sketch.total, sketch.greedy.to(torch.int8),
        filters.top_k, filters.top_p, filters.min_p, uniforms,
    )  # fmt: skip
    _settle_kernel[(rows,)](
        values, tiles, tau, slack, *given, settled, n_kept, certified, tokens, chosen, mass,
        n_draws, opened, vocab, VLLM=filters.order == "vllm", TILE=sketch.tile, LANES=opened * sketch.tile,
        num_warps=8,
    )  # fmt: skip

    def settle_wide(logits: torch.Tensor, maxima: torch.Tensor, rules: Rules) -> None:
        programs, blocks = min(rows, processors(device)), triton.next_power_of_2(triton.cdiv(vocab, _BLOCK))
        listed = torch.empty(programs, _LIST, dtype=torch.int32, device=device)
        above = torch.empty(programs, blocks, dtype=torch.float64, device=device)
        starts = torch.empty(programs, blocks, dtype=torch.int64, device=device)
        n_tiles = maxima.shape[1]
        _wide_kernel[(programs,)](
            logits, logits.stride(0), maxima, maxima.amax(dim=1), *given, listed, above, starts,
            settled, n_kept, certified, tokens, chosen, mass, rows, n_draws, n_tiles, *rule_args(rules, vocab), vocab,
            VLLM=filters.order == "vllm", TILE=sketch.tile, SAMPLE=max(_SAMPLE, triton.next_power_of_2(2 * n_tiles)),
            LIST=_LIST, BLOCK=_BLOCK, BLOCKS=blocks, num_warps=16,
        )  # fmt: skip

    if sketch.maxima.shape[1] > opened:
        if isinstance(sketch.source, LogitsSource):
            settle_wide(sketch.source.logits, sketch.maxima, sketch.source.rules)
        elif not bool(settled.all()):
            # The logits were never written, and asking whether they are needed makes the host wait.
            # Requests with wide nuclei are better served from logits in memory.
            every = _every_value(sketch)
            settle_wide(every, every.view(rows, -1, sketch.tile).amax(dim=2), NO_RULES)
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
