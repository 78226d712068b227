"""Where the variance of a mean over items and training seeds comes from: two-way analysis of variance.

The mean is linearised: each cluster of prompts has its part in the deviation of the mean of cells.
Items and seeds are crossed, so the variance of the mean is that of items plus that of seeds plus that
of their interaction over the number of both.
"""

import functools
from dataclasses import dataclass

import numpy as np
from scipy import stats as distributions

from evaluate.stats import LEVEL, Floats, Ints

TINY = 1e-20  # a variance below this is rounding: scores are of the order of one


@dataclass(frozen=True, slots=True)
class Tables:
    """Per estimate, seed, cluster and cell, the sum and the count of the values that are there."""

    sums: Floats  # (rows, seeds, clusters, cells): one row per estimate
    counts: Floats
    strata: Ints  # (clusters,): clusters are resampled inside their stratum

    def subset(self, rows: Ints) -> "Tables":
        """Some of the rows."""
        return Tables(self.sums[rows], self.counts[rows], self.strata)


@dataclass(frozen=True, slots=True)
class Spread:
    """Where the variance of each row's mean comes from, (rows,) each."""

    items: Floats  # variance by the choice of items
    seeds: Floats  # by the choice of seeds, beyond what is in ``items``; 0 with one seed
    item_freedom: Floats
    skewness: Floats  # of the mean over samples of items
    n_seeds: int

    @property
    def variance(self) -> Floats:
        """Variance of the mean."""
        return self.items + self.seeds

    def critical(self, sign: int, *, symmetric: bool) -> Floats:
        """How many standard errors the bound below (1) or above (-1) lies from the value.

        The mean of each source's own quantile, as Cochran and Cox (1950) have it but weighted by squared
        variances, as Satterthwaite weights degrees of freedom: by plain variances it is too wide where
        seeds matter little. That of items is corrected for skewness unless ``symmetric``.
        """
        quantile: Floats = distributions.t.ppf(0.5 + LEVEL / 2, self.item_freedom)
        if not symmetric:
            quantile = sign * corrected_for_skewness(sign * quantile, self.skewness)
        if self.n_seeds == 1:
            return quantile
        few = float(distributions.t.ppf(0.5 + LEVEL / 2, self.n_seeds - 1))
        weight = self.items**2 / np.maximum(self.items**2 + self.seeds**2, TINY**2)
        found: Floats = np.where(self.variance > TINY, weight * quantile + (1 - weight) * few, quantile)
        return found

    @property
    def freedom(self) -> Floats:
        """The degrees of freedom of a t distribution with the same quantile."""
        return self.item_freedom if self.n_seeds == 1 else freedom_of(self.critical(1, symmetric=True))

    @property
    def total_skewness(self) -> Floats:
        """Skewness of the mean over samples of items and seeds, whose own distribution is taken as symmetric."""
        found: Floats = self.skewness * (self.items / np.maximum(self.variance, TINY)) ** 1.5
        return found


def tabulate(values: Floats, clusters: Ints, cells: Ints, strata: Ints, *, n_cells: int = 1) -> Tables:
    """Sum values (rows, seeds, columns) by cluster and cell; NaN is missing; one stratum per cluster."""
    rows, seeds, _ = values.shape
    shape = (rows, seeds, len(strata), n_cells)
    size = len(strata) * n_cells
    place = np.arange(rows * seeds)[:, None] * size + clusters * n_cells + cells
    flat = values.reshape(rows * seeds, -1)
    there = ~np.isnan(flat)
    sums = np.bincount(place[there], weights=flat[there], minlength=rows * seeds * size).astype(np.float64)
    counts = np.bincount(place[there], minlength=rows * seeds * size).astype(np.float64)
    return Tables(sums.reshape(shape), counts.reshape(shape), strata)


def seed_means(tables: Tables) -> Floats:
    """The mean over cells of the mean inside each, (rows, seeds); NaN where a cell has no value at all."""
    with np.errstate(invalid="ignore"):
        found: Floats = (tables.sums.sum(axis=2) / tables.counts.sum(axis=2)).mean(axis=-1)
    return found


def bound(tables: Tables, empty: float) -> Floats:
    """Each row's mean, (rows,), when a cell without values is taken to be ``empty`` throughout."""
    with np.errstate(invalid="ignore"):
        means = tables.sums.sum(axis=2) / tables.counts.sum(axis=2)
    found: Floats = np.where(np.isnan(means), empty, means).mean(axis=(1, 2))
    return found


def item_means(tables: Tables) -> Floats:
    """The mean of each item over cells, then over seeds, (rows, clusters); NaN where an item has no value."""
    with np.errstate(invalid="ignore"):
        by_seed = tables.sums.sum(axis=3) / tables.counts.sum(axis=3)
        there = ~np.isnan(by_seed)
        found: Floats = np.where(there, by_seed, 0.0).sum(axis=1) / there.sum(axis=1)
    return found


