"""Rank correlations over models that come in families.

Fifteen variants of three base models are not fifteen independent observations: variants of one base
share its leanings. So the permutation test moves scores only inside a family (or inside a family
and stage, for the partial correlation given stage), and asks whether the order found there is
better than chance. The summed products are a sum over blocks that are permuted independently, so all
120^3 arrangements of three families of five are counted, by halves; where a family is large they are
sampled.

The interval is Fisher's z with the variance of Bonett and Wright (2000), which holds for small N
where a bootstrap of 15 pairs is too narrow; it takes the models as independent, which is said
wherever it is printed, and leaving one family out shows how much hangs on each.
"""

import functools
import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats as distributions

from evaluate.stats import LEVEL, Floats, Interval, Ints

ENUMERATE = 7  # a block of up to this many is permuted in all ways (7! = 5,040)
HALF = 1_000_000  # up to this many arrangements of half of the blocks are written out
ROUNDING = 1e-9


class Permutation(NamedTuple):
    """A permutation test; p is NaN where nothing can be permuted."""

    p_value: float
    arrangements: int  # counted or sampled
    exact: bool


def centred_ranks(values: ArrayLike, labels: Ints | None = None) -> Floats:
    """Ranks (ties get their mean) less their mean, or less the mean of those with the same label."""
    ranks: Floats = distributions.rankdata(np.asarray(values, dtype=np.float64))
    groups = np.zeros(len(ranks), dtype=np.int64) if labels is None else labels
    sizes = np.maximum(np.bincount(groups), 1)
    found: Floats = ranks - (np.bincount(groups, weights=ranks) / sizes)[groups]
    return found


def rank_correlation(x: ArrayLike, y: ArrayLike, labels: Ints | None = None) -> float:
    """Spearman's correlation; with labels the partial one, given the label. NaN where one side is constant."""
    a, b = centred_ranks(x, labels), centred_ranks(y, labels)
    scale = math.sqrt(float(a @ a) * float(b @ b))
    return float(a @ b) / scale if scale > ROUNDING else float("nan")


def rank_interval(rho: float, n: int, *, given: int = 0) -> Interval:
    """Interval for a rank correlation of n pairs (Bonett and Wright 2000), ``given`` other variables held fixed.

    A perfect order is taken as one swap of neighbours away from it, since no sample can show more.
    """
    freedom = n - 3 - given
    if math.isnan(rho) or freedom < 1:
        return Interval(rho, float("nan"), float("nan"))
    most = 1 - 12 / (n * (n * n - 1))
    inside = min(max(rho, -most), most)
    half = float(distributions.norm.ppf(0.5 + LEVEL / 2)) * math.sqrt((1 + inside**2 / 2) / freedom)
    centre = math.atanh(inside)
    low, high = math.tanh(centre - half), math.tanh(centre + half)
    return Interval(rho, min(low, rho), max(high, rho))


def _products(a: Floats, b: Floats, draws: int, rng: np.random.Generator) -> tuple[Floats, bool]:
    """Sums of products of a block under its permutations: all of them, or ``draws`` at random."""
    if len(a) <= ENUMERATE:
        orders = np.array(list(itertools.permutations(range(len(a)))), dtype=np.int64)
        return b[orders] @ a, True
    return rng.permuted(np.tile(b, (draws, 1)), axis=1) @ a, False


def permutation_test(
    x: ArrayLike, y: ArrayLike, blocks: Ints, *, labels: Ints | None = None, draws: int, rng: np.random.Generator
) -> Permutation:
    """Two-sided test of a rank correlation, permuting y inside blocks only.

    Two-sided around the mean over permutations, not around zero: what families share as wholes
    stays where it is and is no evidence. ``labels`` as in ``rank_correlation``; blocks must lie
    inside them.
    """
    a, b = centred_ranks(x, labels), centred_ranks(y, labels)
    if not (a.any() and b.any()):
        return Permutation(float("nan"), 0, True)
    members = [np.flatnonzero(blocks == block) for block in np.unique(blocks)]
    members = [m for m in members if len(m) > 1]
    parts = [_products(a[m], b[m], draws, rng) for m in members]
    arrangements = math.prod(math.factorial(len(m)) for m in members)
    if arrangements < 2:
        return Permutation(float("nan"), 0, True)
    expected = [len(m) * float(a[m].mean() * b[m].mean()) for m in members]
    observed = abs(sum(float(a[m] @ b[m]) for m in members) - sum(expected))
    centred = [part - e for (part, _), e in zip(parts, expected, strict=True)]
    halves = [math.prod(len(part) for part in half) for half in (centred[::2], centred[1::2])]
    if all(complete for _, complete in parts) and max(halves) <= HALF:
        return Permutation(_as_far(centred, observed) / arrangements, arrangements, True)
    total = sum((part[rng.integers(0, len(part), draws)] for part in centred), np.zeros(draws))
    as_far = int((np.abs(total) >= observed - ROUNDING).sum())
    # the arrangement that was observed is one of those that could have been drawn
    return Permutation((as_far + 1) / (draws + 1), draws, False)


def _as_far(parts: Sequence[Floats], observed: float) -> int:
    """How many sums of one value of each part are at least as far from zero, counted by halves."""
    left, right = (
        functools.reduce(lambda x, y: np.add.outer(x, y).ravel(), h, np.zeros(1)) for h in (parts[::2], parts[1::2])
    )
    bound = observed - ROUNDING
    if bound <= 0:
        return len(left) * len(right)
    left.sort()
    above = len(left) - np.searchsorted(left, bound - right, side="left")
    below = np.searchsorted(left, -bound - right, side="right")
    return int(above.sum() + below.sum())


def codes(labels: Sequence[object]) -> Ints:
    """Labels as integers from 0."""
    known: dict[object, int] = {}
    return np.array([known.setdefault(label, len(known)) for label in labels], dtype=np.int64)
