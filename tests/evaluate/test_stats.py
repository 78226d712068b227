"""Resampling weights, strata, generators and agreement.

pytest tests/evaluate/test_stats.py
"""

import subprocess
import sys

import numpy as np
import pytest

from evaluate import stats


def test_rao_wu_weights_have_the_unbiased_variance():
    strata = np.repeat(np.arange(4), 5)
    weights = stats.resampling_weights(strata, 20_000, np.random.default_rng(0))
    values = np.random.default_rng(1).normal(size=20)
    expected = sum(values[strata == s].var(ddof=1) / 5 for s in range(4)) / 16
    assert (weights @ values / 20).var() == pytest.approx(expected, rel=0.05)
    assert weights.sum(axis=1) == pytest.approx(20)
    inside = [weights[:, strata == s].sum(axis=1) for s in range(4)]
    assert np.allclose(inside, 5)  # every stratum keeps its size in every draw


@pytest.mark.parametrize(
    ("strata", "merged"),
    [
        ([0, 0, 1, 1], [0, 0, 1, 1]),
        ([0, 0, 1, 2], [0, 0, 1, 1]),  # two singles share
        ([0, 0, 0, 1, 1, 2], [0, 0, 0, 1, 1, 1]),  # one single joins the smallest
        ([7], [0]),
    ],
)
def test_single_strata_are_joined(strata, merged):
    assert stats.merge_small_strata(np.array(strata)).tolist() == merged


def test_percentiles_cut_off_the_tails_that_are_asked_for():
    replicates = np.append(np.arange(1001.0), np.nan)
    assert stats.percentile(500, replicates) == pytest.approx((500, 25, 975))
    assert stats.percentile(500, replicates, tails=(0.01, 0.9)) == pytest.approx((500, 10, 900))
    assert np.isnan(stats.percentile(1.0, np.array([np.nan])).low)


def test_kappa_by_hand():
    """Two grades used out of three; worked out on paper: observed 0.2 x 4 = 0.8, expected 0.5 x 4 = 2, kappa 0.6."""
    table = np.array([[4, 0, 1], [0, 0, 0], [1, 0, 4]])
    assert float(stats.quadratic_kappa(table)) == pytest.approx(0.6)


def test_kappa_extremes():
    assert float(stats.quadratic_kappa(np.eye(5))) == pytest.approx(1.0)
    assert float(stats.quadratic_kappa(np.outer([1, 2, 1], [3, 1, 1]))) == pytest.approx(0.0)
    assert float(stats.quadratic_kappa(np.array([[0, 2], [2, 0]]))) == pytest.approx(-1.0)
    assert np.isnan(stats.quadratic_kappa(np.array([[3, 0], [0, 0]])))


def test_confusion_counts_truth_by_row():
    table = stats.confusion(np.array([1, 1, 3]), np.array([2, 1, 3]), 3)
    assert table.tolist() == [[1, 1, 0], [0, 0, 0], [0, 0, 1]]


def test_units_of_work_have_their_own_reproducible_numbers():
    a, b, c = (stats.generator(1, *u).random() for u in (("x", "y"), ("x", "y"), ("xy",)))
    assert a == b != c


def test_the_module_loads_no_torch():
    code = "import sys, evaluate.stats; sys.exit('torch' in sys.modules or 'pandas' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
