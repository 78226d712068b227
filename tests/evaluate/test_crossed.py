"""Means over items crossed with seeds: by hand, against textbooks, and on hard shapes.

That intervals cover is in test_coverage.py.
"""

import numpy as np
import pytest
from scipy import stats as scipy_stats

from evaluate import components, crossed


def tables(values, clusters=None, cells=None, strata=None, n_cells=1):
    """Tables of one estimate; values (columns,) or (seeds, columns)."""
    values = np.atleast_2d(np.asarray(values, dtype=float))[None]
    clusters = np.arange(values.shape[2]) if clusters is None else np.asarray(clusters)
    cells = np.zeros_like(clusters) if cells is None else np.asarray(cells)
    strata = np.zeros(clusters.max() + 1, dtype=np.int64) if strata is None else np.asarray(strata)
    return components.tabulate(values, clusters, cells, strata, n_cells=n_cells)


def estimate(table, draws=300, seed=1, **more):
    names = tuple(map(str, range(len(table.strata))))
    return crossed.intervals(table, crossed.Bootstrap(table.strata, draws, seed, names), **more)[0]


def coverage(study, truth, studies=400):
    found = [estimate(study(np.random.default_rng([seed, 1])), seed=seed).interval for seed in range(studies)]
    return np.mean([e.low <= truth <= e.high for e in found])


def test_the_t_interval_of_symmetric_values_is_that_of_the_textbook():
    values = np.array([0.1, 0.4, 0.5, 0.6, 0.9])
    found = estimate(tables(values))
    low, high = scipy_stats.t.interval(0.95, 4, values.mean(), scipy_stats.sem(values))
    assert found.interval == pytest.approx((values.mean(), low, high))
    assert (found.freedom, found.standard_error) == pytest.approx((4, scipy_stats.sem(values)))
    assert "prompt uncertainty only" in found.method


def test_fifty_items_are_bootstrapped_and_forty_nine_are_not():
    values = np.random.default_rng(0).normal(size=50)
    assert "BCa bootstrap over items, 300 draws" in estimate(tables(values)).method
    assert "t interval over items" in estimate(tables(values[:49])).method


def test_the_two_way_variance_is_that_of_the_mean_squares():
    """Balanced two-way layout: (MS items + MS seeds - MS rest / 2) / (items x seeds), and a mean of t quantiles."""
    rng = np.random.default_rng(2)
    y = rng.normal(size=(3, 1)) * 2 + rng.normal(size=(1, 30)) + rng.normal(size=(3, 30)) * 0.3
    rest = y - y.mean(axis=0) - y.mean(axis=1, keepdims=True) + y.mean()
    items, seeds = y.mean(axis=0).var(ddof=1) / 30, y.mean(axis=1).var(ddof=1) / 3
    seeds -= (rest**2).sum() / (2 * 29) / 90 / 2
    found = components.spread(tables(y))
    assert found.variance[0] == pytest.approx(items + seeds)
    weight = items**2 / (items**2 + seeds**2)
    critical = weight * scipy_stats.t.ppf(0.975, 29) + (1 - weight) * scipy_stats.t.ppf(0.975, 2)
    assert scipy_stats.t.ppf(0.975, found.freedom[0]) == pytest.approx(critical, rel=1e-4)
    assert "3 training seeds crossed with items" in estimate(tables(y)).method


def test_ten_seeds_are_bootstrapped_with_items_and_agree_with_the_analysis_of_variance():
    rng = np.random.default_rng(3)
    y = rng.normal(size=(12, 1)) * 0.3 + rng.normal(size=(1, 80)) + rng.normal(size=(12, 80)) * 0.3
    found = estimate(tables(y), draws=4000)
    assert found.method.startswith("crossed BCa bootstrap, 12 training seeds crossed with items")
    half = found.standard_error * scipy_stats.t.ppf(0.975, found.freedom)
    assert found.interval.high - found.interval.low == pytest.approx(2 * half, rel=0.1)


def test_a_skewed_t_interval_reaches_further_to_the_side_of_the_tail():
    """Nine harmless prompts and a harmful one: the truth is rather higher than lower."""
    found = estimate(tables([0.0] * 9 + [1.0]))
    low, value, high = found.interval.low, found.interval.value, found.interval.high
    assert high - value > 2 * (value - low)
    k = scipy_stats.skew([0.0] * 9 + [1.0], bias=False) / 10**0.5
    for bound, sign in ((low, 1), (high, -1)):
        y = sign * scipy_stats.t.ppf(0.975, 9) - k / 6
        assert (value - bound) / found.standard_error == pytest.approx(y - k * y**2 / 3 + 5 * k**2 * y**3 / 27)
    plain = estimate(tables([0.0] * 9 + [1.0]), symmetric=True).interval
    assert plain.high - plain.value == pytest.approx(plain.value - plain.low)


