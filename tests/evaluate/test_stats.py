"""Intervals cover the truth at their stated rate, and planted mistakes make them fail.

pytest tests/evaluate/test_stats.py
"""

import subprocess
import sys

import numpy as np
import pytest
from scipy import stats as scipy_stats

from evaluate import stats

DRAWS = 300
# 95 % +/- what 400 studies leave to chance, and a little for the bootstrap's own roughness
RANGE = (0.91, 0.98)


def one_cell(values, clusters, strata=None):
    n = int(clusters.max()) + 1
    strata = np.zeros(n, dtype=np.int64) if strata is None else strata
    return stats.tabulate(values, clusters, np.zeros_like(clusters), strata)


def bootstrap(table, seed, draws=DRAWS):
    weights = stats.resampling_weights(table.strata, draws, stats.generator(seed, "test"))
    return stats.interval(table, weights).interval


def coverage(study, truth, studies=400):
    hits = 0
    for seed in range(studies):
        found = study(np.random.default_rng([seed, 1]), seed)
        hits += found.low <= truth <= found.high
    return hits / studies


def clustered(rng, n_clusters, per_cluster, between=1.0, within=1.0):
    clusters = np.repeat(np.arange(n_clusters), per_cluster)
    return rng.normal(0, between, n_clusters)[clusters] + rng.normal(0, within, clusters.size), clusters


@pytest.mark.parametrize(
    "n_clusters", [pytest.param(3, id="t"), pytest.param(12, id="t12"), pytest.param(40, id="bootstrap")]
)
def test_the_interval_of_a_mean_covers_the_truth(n_clusters):
    def study(rng, seed):
        return bootstrap(one_cell(*clustered(rng, n_clusters, 5)), seed)

    assert RANGE[0] <= coverage(study, 0.0) <= RANGE[1]


def test_resampling_replies_instead_of_prompts_fails_to_cover():
    """The planted fault that this module exists to avoid."""

    def study(rng, seed):
        values, _ = clustered(rng, 40, 5)
        return bootstrap(one_cell(values, np.arange(values.size)), seed)

    assert coverage(study, 0.0, studies=200) < 0.85


def test_small_strata_are_not_too_narrow():
    """Six strata of five items, as the unseen intentions have; a plain bootstrap is a tenth too narrow."""
    strata = np.repeat(np.arange(6), 5)

    def study(rng, seed):
        level = np.arange(6.0)[strata]  # strata differ by far more than items do
        values = level + rng.normal(0, 1, 30)
        return bootstrap(one_cell(values, np.arange(30), strata), seed)

    assert RANGE[0] <= coverage(study, 2.5) <= RANGE[1]


def composite(rng, sizes=(10, 10, 25, 10), dimensions=6):
    """Four formats, items shared by six dimensions: the shape of self-assessment."""
    values, clusters, cells, strata = [], [], [], []
    first = 0
    for fmt, size in enumerate(sizes):
        item = rng.normal(0, 1 + fmt, size)  # the leaning of an item is common to all dimensions
        for dimension in range(dimensions):
            values.append(item + rng.normal(0, 0.5, size))
            clusters.append(first + np.arange(size))
            cells.append(np.full(size, fmt * dimensions + dimension))
        strata.append(np.full(size, fmt))
        first += size
    parts = [np.concatenate(x) for x in (values, clusters, cells, strata)]
    return stats.tabulate(parts[0], parts[1], parts[2], parts[3], n_cells=len(sizes) * dimensions), parts


@pytest.mark.parametrize("sizes", [(10, 10, 25, 10), (2, 2, 5, 2)], ids=["all-items", "unseen-items"])
def test_the_composite_over_formats_covers(sizes):
    assert RANGE[0] <= coverage(lambda rng, seed: bootstrap(composite(rng, sizes)[0], seed), 0.0) <= 0.995


def test_treating_the_dimensions_of_one_item_as_independent_fails_to_cover():
    def study(rng, seed):
        _, (values, clusters, cells, strata) = composite(rng)
        apart = cells * 100 + clusters  # an item becomes six
        _, codes = np.unique(apart, return_inverse=True)
        owner = np.zeros(codes.max() + 1, dtype=np.int64)
        owner[codes] = strata[clusters]
        return bootstrap(stats.tabulate(values, codes, cells, owner, n_cells=24), seed)

    assert coverage(study, 0.0, studies=100) < 0.85


def test_a_paired_difference_is_narrow_and_swapped_pairs_are_caught():
    rng = np.random.default_rng(3)
    lean = rng.normal(0, 1, 60)
    first, second = lean + 0.3 + rng.normal(0, 0.1, 60), lean + rng.normal(0, 0.1, 60)
    items = np.arange(60)
    paired = bootstrap(one_cell(first - second, items), 1)
    swapped = bootstrap(one_cell(first - np.roll(second, 1), items), 1)
    assert paired.low > 0.2 and paired.high < 0.4
    assert swapped.high - swapped.low > 5 * (paired.high - paired.low)