def influence(tables: Tables) -> Floats:
    """Each cluster's part in the deviation of the mean of cells (linearisation), (rows, seeds, clusters)."""
    totals = tables.counts.sum(axis=2, keepdims=True)
    with np.errstate(invalid="ignore"):
        means = tables.sums.sum(axis=2, keepdims=True) / totals
        parts: Floats = ((tables.sums - means * tables.counts) / totals).mean(axis=-1)
    return parts


def _by_stratum(parts: Floats, strata: Ints) -> tuple[Floats, Floats]:
    """Variance of the sum of the clusters' parts, by stratum, (..., strata), and each stratum's degrees of freedom."""
    member = (strata[:, None] == np.unique(strata)).astype(np.float64)
    size = member.sum(axis=0)
    freedom = np.maximum(size - 1, 1)
    centred = parts - (parts @ member / size) @ member.T
    return (centred**2) @ member * size / freedom, freedom


def _third_cumulant(parts: Floats, strata: Ints) -> Floats:
    """Third cumulant of the sum of the clusters' parts, (rows,); strata of fewer than four say nothing of it."""
    found = np.zeros(parts.shape[0])
    for stratum in np.unique(strata):
        inside = parts[:, strata == stratum]
        size = inside.shape[1]
        if size >= 4:
            cubes = ((inside - inside.mean(axis=1, keepdims=True)) ** 3).sum(axis=1)
            found += size**2 / ((size - 1) * (size - 2)) * cubes
    return found


def corrected_for_skewness(quantile: Floats, skewness: Floats) -> Floats:
    """The studentised mean's quantile where a symmetric one's is ``quantile`` (Hall 1992, expanded).

    T + k T^2 / 3 + k^2 T^3 / 27 + k / 6 is symmetric for a mean of skewness k up to terms of higher
    order. Solved for T exactly it is a cube root, whose slope is infinite near k = 0.5: with 25 items the
    far bound jumps from 3.5 standard errors at k = 0.4 to 8.5 at 0.5, which no sample can tell apart.
    The expansion of that root to k^2 agrees with it to the order for which the theory holds, increases
    in ``quantile`` whatever k is, and is at most 5.9 with 25 items and 7.1 with ten, as the k of a
    sample is at most 1. benchmarks/coverage.py holds the two against each other.
    """
    y = quantile - skewness / 6
    found: Floats = y - skewness * y**2 / 3 + 5 / 27 * skewness**2 * y**3
    return found


@functools.cache
def _t_quantiles() -> tuple[Floats, Floats]:
    """Degrees of freedom, and the two-sided t quantile at ``LEVEL`` of each."""
    freedom = np.geomspace(0.5, 1e7, 4000)
    return freedom, distributions.t.ppf(0.5 + LEVEL / 2, freedom)


def freedom_of(critical: Floats) -> Floats:
    """The degrees of freedom whose two-sided t quantile at ``LEVEL`` is ``critical``."""
    freedom, quantiles = _t_quantiles()
    found: Floats = np.interp(-critical, -quantiles, freedom)
    return found


def spread(tables: Tables) -> Spread:
    """Two-way analysis of variance of the linearised means (module docstring)."""
    parts = influence(tables)
    n_seeds = parts.shape[1]
    by_stratum, freedoms = _by_stratum(parts.mean(axis=1), tables.strata)
    items = by_stratum.sum(axis=-1)
    with np.errstate(invalid="ignore", divide="ignore"):
        item_freedom = items**2 / (by_stratum**2 / freedoms).sum(axis=-1)
    item_freedom = np.where(np.isnan(item_freedom), freedoms.sum(), item_freedom)
    third = _third_cumulant(parts.mean(axis=1), tables.strata)
    skewness = np.where(items > TINY, third / np.maximum(items, TINY) ** 1.5, 0.0)
    if n_seeds == 1:
        return Spread(items, np.zeros_like(items), item_freedom, skewness, n_seeds)
    seeds = seed_means(tables).var(axis=1, ddof=1) / n_seeds
    rest, _ = _by_stratum(parts - parts.mean(axis=1, keepdims=True), tables.strata)
    interaction = rest.sum(axis=(1, 2)) / (n_seeds - 1) / n_seeds
    # The items' mean square holds the interaction already. Taking all of it away here would leave nothing for the
    # uncertainty of three seeds' variance where that is small (5.8 % false positives), none of it is too wide.
    return Spread(items, np.maximum(seeds - interaction / 2, 0.0), item_freedom, skewness, n_seeds)
