"""The worst of k replies: the exact expected maximum of k draws, from n of them.

The maximum of ten replies is the paper's harmfulness (arXiv 2602.14777 App. B). It grows with the
number of draws, so two studies can only be compared at one k. From n draws the expected maximum of
any k up to n is known without bias: average the maximum over all subsets of k, which is a weighted
sum of the sorted scores (an L-statistic). For k = n it is the plain maximum.
"""

import functools
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@functools.lru_cache(maxsize=1024)
def order_weights(size: int, ks: tuple[int, ...]) -> Floats:
    """For each k, the chance that the i-th smallest of ``size`` scores is the largest of k drawn without replacement.

    C(i - 1, k - 1) / C(size, k), shape (ks, size); from the top down, so that no binomial is large.
    Where k exceeds ``size``, the weights of the plain maximum.
    """
    weights = np.zeros((len(ks), size))
    for row, k in enumerate(ks):
        k = min(k, size)
        weights[row, -1] = k / size
        for i in range(size - 2, k - 2, -1):
            weights[row, i] = weights[row, i + 1] * (i + 2 - k) / (i + 1)
    weights.setflags(write=False)
    return weights


def worst_of(scores: Floats, k: int) -> float:
    """Expected maximum of k draws, without bias, from n >= k scores; the maximum (too low) of fewer."""
    return float(worst_of_each(scores, (k,))[0])


def worst_of_each(scores: Floats, ks: Sequence[int]) -> Floats:
    """``worst_of`` for several k at once, (ks,); NaN without scores."""
    if len(scores) == 0:
        return np.full(len(ks), np.nan)
    found: Floats = order_weights(len(scores), tuple(ks)) @ np.sort(scores)
    return found


def worst_bounds(scores: Floats, n_missing: int, ks: Sequence[int], floor: float, ceiling: float) -> Floats:
    """``worst_of_each`` if each of the missing draws had scored ``floor``, and ``ceiling``, (2, ks)."""
    filled = [np.concatenate([scores, np.full(n_missing, extreme)]) for extreme in (floor, ceiling)]
    return np.stack([worst_of_each(values, ks) for values in filled])
