"""Means over items crossed with training seeds, with intervals.

Every measure is the same thing: a mean over training seeds of a mean over cells (formats x
dimensions; one cell for a plain mean) of the mean inside the cell. Items (clusters of prompts) may
touch several cells, and every seed was asked the same items: items and seeds are crossed, not
nested, so both the choice of items and the choice of seeds move the number. A paired difference is
the same mean over differences.

How the interval is made depends on how many units there are to resample:

- at least ``MANY_ITEMS`` items and either one seed or at least ``MANY_SEEDS``: a bootstrap that
  resamples items and, independently, seeds (the crossed or "pigeonhole" bootstrap: Owen 2007, Owen
  and Eckles 2012), with bias-corrected and accelerated percentiles (BCa, Efron 1987) expanded for
  the number of units (Hesterberg 2015);
- below that in either direction: a t interval, because percentiles of few units are too narrow
  (they cover 0.91 with ten items and 0.83 with three seeds). Its variance comes from the two-way
  analysis of variance; its critical value is a mean of the t quantiles of items and of seeds
  (after Cochran and Cox 1950), which keeps 95 % where Satterthwaite's degrees of freedom fall to 92 %
  with three seeds; Hall's (1992) transformation, expanded to second order, corrects that of items for
  skewness, which plain t intervals of 25 prompts miss by three points. A mean of many items that is
  still badly skewed (rare harm) gets this interval too;
- one seed: the interval is for the choice of items alone, and says so;
- no variation at all: the exact bound that n equal values leave for the rest of the population.

benchmarks/coverage.py measures what each covers.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from scipy import stats as distributions

from evaluate.components import TINY, Spread, Tables, seed_means, spread
from evaluate.stats import LEVEL, Estimated, Floats, Interval, Ints, generator, percentile, resampling_weights

MANY_ITEMS = 50
MANY_SEEDS = 10
ONE_SEED = "; prompt uncertainty only (one training seed)"
SKEWED = 0.3  # a mean more skewed than this gets the t interval, whose correction reaches further than BCa's
BLOCK = 4_000_000  # replicates worked on at once: 32 MB


@functools.lru_cache(maxsize=4)  # several measures in a row are over the same items
def item_weights(strata: tuple[int, ...], draws: int, seed: int, names: tuple[str, ...]) -> Floats:
    """Weights (draws, clusters) of items with these names; the numbers depend on nothing else."""
    weights = resampling_weights(np.array(strata), draws, generator(seed, "items", *names))
    weights.setflags(write=False)
    return weights


@dataclass(frozen=True, eq=False)
class Bootstrap:
    """Resampling weights, made when first needed; equal names give equal weights, whatever the measure."""

    strata: Ints
    draws: int
    seed: int
    names: tuple[str, ...]  # of the clusters

    @property
    def items(self) -> Floats:
        """(draws, clusters)."""
        return item_weights(tuple(self.strata.tolist()), self.draws, self.seed, self.names)

    def seeds(self, n_seeds: int) -> Floats:
        """(draws, seeds)."""
        rng = generator(self.seed, "training seeds", str(n_seeds))
        return resampling_weights(np.zeros(n_seeds, dtype=np.int64), self.draws, rng)


def _chunks(rows: Ints, per_row: int) -> Iterator[Ints]:
    """Rows in groups whose replicates fit in ``BLOCK``."""
    step = max(1, BLOCK // per_row)
    for start in range(0, len(rows), step):
        yield rows[start : start + step]


def replicates(tables: Tables, bootstrap: Bootstrap) -> Floats:
    """Bootstrap replicates of each row's mean, (draws, rows); items and seeds are resampled independently."""
    rows, seeds, clusters, cells = tables.sums.shape
    weights = bootstrap.items

    def columns(table: Floats) -> Floats:
        return table.transpose(2, 0, 1, 3).reshape(clusters, rows * seeds * cells)

    sums = weights @ columns(tables.sums)
    # most columns were asked the same prompts; their denominators are worked out once
    patterns, place = np.unique(columns(tables.counts), axis=1, return_inverse=True)
    with np.errstate(invalid="ignore", divide="ignore"):
        sums /= (weights @ patterns)[:, place.ravel()]
    by_seed = sums.reshape(len(weights), rows, seeds, cells).mean(axis=-1)
    if seeds == 1:
        found: Floats = by_seed[:, :, 0]
        return found
    found = np.einsum("drs,ds->dr", by_seed, bootstrap.seeds(seeds)) / seeds
    return found


