"""The tests of samplers themselves: right under the null, and each catches the fault it is for."""

import numpy as np
import pytest

from serve.ops import oracles, reference

N = 20_000


def draws(probabilities, rng, n=N):
    return rng.choice(len(probabilities), size=n, p=probabilities)


@pytest.fixture
def rng():
    return np.random.default_rng(3)


@pytest.fixture
def logits(rng):
    return (rng.normal(size=4096) * 3).astype(np.float32)


@pytest.mark.parametrize("name", ["chi_square", "uniform_ks", "uniform_ad", "correlation"])
def test_p_values_are_uniform_for_a_right_sampler(name, logits, rng):
    law = reference.probabilities(logits)
    p_values = []
    for _ in range(60):
        if name == "chi_square":
            p_values.append(oracles.chi_square(draws(law, rng, 5000), law))
        elif name == "correlation":
            p_values.append(oracles.correlation(rng.random((500, 2))))
        else:
            tokens = draws(law, rng, 1000)
            p_values.append(getattr(oracles, name)(oracles.transform(tokens, law, rng.random(1000), ranked=True)))
    assert oracles.combined(p_values) > 1e-3


def test_anderson_darling_has_its_published_quantiles():
    """5 % above 2.492 and 1 % above 3.857 in the limit (D'Agostino and Stephens 1986, table 4.2, case 0)."""
    rng = np.random.default_rng(0)
    p_values = np.array([oracles.uniform_ad(rng.random(400)) for _ in range(4000)])
    assert np.mean(p_values < 0.05) == pytest.approx(0.05, abs=0.012)
    assert np.mean(p_values < 0.01) == pytest.approx(0.01, abs=0.006)


def test_a_temperature_off_by_a_tenth_is_caught(logits, rng):
    law, wrong = reference.probabilities(logits), reference.probabilities(logits, 1 / 1.1)
    tokens = draws(wrong, rng)
    ranked = oracles.transform(tokens, law, rng.random(N), ranked=True)
    assert oracles.chi_square(tokens, law) < 1e-6
    assert oracles.uniform_ks(ranked) < 1e-6
    assert oracles.uniform_ad(ranked) < 1e-6


def test_a_missing_percent_of_the_vocabulary_is_caught(logits, rng):
    """One in a hundred ids never drawn: anywhere by the chi-square, at the end by the transform as well."""
    law = reference.probabilities(logits)
    for missing in (rng.choice(4096, 41, replace=False), np.arange(4096 - 41, 4096)):
        wrong = law.copy()
        wrong[missing] = 0
        share = wrong.sum()
        assert 0.98 < share < 0.9999  # it is a small fault
        tokens = draws(wrong / share, rng, 200_000)
        assert oracles.chi_square(tokens, law) < 1e-6


def test_a_missing_last_tile_is_caught_by_the_transform(rng):
    """The last percent of a flat law: chi-square is not needed where the vocabulary is too large for it."""
    law = np.full(151_936, 1 / 151_936)
    tokens = rng.integers(0, 150_400, size=50_000)
    transformed = oracles.transform(tokens, law, rng.random(50_000), ranked=False)
    assert oracles.uniform_ad(transformed) < 1e-6


def test_a_token_of_probability_zero_is_caught():
    assert oracles.chi_square(np.array([0, 1, 1]), np.array([0.0, 1.0])) == 0.0


def test_capped_noise_is_caught(rng):
    """Gumbel noise of 24-bit uniforms ends at 16.6: the largest of a far tail's noises never wins.

    The largest of n such noises is itself Gumbel, moved by ln n, which makes the race cheap to run in full.
    """
    n_tail, gap, trials = 262_144, 20.5, 100_000
    expected = trials * n_tail * np.exp(-gap) / (1 + n_tail * np.exp(-gap))
    head = rng.gumbel(size=trials)
    tail = rng.gumbel(size=trials) + np.log(n_tail)
    assert oracles.poisson(int((tail - gap > head).sum()), expected) > 1e-3
    assert oracles.poisson(int((np.minimum(tail, 16.64) - gap > head).sum()), expected) < 1e-6


def test_the_same_numbers_in_two_columns_are_caught(rng):
    column = rng.random(1000)
    assert oracles.correlation(np.stack([column, rng.random(1000), column], axis=1)) == 0.0
