"""The ground of the statistics: intervals, generators, resampling weights and agreement; arrays in, numbers out.

Replies to one prompt resemble each other, and so do the counterbalanced forms of one item, so the
unit that is resampled is always the item (the "cluster"); resampling replies would give intervals
that are too narrow. What is built on this:

- evaluate/components.py, evaluate/crossed.py: means, composites and paired differences over items
  crossed with training seeds
- evaluate/clustering.py: intraclass correlation and design effect
- evaluate/worst.py: the expected worst of k replies
- evaluate/correlation.py: rank correlations over models that come in families
- evaluate/significance.py: t, Wilcoxon, equivalence, and Holm's correction

benchmarks/coverage.py shows by simulation that the intervals cover and the tests do not cry wolf.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from candor.hashing import hash64
from evaluate.worst import worst_of as worst_of

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

LEVEL = 0.95


class Interval(NamedTuple):
    """A number with its interval; NaN where there is none."""

    value: float
    low: float
    high: float


class Estimated(NamedTuple):
    """An interval, how it was made, and what stands behind it."""

    interval: Interval
    method: str
    n_clusters: int
    n_seeds: int = 1
    standard_error: float = float("nan")
    freedom: float = float("nan")  # degrees of freedom of the standard error


def generator(seed: int, *unit: str) -> np.random.Generator:
    """A generator of its own for a named unit of work, whatever ran before it."""
    return np.random.default_rng(np.random.SeedSequence([seed, hash64(*unit)]))


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
        picks = rng.integers(0, size, size=(draws, size - 1)) + size * np.arange(draws)[:, None]
        counts = np.bincount(picks.ravel(), minlength=draws * size).reshape(draws, size)
        weights[:, members] = counts * (size / (size - 1))
    return weights


TAILS = (0.5 - LEVEL / 2, 0.5 + LEVEL / 2)


def percentile(value: float, replicates: Floats, *, tails: tuple[float, float] = TAILS) -> Interval:
    """The interval between two quantiles of bootstrap replicates; undefined ones are left out."""
    defined = replicates[~np.isnan(replicates)]
    if len(defined) == 0:
        return Interval(value, float("nan"), float("nan"))
    low, high = np.quantile(defined, tails)
    return Interval(value, float(low), float(high))


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