def _percentiles(
    tables: Tables, bootstrap: Bootstrap, rows: Ints, values: Floats, found: Spread, *, symmetric: bool
) -> Iterator[tuple[int, Interval]]:
    """Each row that is bootstrapped, with its interval.

    BCa with the acceleration from the linearised means' skewness. The normal quantile in it is
    replaced by the row's t quantile: with ten seeds it would cover 0.91 where seeds decide.
    """
    critical = found.critical(1, symmetric=True)
    acceleration = 0 * critical if symmetric else found.total_skewness / 6
    per_row = bootstrap.draws * tables.sums.shape[1] * tables.sums.shape[3]
    for part in _chunks(rows, per_row):
        drawn = replicates(tables.subset(part), bootstrap)
        below = (drawn < values[part]).mean(axis=0) + (drawn == values[part]).mean(axis=0) / 2
        bias = distributions.norm.ppf(np.clip(below, 1 / bootstrap.draws, 1 - 1 / bootstrap.draws))
        tails = []
        for sign in (-1, 1):
            z = bias + sign * critical[part]
            tails.append(distributions.norm.cdf(bias + z / np.maximum(1 - acceleration[part] * z, 0.2)))
        for column, row in enumerate(part.tolist()):
            cut = (float(tails[0][column]), float(tails[1][column]))
            yield row, percentile(float(values[row]), drawn[:, column], tails=cut)


def no_variation(value: float, n: float, limits: tuple[float, float]) -> Interval:
    """What n equal values say: with confidence at most a share u of the population differs, u = 1 - 0.025^(1/n).

    Clopper and Pearson's bound for "none of n"; those that differ may lie anywhere inside ``limits``.
    """
    share = 1 - (0.5 - LEVEL / 2) ** (1 / n)
    return Interval(value, value - share * (value - limits[0]), value + share * (limits[1] - value))


def intervals(
    tables: Tables, bootstrap: Bootstrap, *, limits: tuple[float, float] = (0.0, 1.0), symmetric: bool = False
) -> list[Estimated]:
    """Each row's mean with its interval; ``limits`` is what the measure can be.

    ``symmetric``: no correction for skewness. For paired differences, which are symmetric where
    there is no effect; correcting for the skewness of a sample of them would raise the error rate
    of twenty items from 4 % to 7 %.
    """
    by_seed = seed_means(tables)
    values, n_seeds = by_seed.mean(axis=1), by_seed.shape[1]
    filled = (tables.counts.sum(axis=3) > 0).any(axis=1)
    n_clusters = filled.sum(axis=1)
    with np.errstate(invalid="ignore"):
        shares = (tables.counts / tables.counts.sum(axis=2, keepdims=True)).mean(axis=(1, 3))
    effective = 1 / shares.max(axis=1)  # as many items as if all weighed as much as the heaviest
    found = spread(tables)
    errors = np.sqrt(np.where(found.variance > TINY, found.variance, 0.0))
    known = ~np.isnan(values) & (n_clusters > 1)
    resampled = known & (errors > 0) & (found.item_freedom > MANY_ITEMS - 1.001)
    resampled &= n_seeds == 1 or n_seeds >= MANY_SEEDS
    resampled &= symmetric | (np.abs(found.total_skewness) < SKEWED)
    some = np.flatnonzero(resampled)
    percentiles = dict(_percentiles(tables, bootstrap, some, values, found, symmetric=symmetric))
    lows, highs = (values - sign * errors * found.critical(sign, symmetric=symmetric) for sign in (1, -1))
    freedoms = found.freedom
    nan, rows = float("nan"), []
    for i, value in enumerate(values.tolist()):
        error, freedom = float(errors[i]), float(freedoms[i])
        if np.isnan(value):
            interval, method = Interval(nan, nan, nan), "missing: a part of this average has no answers"
        elif n_clusters[i] < 2:
            interval, method = Interval(value, nan, nan), "one item only: no interval"
        elif error == 0:
            interval = no_variation(value, float(effective[i]), limits)
            method = "no variation between items: exact bound for none of n"
        elif i in percentiles:
            interval, method = percentiles[i], _bootstrap_name(n_seeds, bootstrap.draws)
        else:
            interval, method = Interval(value, float(lows[i]), float(highs[i])), _t_name(n_seeds, symmetric)
        if not known[i]:
            error = freedom = nan
        method += ONE_SEED if n_seeds == 1 else ""
        rows.append(Estimated(interval, method, int(n_clusters[i]), n_seeds, error, freedom))
    return rows


def _bootstrap_name(n_seeds: int, draws: int) -> str:
    if n_seeds == 1:
        return f"BCa bootstrap over items, {draws} draws"
    return f"crossed BCa bootstrap, {n_seeds} training seeds crossed with items, {draws} draws"


def _t_name(n_seeds: int, symmetric: bool) -> str:
    name = "t interval over items" if n_seeds == 1 else f"t interval, {n_seeds} training seeds crossed with items"
    return name if symmetric else name + ", corrected for skewness"
