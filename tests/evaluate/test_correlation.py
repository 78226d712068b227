"""Rank correlations: against scipy and statsmodels, by full enumeration, and with families."""

import itertools

import numpy as np
import pytest
import statsmodels.api as sm
from scipy import stats as scipy_stats

from evaluate.correlation import centred_ranks, codes, permutation_test, rank_correlation, rank_interval

RNG = np.random.default_rng(5)


def test_equals_scipy_with_ties():
    x, y = RNG.integers(0, 5, 15).astype(float), RNG.normal(size=15)
    assert rank_correlation(x, y) == pytest.approx(scipy_stats.spearmanr(x, y).statistic)


def test_the_partial_correlation_is_that_of_regression_residuals():
    x, y, stage = RNG.normal(size=15), RNG.normal(size=15), np.repeat([0, 1, 2], 5)
    dummies = np.eye(3)[stage]
    residuals = [sm.OLS(scipy_stats.rankdata(v), dummies).fit().resid for v in (x, y)]
    assert rank_correlation(x, y, stage) == pytest.approx(np.corrcoef(*residuals)[0, 1])


def test_given_stage_a_common_shift_of_stages_is_no_correlation():
    stage = np.repeat([0, 1, 2], 40)
    x, y = RNG.normal(size=120) + 5 * stage, RNG.normal(size=120) + 5 * stage
    assert rank_correlation(x, y) > 0.8
    assert abs(rank_correlation(x, y, stage)) < 0.3


@pytest.mark.parametrize(("x", "y"), [([1, 1, 1, 1], [1, 2, 3, 4]), ([2.0], [1.0])], ids=["constant", "one-pair"])
def test_without_an_order_there_is_no_correlation(x, y):
    assert np.isnan(rank_correlation(x, y))
    assert np.isnan(permutation_test(x, y, np.zeros(len(x), dtype=int), draws=99, rng=RNG).p_value)


@pytest.mark.parametrize("n", [3, 2], ids=["three", "two"])
def test_too_few_pairs_have_no_interval(n):
    assert np.isnan(rank_interval(0.5, n).low)


def test_the_interval_holds_its_value_and_narrows_with_n():
    few, many = rank_interval(0.8, 15), rank_interval(0.8, 100)
    assert -1 < few.low < many.low < 0.8 < many.high < few.high < 1
    perfect = rank_interval(1.0, 15)
    assert perfect.high == 1.0 and 0.9 < perfect.low < 1


def brute_force(x, y, blocks):
    """Every rearrangement of y inside blocks, by plain loops."""
    members = [np.flatnonzero(blocks == b) for b in np.unique(blocks)]
    a, b = centred_ranks(x), centred_ranks(y)
    values = []
    for orders in itertools.product(*(itertools.permutations(m) for m in members)):
        moved = b.copy()
        for m, order in zip(members, orders, strict=True):
            moved[m] = b[list(order)]
        values.append(a @ moved)
    values = np.array(values)
    return np.mean(np.abs(values - values.mean()) >= abs(a @ b - values.mean()) - 1e-9)


@pytest.mark.parametrize("trial", range(5))
def test_the_exact_test_equals_brute_force(trial):
    rng = np.random.default_rng(trial)
    x, y, blocks = rng.normal(size=9), rng.integers(0, 4, 9), np.array([0, 0, 0, 0, 1, 1, 1, 2, 2])
    found = permutation_test(x, y, blocks, draws=99, rng=rng)
    assert found.exact and found.arrangements == 24 * 6 * 2
    assert found.p_value == pytest.approx(brute_force(x, y, blocks))


def test_sampled_arrangements_agree_with_counted_ones():
    rng = np.random.default_rng(1)
    x, y, blocks = rng.normal(size=15), rng.normal(size=15), np.repeat([0, 1, 2], 5)
    y = y + 0.4 * x
    exact = permutation_test(x, y, blocks, draws=1, rng=rng)
    assert exact.exact and exact.arrangements == 120**3
    big = permutation_test(np.append(x, 9), np.append(y, 9), np.append(blocks, 3), draws=1, rng=rng)
    assert big.p_value < 1  # a family of one takes part in the correlation but cannot be permuted
    long = [np.concatenate([v, v]) for v in (x, y)]
    sampled = permutation_test(*long, np.repeat([0, 1, 2], 10), draws=4000, rng=rng)
    assert not sampled.exact and sampled.arrangements == 4000 and sampled.p_value >= 1 / 4001


def test_the_smallest_p_value_is_two_arrangements():
    x = np.arange(15.0)
    found = permutation_test(x, x, np.repeat([0, 1, 2], 5), draws=99, rng=RNG)
    assert found.p_value == pytest.approx(2 / 120**3)  # only the reverse order is as far from the mean


def test_what_families_share_is_no_evidence():
    """Both measures differ between families and by chance inside: a plain permutation is fooled."""
    rng = np.random.default_rng(2)
    family = np.repeat([0, 1, 2], 5)
    within = across = 0
    for _ in range(60):
        x, y = rng.normal(size=15) + 3 * family, rng.normal(size=15) + 3 * family
        within += permutation_test(x, y, family, draws=499, rng=rng).p_value < 0.05
        across += permutation_test(x, y, np.zeros(15, dtype=int), draws=499, rng=rng).p_value < 0.05
    assert within <= 9 and across >= 55


def test_codes_number_labels_in_order():
    assert codes(["b", "a", "b"]).tolist() == [0, 1, 0]
