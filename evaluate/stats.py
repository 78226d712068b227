"""Intervals and agreement: arrays in, numbers out.

Replies to one prompt resemble each other, and so do the counterbalanced forms of one item, so the
unit that is resampled is always the item (the "cluster"); resampling replies would give intervals
that are too narrow. Every measure here is the same thing, a mean over cells (formats x
dimensions; one cell for a plain mean) of the mean inside the cell, with clusters that may touch
several cells, so one pair of functions serves means, composites and paired differences.

Where there are many clusters the interval is a percentile bootstrap; where there are few
(``FEW`` degrees of freedom or less) it is a t interval on the linearised mean, because a bootstrap
of ten items is too narrow. tests/evaluate/test_stats.py checks by simulation that both cover.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats as distributions

from candor.hashing import hash64

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

LEVEL = 0.95
FEW = 20  # below this many degrees of freedom a percentile bootstrap covers visibly less than it says


class Interval(NamedTuple):
    """A number with its interval; NaN where there is none."""

    value: float
    low: float
    high: float


class Estimated(NamedTuple):
    """An interval, how it was made, and how many clusters stand behind it."""

    interval: Interval
    method: str
    n_clusters: int


@dataclass(frozen=True, slots=True)
class Table:
    """Per cluster and cell, the sum and the count of the values that are there."""

    sums: Floats  # (clusters, cells)
    counts: Floats  # (clusters, cells)
    strata: Ints  # (clusters,): clusters are resampled inside their stratum


def generator(seed: int, *unit: str) -> np.random.Generator:
    """A generator of its own for a named unit of work, whatever ran before it."""
    return np.random.default_rng(np.random.SeedSequence([seed, hash64(*unit)]))


def tabulate(values: Floats, clusters: Ints, cells: Ints, strata: Ints, *, n_cells: int = 1) -> Table:
    """Sum values (NaN = missing) by cluster and cell; ``strata`` holds one stratum per cluster."""
    shape = (len(strata), n_cells)
    there = ~np.isnan(values)
    place = (clusters * shape[1] + cells)[there]
    sums = np.bincount(place, weights=values[there], minlength=shape[0] * shape[1]).astype(np.float64)
    counts = np.bincount(place, minlength=shape[0] * shape[1]).astype(np.float64)
    return Table(sums.reshape(shape), counts.reshape(shape), strata)


def merge_small_strata(strata: Ints) -> Ints:
    """Strata renumbered from 0; those of a single cluster, which have no spread, are joined into one."""
    _, codes, sizes = np.unique(strata, return_inverse=True, return_counts=True)
    single = sizes[codes] < 2
    if single.sum() == 1:  # still alone: it joins the smallest of the others
        others = np.where(sizes < 2, sizes.max() + 1, sizes)
        codes = np.where(single, int(others.argmin()), codes)
    else:
        codes = np.where(single, len(sizes), codes)
    return np.unique(codes, return_inverse=True)[1].astype(np.int64)


def resampling_weights(strata: Ints, draws: int, rng: np.random.Generator) -> Floats:
    """Bootstrap weights (draws, clusters): n - 1 of a stratum's n clusters with replacement.

    n - 1 rather than n is the rescaled bootstrap of Rao and Wu (1988): it makes the bootstrap
    variance unbiased, where n would be too small by 1/n, a fifth for strata of five.
    """
    weights = np.zeros((draws, len(strata)))
    for stratum in np.unique(strata):
        members = np.flatnonzero(strata == stratum)
        size = len(members)
        if size == 1:
            weights[:, members] = 1.0
            continue
        counts = rng.multinomial(size - 1, np.full(size, 1 / size), size=draws)
        weights[:, members] = counts * (size / (size - 1))
    return weights


def mean_of_cells(table: Table) -> float:
    """Unweighted mean over cells of the mean inside each; NaN when a cell has no value at all."""
    totals = table.counts.sum(axis=0)
    if (totals == 0).any():
        return float("nan")
    return float((table.sums.sum(axis=0) / totals).mean())


def influence(table: Table) -> Floats:
    """Each cluster's part in the deviation of the mean of cells (linearisation), (clusters,)."""
    totals = table.counts.sum(axis=0)
    means = table.sums.sum(axis=0) / totals
    part: Floats = ((table.sums - means * table.counts) / totals).mean(axis=1)
    return part


def _stratified_variance(parts: Floats, strata: Ints) -> tuple[float, float]:
    """Variance of the sum of the parts of independent clusters, and its degrees of freedom (Satterthwaite)."""
    variance, spread = 0.0, 0.0
    for stratum in np.unique(strata):
        inside = parts[strata == stratum]
        size = len(inside)
        if size < 2:
            continue
        one = size / (size - 1) * float(((inside - inside.mean()) ** 2).sum())
        variance += one
        spread += one**2 / (size - 1)
    freedom = variance**2 / spread if spread > 0 else float(len(parts) - len(np.unique(strata)))
    return variance, freedom


def _t_interval(value: float, variance: float, freedom: float) -> Interval:
    half = float(distributions.t.ppf(0.5 + LEVEL / 2, freedom)) * variance**0.5
    return Interval(value, value - half, value + half)


def percentile(value: float, replicates: Floats) -> Interval:
    """The percentile interval of bootstrap replicates; undefined replicates are left out."""
    defined = replicates[~np.isnan(replicates)]
    if len(defined) == 0:
        return Interval(value, float("nan"), float("nan"))
    low, high = np.quantile(defined, [0.5 - LEVEL / 2, 0.5 + LEVEL / 2])
    return Interval(value, float(low), float(high))


