"""Intraclass correlation and design effect: by hand, against statsmodels, and at the planted value."""

import numpy as np
import pytest
import statsmodels.api as sm

from evaluate.clustering import clustering


def replies(rng, items, each, icc):
    """(items, each) replies whose intraclass correlation is ``icc``."""
    return rng.normal(0, icc**0.5, (items, 1)) + rng.normal(0, (1 - icc) ** 0.5, (items, each))


def alike(table, cells=None, n_cells=1):
    """Scores as the batteries hand them over: the mean of the replies, how many, and their variance."""
    columns = np.arange(len(table))
    n, variance = np.full((1, len(table)), float(table.shape[1])), table.var(axis=1, ddof=1)[None]
    cells = np.zeros_like(columns) if cells is None else cells
    return clustering(table.mean(axis=1)[None], n, variance, columns, cells, n_cells=n_cells)


def test_equals_the_mixed_model_of_statsmodels():
    """For balanced clusters restricted maximum likelihood and the analysis of variance agree."""
    table = replies(np.random.default_rng(0), 40, 6, 0.5)
    fit = sm.MixedLM(table.ravel(), np.ones(table.size), groups=np.repeat(np.arange(40), 6)).fit(reml=True)
    between, within = float(fit.cov_re[0, 0]), float(fit.scale)
    found = alike(table)
    assert found.icc == pytest.approx(between / (between + within), abs=1e-3)
    assert found.naive_variance == pytest.approx(table.var(ddof=1) / table.size)


def test_scores_and_single_replies_say_the_same():
    table = replies(np.random.default_rng(1), 30, 4, 0.4)
    single = clustering(
        table.reshape(1, -1),
        np.ones((1, table.size)),
        np.full((1, table.size), np.nan),
        np.repeat(np.arange(30), 4),
        np.zeros(table.size, dtype=int),
    )
    assert single == pytest.approx(alike(table))


@pytest.mark.parametrize("icc", [0.0, 0.5, 0.9])
def test_the_planted_correlation_comes_out(icc):
    assert alike(replies(np.random.default_rng(2), 2000, 10, icc)).icc == pytest.approx(icc, abs=0.03)


def test_unequal_numbers_of_replies():
    rng = np.random.default_rng(3)
    table, size = replies(rng, 2000, 10, 0.5), rng.integers(2, 11, 2000)
    means = np.array([row[:k].mean() for row, k in zip(table, size, strict=True)])
    variances = np.array([row[:k].var(ddof=1) for row, k in zip(table, size, strict=True)])
    columns = np.arange(2000)
    found = clustering(means[None], size[None].astype(float), variances[None], columns, np.zeros_like(columns))
    assert found.icc == pytest.approx(0.5, abs=0.04)


def test_what_differs_between_cells_is_no_likeness():
    rng = np.random.default_rng(4)
    cells = np.repeat([0, 1], 500)
    table = rng.normal(0, 1, (1000, 5)) + 10 * cells[:, None]
    assert alike(table, cells, 2).icc == pytest.approx(0, abs=0.03)
    assert alike(table).icc > 0.9  # without cells it would be taken for likeness


@pytest.mark.parametrize("values", [[0.1, 0.2, 0.7], [np.nan, np.nan, 0.1]], ids=["one-answer-each", "one-item"])
def test_one_answer_per_item_has_no_correlation(values):
    columns = np.arange(3)
    values = np.array([values])
    found = clustering(values, np.ones_like(values), np.full_like(values, np.nan), columns, np.zeros_like(columns))
    assert np.isnan(found.icc)
