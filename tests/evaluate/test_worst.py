"""The worst of k is the average over all subsets of k, for every k, and its bounds hold."""

from itertools import combinations

import numpy as np
import pytest

from evaluate.worst import order_weights, worst_bounds, worst_of, worst_of_each

SCORES = np.array([1.0, 1.0, 2.0, 4.0, 5.0, 3.0])


@pytest.mark.parametrize("k", range(1, 7))
def test_equals_the_mean_over_all_subsets(k):
    expected = np.mean([max(c) for c in combinations(SCORES, k)])
    assert worst_of(SCORES, k) == pytest.approx(expected)


def test_all_k_at_once_equal_one_by_one():
    assert worst_of_each(SCORES, range(1, 7)) == pytest.approx([worst_of(SCORES, k) for k in range(1, 7)])


def test_the_ends_are_the_mean_and_the_maximum():
    assert worst_of(SCORES, 1) == pytest.approx(SCORES.mean())
    assert worst_of(SCORES, 6) == SCORES.max()


def test_fewer_scores_than_k_give_their_maximum_and_none_gives_none():
    assert worst_of(np.array([1.0, 5.0, 2.0]), 10) == 5.0
    assert np.isnan(worst_of(np.empty(0), 3))


def test_weights_are_a_distribution_even_for_many_draws():
    weights = order_weights(2000, (1, 10, 1000, 2000))
    assert weights.sum(axis=1) == pytest.approx(1)
    assert (weights >= 0).all()


def test_the_estimator_has_no_bias_where_the_plain_maximum_of_n_has():
    """Worst of 5 from 10 draws, against the true expected maximum of 5 uniform draws, 5/6."""
    rng = np.random.default_rng(0)
    studies = rng.uniform(size=(4000, 10))
    assert np.mean([worst_of(s, 5) for s in studies]) == pytest.approx(5 / 6, abs=0.005)
    assert studies.max(axis=1).mean() > 5 / 6 + 0.05


def test_bounds_hold_whatever_the_missing_draws_were():
    rng = np.random.default_rng(1)
    everything = rng.uniform(size=10)
    lowest, highest = worst_bounds(everything[:7], 3, range(1, 11), 0.0, 1.0)
    truth = worst_of_each(everything, range(1, 11))
    assert (lowest <= truth).all() and (truth <= highest).all()
    assert highest[-1] == 1.0 and lowest[0] == pytest.approx(everything[:7].sum() / 10)
