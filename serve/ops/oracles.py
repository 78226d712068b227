"""Tests of samplers: each is a statistic whose law under a right sampler is known, so that it has a p-value.

A similarity above a threshold is no test: samplers with the temperature off by a tenth pass at a cosine of
0.99. Each function here is shown, in tests/serve/ops, to accept the core and to reject a planted fault.
The tests, `make gpu-test` and the benchmarks use the same ones.
"""

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

_LEAST = 5.0  # expected count below which the chi-square law fails, and tokens are pooled


def chi_square(tokens: Ints, probabilities: Floats) -> float:
    """p-value of draws [n] from one law [vocab]; the tokens too rare to count singly are one bin together.

    Without that bin the test is blind to the tail, where samplers go wrong first.
    """
    counts = np.bincount(tokens, minlength=len(probabilities)).astype(np.float64)
    if counts[probabilities == 0].any():
        return 0.0
    expected = probabilities * len(tokens)
    rare = expected < _LEAST
    observed, wanted = counts[~rare], expected[~rare]
    if expected[rare].sum() > 0:
        observed, wanted = np.append(observed, counts[rare].sum()), np.append(wanted, expected[rare].sum())
    statistic = float(((observed - wanted) ** 2 / wanted).sum())
    return float(stats.chi2.sf(statistic, len(observed) - 1))


def transform(tokens: Ints, probabilities: Floats, noise: Floats, *, ranked: bool) -> Floats:
    """Randomised probability integral transform [n] of draws from one law: uniform when the law is right.

    F(k - 1) + v p(k) for a token k and noise v in (0, 1) of one's own (Smith 1985; Brockwell 2007). It works at any
    vocabulary, and values from rows with different laws can be tested together.

    F runs over the tokens in their own order, or ``ranked`` from the most probable down. Use both: in token
    order a wrong temperature is invisible where logits do not depend on the id, since mass then only moves
    between neighbours; by rank a fault in one region of the vocabulary is.
    """
    order = np.argsort(-probabilities, kind="stable") if ranked else np.arange(len(probabilities))
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    edges = np.concatenate([[0.0], probabilities[order].cumsum()])
    return np.asarray(edges[place[tokens]] + noise * probabilities[tokens])


def uniform_ks(values: Floats) -> float:
    """Kolmogorov-Smirnov p-value against the uniform law."""
    return float(stats.kstest(values, "uniform").pvalue)


def uniform_ad(values: Floats) -> float:
    """Anderson-Darling p-value against the uniform law; weighs both ends, where Kolmogorov-Smirnov is weak.

    Limiting law after Marsaglia and Marsaglia, "Evaluating the Anderson-Darling Distribution" (2004), function adinf.
    """
    ordered = np.clip(np.sort(values), 1e-300, 1 - 1e-16)
    n = len(ordered)
    odd = 2 * np.arange(1, n + 1) - 1
    z = float(-n - (odd * (np.log(ordered) + np.log1p(-ordered[::-1]))).sum() / n)
    if z < 2:
        series = np.polyval([0.00168691, -0.011672, 0.0347962, -0.0649821, 0.247105, 2.00012], z)
        below = np.exp(-1.2337141 / z) / np.sqrt(z) * series
    else:
        below = np.exp(-np.exp(np.polyval([-0.0003146, 0.008056, -0.082433, 0.43424, -2.30695, 1.0776], z)))
    return float(1.0 - below)


def poisson(count: int, expected: float) -> float:
    """Two-sided p-value of a count of rare events."""
    low, high = stats.poisson.cdf(count, expected), stats.poisson.sf(count - 1, expected)
    return float(min(1.0, 2 * min(low, high)))


def correlation(columns: Floats) -> float:
    """p-value of the largest correlation among columns [n, k] of values that should be independent uniforms.

    By Fisher's transform, times the number of pairs (Bonferroni).
    """
    n, k = columns.shape
    matrix = np.corrcoef(columns, rowvar=False)
    largest = float(np.abs(matrix[np.triu_indices(k, 1)]).max())
    if largest >= 1 - 1e-12:
        return 0.0
    single = 2 * stats.norm.sf(np.arctanh(largest) * np.sqrt(n - 3))
    return float(min(1.0, single * k * (k - 1) / 2))


def combined(p_values: Floats) -> float:
    """p-value of the claim that these p-values are uniform, as those of a right sampler are.

    One test at 0.001 fails by chance once in a thousand runs; many, tested together, see faults each is too weak for.
    """
    return uniform_ks(np.asarray(p_values, dtype=np.float64))
