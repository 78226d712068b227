"""How alike the answers to one item are: intraclass correlation and design effect.

Ten replies to one prompt are not ten observations. The intraclass correlation (one-way analysis of
variance with unequal cluster sizes, as in Donner 1986) is the share of the variance between answers
that lies between items; the design effect is the variance of an estimate over that of as many
independent answers, so n / design effect is what n answers were worth. Values of 0.5 and 5-7 are
seen with ten replies a prompt (reference: the 7B replication, ten replies to 350 questions).

An answer is one reply, or, where a score is no mean over replies (a worst of k, an exact
probability, a paired difference), one score.
"""

from typing import NamedTuple

import numpy as np

from evaluate.stats import Floats, Ints


class Clustering(NamedTuple):
    """NaN where it is not defined."""

    icc: float
    naive_variance: float  # of the mean of cells, if all answers were independent


def clustering(
    values: Floats, n: Floats, variance: Floats, clusters: Ints, cells: Ints, *, n_cells: int = 1
) -> Clustering:
    """One estimate's clustering, from scores (seeds, columns), the answers behind each and their variance.

    Values are taken as deviations from their cell's mean, so that what differs between formats and
    dimensions by construction does not count as likeness inside items.
    """
    there = ~np.isnan(values)
    value = values[there]
    cell, cluster = (np.broadcast_to(codes, values.shape)[there] for codes in (cells, clusters))
    repeated = ~np.isnan(variance[there]) & (n[there] > 1)
    size = np.where(repeated, n[there], 1.0)
    within = np.where(repeated, (size - 1) * np.where(repeated, variance[there], 0.0), 0.0)
    per_cell = np.bincount(cell, minlength=n_cells)
    if (per_cell == 0).any():
        return Clustering(float("nan"), float("nan"))
    deviation = value - (np.bincount(cell, weights=value, minlength=n_cells) / per_cell)[cell]
    squares = size * deviation**2 + within
    answers = np.bincount(cell, weights=size, minlength=n_cells)
    naive = np.bincount(cell, weights=squares, minlength=n_cells)
    with np.errstate(invalid="ignore", divide="ignore"):
        naive_variance = float((naive / (answers - 1) / answers).sum() / n_cells**2)
    return Clustering(_icc(size, size * deviation, float(squares.sum()), cluster), naive_variance)


def _icc(size: Floats, total: Floats, squares: float, cluster: Ints) -> float:
    """Intraclass correlation from each score's size and sum, and the overall sum of squares."""
    _, codes = np.unique(cluster, return_inverse=True)
    sizes, totals = np.bincount(codes, weights=size), np.bincount(codes, weights=total)
    n, groups = sizes.sum(), len(sizes)
    if groups < 2 or n <= groups:
        return float("nan")
    between_squares = float((totals**2 / sizes).sum())
    inside = max(squares - between_squares, 0.0) / (n - groups)
    between = (between_squares - totals.sum() ** 2 / n) / (groups - 1)
    typical = (n - (sizes**2).sum() / n) / (groups - 1)
    scale = between + (typical - 1) * inside
    return float((between - inside) / scale) if scale > 0 else float("nan")