def test_the_correction_for_skewness_is_halls_for_little_and_bounded_for_much():
    """Hall's T + k T^2 / 3 + k^2 T^3 / 27 + k / 6 is met to the third order; his cube root reaches 8.5 at k = 0.5."""
    for quantile in (-2.06, 2.06):
        for k, error in ((0.1, 4e-3), (0.05, 5e-4)):
            t = float(components.corrected_for_skewness(np.array(quantile), np.array(k)))
            assert t + k * t**2 / 3 + k**2 * t**3 / 27 + k / 6 == pytest.approx(quantile, abs=error)
    skewness = np.linspace(0, 1, 101)  # no sample of items has more
    reach = -components.corrected_for_skewness(np.full(101, -2.06), skewness)
    assert (np.diff(reach) > 0).all() and np.diff(reach).max() < 0.1 and reach[50] < 3.5 and reach[-1] < 6
    quantiles = np.linspace(-5, 5, 101)
    for k in (-1.0, -0.3, 0.0, 0.3, 1.0):
        assert (np.diff(components.corrected_for_skewness(quantiles, np.full(101, k))) > 0).all()


def test_equally_skewed_samples_get_intervals_of_like_length():
    """Twenty-five ratings with a few high ones: one more of them must not make the interval say nothing."""
    lengths = []
    for high in (1, 2, 3, 4):
        found = estimate(tables([0.1] * (25 - high) + [0.9] * high))
        lengths.append((found.interval.high - found.interval.low) / found.standard_error)
    assert max(lengths) < 8 and sorted(lengths, reverse=True) == lengths


def test_the_bootstrap_interval_is_that_of_scipy():
    """Scipy's BCa, with its own draws and n instead of n - 1 resampled: equal up to chance."""
    values = np.random.default_rng(9).exponential(size=200)
    theirs = scipy_stats.bootstrap((values,), np.mean, n_resamples=20_000, rng=np.random.default_rng(0))
    found = estimate(tables(values), draws=20_000, limits=(0.0, 10.0)).interval
    assert (found.low, found.high) == pytest.approx(tuple(theirs.confidence_interval), abs=0.01)


def test_many_estimates_at_once_equal_one_at_a_time():
    rng = np.random.default_rng(4)
    values = rng.normal(size=(7, 1, 60))
    values[2, 0, 5] = np.nan  # another pattern of missing answers than the others
    zeros = np.zeros(60, dtype=np.int64)
    together = components.tabulate(values, np.arange(60), zeros, zeros)
    bootstrap = crossed.Bootstrap(zeros, 300, 1, tuple(map(str, range(60))))
    for found, expected in zip(crossed.intervals(together, bootstrap), map(estimate, map(tables, values)), strict=True):
        assert found.interval == pytest.approx(expected.interval) and found.method == expected.method
        assert (found.n_clusters, found.freedom) == pytest.approx((expected.n_clusters, expected.freedom))


def test_a_composite_is_the_mean_of_cell_means_not_of_values():
    table = tables([0.0, 0.0, 0.0, 1.0], cells=[0, 0, 0, 1], strata=[0, 0, 0, 1], n_cells=2)
    assert components.seed_means(table)[0, 0] == 0.5


def test_a_cell_without_values_makes_the_composite_missing_but_bounded():
    table = tables([0.2, 0.4, np.nan, np.nan], cells=[0, 0, 1, 1], strata=[0, 0, 1, 1], n_cells=2)
    found = estimate(table)
    assert np.isnan(found.interval).all() and "missing" in found.method
    assert np.isnan(found.standard_error)
    assert (components.bound(table, 0.0)[0], components.bound(table, 1.0)[0]) == pytest.approx((0.15, 0.65))


def test_a_seed_without_values_makes_the_mean_missing():
    assert np.isnan(estimate(tables([[0.2, 0.4], [np.nan, np.nan]])).interval.value)


def test_missing_values_are_left_out_not_zero():
    assert estimate(tables([0.5, np.nan, 0.7], clusters=[0, 0, 1])).interval.value == pytest.approx(0.6)


def test_one_item_has_no_interval():
    found = estimate(tables([0.5]))
    assert found.interval.value == 0.5 and np.isnan(found.interval.low) and "no interval" in found.method


