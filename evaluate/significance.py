"""Tests, from estimates and paired differences: t, equivalence, Wilcoxon, and Holm's correction.

The t test and the equivalence test use the same standard error and degrees of freedom as the t
interval of a difference, so that an interval and its test say the same. The Wilcoxon test is the
paper's, but over items: repeated replies to one prompt are averaged first, because pooling them gives
p-values of no meaning (protocol: W up to 243 million in the paper's tables).
"""

import gc
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats as distributions
from statsmodels.stats.multitest import multipletests

from evaluate.stats import Estimated, Floats

ALPHA = 0.05
EXACT = 50  # up to this many differences without ties the Wilcoxon test counts all signs


class Tested(NamedTuple):
    """A statistic and its p-value; NaN where the test cannot be made."""

    statistic: float
    p_value: float


NOTHING = Tested(float("nan"), float("nan"))


def t_test(found: Estimated) -> Tested:
    """Two-sided test that a difference is zero."""
    value, error = found.interval.value, found.standard_error
    if np.isnan(error):
        return NOTHING
    if error == 0:
        return Tested(float("nan"), min(1.0, 2 * _none_of_n(found, abs(value) / (abs(value) + 1))))
    statistic = value / error
    return Tested(statistic, 2 * float(distributions.t.sf(abs(statistic), found.freedom)))


def equivalence_test(found: Estimated, margin: float) -> Tested:
    """Two one-sided tests (Schuirmann 1987) that a difference lies inside +/- margin; the larger p-value.

    A small p-value means: the difference is shown to be smaller than the margin.
    """
    value, error = found.interval.value, found.standard_error
    if np.isnan(error):
        return NOTHING
    room = margin - abs(value)
    if error == 0:
        return Tested(float("nan"), _none_of_n(found, room / (1 - abs(value))) if room > 0 else 1.0)
    return Tested(room / error, float(distributions.t.sf(room / error, found.freedom)))


def _none_of_n(found: Estimated, share: float) -> float:
    """Chance that none of the items differs although a share of the population does (cf. crossed.no_variation)."""
    return float((1 - share) ** found.n_clusters)


def wilcoxon_test(differences: Floats) -> Tested:
    """Wilcoxon's signed-rank test of paired differences, one per item; NaN is missing, zeros are dropped."""
    there = differences[~np.isnan(differences)]
    if len(there) == 0:
        return NOTHING
    if not there.any():
        return Tested(0.0, 1.0)
    sizes = np.abs(there[there != 0])
    tied = len(np.unique(sizes)) < len(there)
    found = distributions.wilcoxon(there, method="asymptotic" if tied or len(there) > EXACT else "exact")
    return Tested(float(found.statistic), float(found.pvalue))


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for the whole family (Holm 1979); NaN stays NaN and counts for nothing."""
    values = np.asarray(p_values, dtype=np.float64)
    there = ~np.isnan(values)
    corrected = np.full(len(values), np.nan)
    if there.any():
        gc.freeze()  # multipletests collects garbage at every call, which costs more than all else beside large tables
        try:
            corrected[there] = multipletests(values[there], alpha=ALPHA, method="holm")[1]
        finally:
            gc.unfreeze()
    return corrected.tolist()
