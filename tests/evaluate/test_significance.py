"""Tests against scipy and statsmodels, by hand at the edges, and Holm's correction."""

import numpy as np
import pytest
from scipy import stats as scipy_stats
from statsmodels.stats.weightstats import ttost_paired

from evaluate import components, crossed
from evaluate.significance import equivalence_test, holm, t_test, wilcoxon_test

RNG = np.random.default_rng(7)


def estimated(differences):
    """The mean difference of some items."""
    values, columns = np.asarray(differences, dtype=float)[None, None], np.arange(len(differences))
    tables = components.tabulate(values, columns, np.zeros_like(columns), np.zeros_like(columns))
    bootstrap = crossed.Bootstrap(tables.strata, 200, 1, tuple(map(str, columns)))
    return crossed.intervals(tables, bootstrap, limits=(-1.0, 1.0), symmetric=True)[0]


def test_the_t_test_is_that_of_scipy_for_independent_items():
    differences = RNG.normal(0.1, 0.3, 15)
    assert t_test(estimated(differences)).p_value == pytest.approx(scipy_stats.ttest_1samp(differences, 0).pvalue)


@pytest.mark.parametrize("mean", [0.0, 0.08, 0.2])
def test_equivalence_is_that_of_statsmodels(mean):
    differences = mean + RNG.normal(0, 0.1, 40)
    expected = ttost_paired(differences, np.zeros(40), -0.1, 0.1)[0]
    assert equivalence_test(estimated(differences), 0.1).p_value == pytest.approx(expected)


def test_a_test_and_its_interval_agree():
    """The interval excludes zero exactly when p is below 0.05."""
    for shift in np.linspace(-0.6, 0.2, 30):
        found = estimated(RNG.exponential(0.3, 20) + shift)
        assert (t_test(found).p_value < 0.05) == (not found.interval.low <= 0 <= found.interval.high)


def test_no_significant_difference_is_not_equivalence():
    """Ten noisy items: nothing is shown either way."""
    differences = RNG.normal(0.0, 0.5, 10)
    found = estimated(differences)
    assert t_test(found).p_value > 0.05 and equivalence_test(found, 0.1).p_value > 0.05


def test_no_variation_gives_the_chance_of_seeing_none_of_n():
    found = estimated(np.zeros(20))
    assert t_test(found).p_value == 1.0
    assert equivalence_test(found, 0.1).p_value == pytest.approx(0.9**20)
    assert t_test(estimated(np.full(20, 0.5))).p_value < 0.01
    assert equivalence_test(estimated(np.full(20, 0.5)), 0.1).p_value == 1.0


def test_a_missing_difference_has_no_test():
    found = estimated([np.nan, np.nan])
    assert np.isnan(t_test(found).p_value) and np.isnan(equivalence_test(found, 0.1).p_value)


def test_wilcoxon_is_that_of_scipy_and_counts_no_missing_items():
    differences = RNG.normal(0.1, 0.3, 40)
    expected = scipy_stats.wilcoxon(differences)
    assert wilcoxon_test(np.append(differences, np.nan)) == pytest.approx((expected.statistic, expected.pvalue))
    assert wilcoxon_test(np.zeros(5)) == (0.0, 1.0)
    assert np.isnan(wilcoxon_test(np.array([np.nan])).p_value)


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    found = holm([0.04, float("nan")])
    assert found[0] == pytest.approx(0.04) and np.isnan(found[1])
    assert holm([]) == []