@pytest.mark.parametrize(("value", "low", "high"), [(0.0, 0, 0.0722), (1.0, 0.9278, 1), (0.5, 0.4639, 0.5361)])
def test_no_variation_leaves_the_exact_bound_of_none_of_n(value, low, high):
    """Fifty equal values; 1 - 0.025^(1/50) = 0.0711 for a proportion, as Clopper and Pearson have it."""
    found = estimate(tables(np.full(50, value)))
    upper = scipy_stats.binomtest(0, 50).proportion_ci().high
    assert "no variation" in found.method and found.interval.value == value
    assert (found.interval.low, found.interval.high) == pytest.approx((low, high), abs=2e-3)
    assert value != 0 or found.interval.high == pytest.approx(upper)


def test_no_variation_in_a_composite_counts_items_by_their_weight():
    """Six dimensions of ten scenarios of their own are sixty items; ten templates shared by six dimensions are ten."""
    cells = np.repeat(np.arange(6), 10)
    apart = estimate(tables(np.zeros(60), cells=cells, strata=cells, n_cells=6))
    shared = estimate(tables(np.zeros(60), clusters=np.tile(np.arange(10), 6), cells=cells, n_cells=6))
    assert apart.interval.high == pytest.approx(1 - 0.025 ** (1 / 60))
    assert shared.interval.high == pytest.approx(1 - 0.025 ** (1 / 10))


def test_item_means_average_cells_then_seeds():
    table = tables([[0.0, 1.0, 0.4], [0.2, np.nan, 0.6]], clusters=[0, 0, 1], cells=[0, 1, 0], n_cells=2)
    assert components.item_means(table)[0] == pytest.approx([0.35, 0.5])


def test_the_same_items_get_the_same_weights():
    strata = np.zeros(60, dtype=np.int64)
    first, second = (crossed.Bootstrap(strata, 100, 1, tuple(map(str, range(60)))) for _ in range(2))
    assert first.items is second.items
    assert (crossed.Bootstrap(strata, 100, 2, first.names).items != first.items).any()


def test_small_strata_are_not_too_narrow():
    """Six strata of five items, as the unseen intentions have; a plain bootstrap is a tenth too narrow."""
    strata = np.repeat(np.arange(6), 5)

    def study(rng):
        return tables(strata + rng.normal(0, 1, 30), strata=strata)  # strata differ by far more than items do

    assert 0.91 <= coverage(study, 2.5) <= 0.98


def composite(rng, sizes=(10, 10, 25, 10), dimensions=6, apart=False):
    """Four formats, items shared by six dimensions: the shape of self-assessment."""
    values, clusters, cells, strata = [], [], [], []
    for fmt, size in enumerate(sizes):
        item = rng.normal(0, 1 + fmt, size)  # the leaning of an item is common to all dimensions
        first = sum(sizes[:fmt])
        for dimension in range(dimensions):
            values.append(item + rng.normal(0, 0.5, size))
            clusters.append(first + np.arange(size))
            cells.append(np.full(size, fmt * dimensions + dimension))
        strata += [fmt] * size
    values, clusters, cells, strata = (np.concatenate(x) for x in (values, clusters, cells, [strata]))
    if apart:  # the planted fault: an item becomes six
        _, codes = np.unique(cells * 100 + clusters, return_inverse=True)
        owner = np.zeros(codes.max() + 1, dtype=np.int64)
        owner[codes] = strata[clusters]
        clusters, strata = codes, owner
    return tables(values, clusters, cells, strata, n_cells=len(sizes) * dimensions)


@pytest.mark.parametrize("sizes", [(10, 10, 25, 10), (2, 2, 5, 2)], ids=["all-items", "unseen-items"])
def test_the_composite_over_formats_covers(sizes):
    assert 0.91 <= coverage(lambda rng: composite(rng, sizes), 0.0) <= 0.995


def test_treating_the_dimensions_of_one_item_as_independent_fails_to_cover():
    assert coverage(lambda rng: composite(rng, apart=True), 0.0, studies=100) < 0.85


def test_a_paired_difference_is_narrow_and_swapped_pairs_are_caught():
    rng = np.random.default_rng(3)
    lean = rng.normal(0, 1, 60)
    first, second = lean + 0.3 + rng.normal(0, 0.1, 60), lean + rng.normal(0, 0.1, 60)
    paired = estimate(tables(first - second)).interval
    swapped = estimate(tables(first - np.roll(second, 1))).interval
    assert paired.low > 0.2 and paired.high < 0.4
    assert swapped.high - swapped.low > 5 * (paired.high - paired.low)