def test_a_composite_is_the_mean_of_cell_means_not_of_values():
    values = np.array([0.0, 0.0, 0.0, 1.0])
    table = stats.tabulate(values, np.arange(4), np.array([0, 0, 0, 1]), np.array([0, 0, 0, 1]), n_cells=2)
    assert stats.mean_of_cells(table) == 0.5


def test_a_cell_without_values_makes_the_composite_missing():
    values = np.array([0.2, 0.4, np.nan, np.nan])
    table = stats.tabulate(values, np.arange(4), np.array([0, 0, 1, 1]), np.array([0, 0, 1, 1]), n_cells=2)
    weights = stats.resampling_weights(table.strata, 100, stats.generator(0, "x"))
    found = stats.interval(table, weights)
    assert np.isnan(found.interval).all() and "missing" in found.method


def test_missing_values_are_left_out_not_zero():
    found = bootstrap(one_cell(np.array([0.5, np.nan, 0.7]), np.array([0, 0, 1])), 1)
    assert found.value == pytest.approx(0.6)


def test_one_item_has_no_interval():
    found = stats.interval(one_cell(np.array([0.5]), np.array([0])), np.ones((100, 1)))
    assert found.interval.value == 0.5 and np.isnan(found.interval.low) and "no interval" in found.method


def test_no_variation_is_said():
    found = stats.interval(one_cell(np.zeros(5), np.arange(5)), np.ones((100, 5)))
    assert "no variation" in found.method and found.interval == (0, 0, 0)


def test_the_t_interval_equals_the_textbook_for_balanced_clusters():
    values = np.array([0.1, 0.4, 0.2, 0.9, 0.5])
    found = bootstrap(one_cell(values, np.arange(5)), 1)
    low, high = scipy_stats.t.interval(0.95, 4, values.mean(), scipy_stats.sem(values))
    assert found == pytest.approx((values.mean(), low, high))


def test_rao_wu_weights_have_the_unbiased_variance():
    strata = np.repeat(np.arange(4), 5)
    weights = stats.resampling_weights(strata, 20_000, np.random.default_rng(0))
    values = np.random.default_rng(1).normal(size=20)
    expected = sum(values[strata == s].var(ddof=1) / 5 for s in range(4)) / 16
    assert (weights @ values / 20).var() == pytest.approx(expected, rel=0.05)
    assert weights.sum(axis=1) == pytest.approx(20)


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


def test_seeds_crossed_with_items_cover():
    """Three training seeds with their own effects, over the same 40 items."""

    def study(rng, seed):
        item, run = rng.normal(0, 1, 40), rng.normal(0, 0.3, 3)
        tables = [one_cell(item + r + rng.normal(0, 0.3, 40), np.arange(40)) for r in run]
        return stats.crossed_interval(tables).interval

    assert coverage(study, 0.0, studies=300) >= 0.92


def test_ignoring_the_seeds_fails_to_cover():
    def study(rng, seed):
        item, run = rng.normal(0, 0.3, 40), rng.normal(0, 1, 3)
        mean = np.mean([item + r for r in run], axis=0)
        return bootstrap(one_cell(mean, np.arange(40)), seed)

    assert coverage(study, 0.0, studies=200) < 0.7


def test_spearman_equals_scipy_with_ties():
    rng = np.random.default_rng(5)
    x, y = rng.integers(0, 5, 15).astype(float), rng.normal(size=15)
    found = stats.spearman(x, y, draws=500, rng=rng)
    assert found.value == pytest.approx(scipy_stats.spearmanr(x, y).statistic)
    assert -1 <= found.low < found.value < found.high <= 1


@pytest.mark.parametrize(("x", "y"), [([1, 1, 1, 1], [1, 2, 3, 4]), ([1, 2], [1, 2])])
def test_spearman_without_an_answer_is_nan(x, y):
    assert np.isnan(stats.spearman(x, y, draws=100, rng=np.random.default_rng(0)).value)


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


def test_worst_of_is_the_maximum_of_ten():
    assert stats.worst_of(np.array([1.0, 5.0, 2.0]), 10) == 5.0
    assert stats.worst_of(np.arange(10.0), 10) == 9.0


def test_worst_of_fewer_than_drawn_is_the_mean_over_all_subsets():
    from itertools import combinations

    scores = np.array([1.0, 1.0, 2.0, 4.0, 5.0, 3.0])
    for k in range(1, 7):
        expected = np.mean([max(c) for c in combinations(scores, k)])
        assert stats.worst_of(scores, k) == pytest.approx(expected)


def test_units_of_work_have_their_own_reproducible_numbers():
    a, b, c = (stats.generator(1, *u).random() for u in (("x", "y"), ("x", "y"), ("xy",)))
    assert a == b != c


def test_the_module_loads_no_torch():
    code = "import sys, evaluate.stats; sys.exit('torch' in sys.modules or 'pandas' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