def interval(table: Table, weights: Floats) -> Estimated:
    """The mean of cells with an interval for the choice of items.

    ``weights`` come from ``resampling_weights`` for the same strata. Using the same weights for
    two tables resamples the same items in both.
    """
    value = mean_of_cells(table)
    filled = table.counts.sum(axis=1) > 0
    n_clusters = int(filled.sum())
    if np.isnan(value):
        return Estimated(Interval(value, value, value), "missing: a part of this average has no answers", n_clusters)
    if n_clusters < 2:
        return Estimated(Interval(value, float("nan"), float("nan")), "one item only: no interval", n_clusters)
    freedom = n_clusters - len(np.unique(table.strata[filled]))
    if freedom < FEW:
        found = _t_interval(value, *_stratified_variance(influence(table), table.strata))
        method = "t interval over items (few items)"
    else:
        with np.errstate(invalid="ignore", divide="ignore"):
            replicates = ((weights @ table.sums) / (weights @ table.counts)).mean(axis=1)
        found = percentile(value, replicates)
        method = f"bootstrap over items, {len(weights)} draws"
    if found.low == found.high:
        method += "; no variation between items"
    return Estimated(found, method, n_clusters)


def crossed_interval(tables: Sequence[Table]) -> Estimated:
    """The mean over training seeds (one table each, same clusters) with an interval for both seeds and items.

    Seeds and items are crossed: their two variances are added, which is on the safe side by the
    variance of their interaction. Few seeds means few degrees of freedom, so it is a t interval.
    """
    values = np.array([mean_of_cells(table) for table in tables])
    filled = np.any([table.counts.sum(axis=1) > 0 for table in tables], axis=0)
    n_clusters = int(filled.sum())
    value = float(values.mean())
    if np.isnan(value) or len(values) < 2 or n_clusters < 2:
        missing = float("nan")
        return Estimated(Interval(value, missing, missing), "missing in at least one seed", n_clusters)
    item_variance, item_freedom = _stratified_variance(
        np.mean([influence(table) for table in tables], axis=0), tables[0].strata
    )
    seed_variance = float(values.var(ddof=1)) / len(values)
    total = item_variance + seed_variance
    spread = item_variance**2 / item_freedom + seed_variance**2 / (len(values) - 1)
    freedom = total**2 / spread if spread > 0 else float(len(values) - 1)
    return Estimated(
        _t_interval(value, total, freedom), f"t interval, {len(values)} training seeds crossed with items", n_clusters
    )


def spearman(x: ArrayLike, y: ArrayLike, *, draws: int, rng: np.random.Generator) -> Interval:
    """Spearman's rank correlation with a percentile interval that resamples the pairs."""
    pairs = np.stack([np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)])
    size = pairs.shape[1]
    if size < 3:
        return Interval(float("nan"), float("nan"), float("nan"))
    picks = rng.integers(0, size, size=(draws, size))
    return percentile(float(_rank_correlation(pairs[:, None, :])[0]), _rank_correlation(pairs[:, picks]))


def _rank_correlation(pairs: Floats) -> Floats:
    """Pearson correlation of ranks along the last axis of (2, draws, size); NaN where one side is constant."""
    ranks = distributions.rankdata(pairs, axis=-1)
    centred = ranks - ranks.mean(axis=-1, keepdims=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        scale = np.sqrt((centred**2).sum(axis=-1).prod(axis=0))
        correlation: Floats = (centred[0] * centred[1]).sum(axis=-1) / scale
    return correlation


def confusion(truth: Ints, judged: Ints, levels: int) -> Ints:
    """Counts (truth, judged) of grades 1..levels."""
    flat = np.bincount((truth - 1) * levels + judged - 1, minlength=levels * levels)
    return flat.reshape(levels, levels).astype(np.int64)


def quadratic_kappa(counts: NDArray[np.float64] | Ints) -> Floats:
    """Cohen's kappa with quadratic weights from confusion counts (..., levels, levels).

    1 - observed / expected squared disagreement; NaN when one grade is all there is.
    """
    table = np.asarray(counts, dtype=np.float64)
    grades = np.arange(table.shape[-1])
    penalty = (grades[:, None] - grades[None, :]) ** 2
    rows, columns = table.sum(axis=-1), table.sum(axis=-2)
    expected = rows[..., :, None] * columns[..., None, :]
    with np.errstate(invalid="ignore", divide="ignore"):
        chance = (penalty * expected).sum(axis=(-2, -1)) / table.sum(axis=(-2, -1))
        kappa: Floats = 1 - (penalty * table).sum(axis=(-2, -1)) / chance
    return kappa


def worst_of(scores: Floats, k: int) -> float:
    """Expected maximum of k draws, without bias, from n >= k scores; the maximum when n <= k.

    For n = k this is the plain maximum of the paper; more draws make it steadier without raising it.
    """
    ordered = np.sort(scores)
    size = len(ordered)
    if size <= k:
        return float(ordered[-1])
    # chance that the i-th smallest is the largest of k drawn without replacement: C(i-1, k-1) / C(n, k)
    chance = np.zeros(size)
    chance[-1] = k / size
    for i in range(size - 2, k - 2, -1):
        chance[i] = chance[i + 1] * (i + 2 - k) / (i + 1)
    return float(chance @ ordered)
