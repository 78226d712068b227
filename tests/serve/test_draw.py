"""The law of the draws, with a planted fault, and that a row's draw is its own affair."""

import numpy as np
import pytest
import torch
from scipy import stats

from serve.ops.draw import BLOCK, draw
from serve.ops.philox import uniforms

N = 10_000


def reference(logits, temperature=1.0):
    """Probabilities in float64."""
    return torch.softmax(logits.double() / temperature, dim=-1)


def law_p_value(logits, temperature, *, claimed):
    """Whether draws at ``temperature`` follow the law at ``claimed``: twenty chi-square tests, their p-values uniform.

    The numbers are the engine's own; the tail is pooled. One test alone fails by chance too easily.
    """
    rows = logits.expand(N, -1)
    expected = reference(logits, claimed).numpy() * N
    rare = expected < 5
    p_values = []
    for stream in range(20):
        numbers, _ = uniforms(3, torch.tensor([stream]), torch.arange(N), torch.tensor([0]))
        tokens, _ = draw(rows, numbers, temperature)
        counts = np.bincount(tokens.numpy(), minlength=len(logits)).astype(float)
        pooled = [np.append(x[~rare], x[rare].sum()) if rare.any() else x for x in (counts, expected)]
        p_values.append(stats.chisquare(*pooled).pvalue)
    return stats.kstest(p_values, "uniform").pvalue


@pytest.mark.parametrize("vocab", [1, 5, BLOCK, BLOCK + 1, 300])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_law(vocab, temperature):
    logits = torch.randn(vocab, generator=torch.Generator().manual_seed(vocab)) * 2
    if vocab == 1:
        assert int(draw(logits[None], torch.tensor([0.9]), temperature)[0]) == 0
        return
    assert law_p_value(logits, temperature, claimed=temperature) > 1e-3


def test_a_temperature_off_by_a_tenth_is_caught():
    logits = torch.randn(300, generator=torch.Generator().manual_seed(300)) * 2
    assert law_p_value(logits, 1.1, claimed=1.0) < 1e-6


def test_inverse_cdf_exactly():
    """Against one long cumulative sum in float64, at uniforms all over a large vocabulary."""
    logits = torch.randn(40, 1000, generator=torch.Generator().manual_seed(1)) * 3
    numbers = torch.rand(40, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    tokens, logprobs = draw(logits, numbers, 1.0)
    edges = reference(logits).cumsum(dim=1)
    for row, token in enumerate(tokens.tolist()):
        low = edges[row, token - 1] if token else 0.0
        assert low - 1e-6 <= numbers[row] <= edges[row, token] + 1e-6
    exact = torch.log_softmax(logits.double(), dim=1).gather(1, tokens[:, None]).squeeze(1)
    torch.testing.assert_close(logprobs, exact, atol=2e-6, rtol=0)


def test_the_tail_is_reached():
    """A flat tail 20 nats below the top, where float32 noise never goes (vLLM #43150)."""
    logits = torch.full((1, 262_144), -20.5)
    logits[0, 0] = 0.0
    tail = float(reference(logits)[0, 1:].sum())
    numbers = torch.tensor([1 - tail * 1.01, 1 - tail * 0.5, 1 - tail * 1e-6], dtype=torch.float64)
    tokens, _ = draw(logits.expand(3, -1), numbers, 1.0)
    assert tokens[0] == 0
    assert abs(int(tokens[1]) - 131_072) < 300
    assert tokens[2] == 262_143


@pytest.mark.parametrize("temperature", [0.0, 0.5, 1.0])
def test_rows_are_independent_of_the_batch(temperature):
    generator = torch.Generator().manual_seed(4)
    logits = torch.randn(301, 777, generator=generator) * 3
    numbers = torch.rand(301, dtype=torch.float64, generator=generator)
    whole = draw(logits, numbers, temperature)
    order = torch.randperm(301, generator=generator)
    shuffled = draw(logits[order], numbers[order], temperature)
    single = [draw(logits[i : i + 1], numbers[i : i + 1], temperature) for i in range(301)]
    for k in range(2):
        assert torch.equal(whole[k][order], shuffled[k])
        assert torch.equal(whole[k], torch.cat([s[k] for s in single]))


def test_temperature_zero_takes_the_first_of_the_largest():
    tokens, logprobs = draw(torch.tensor([[0.0, 2.0, 2.0, 1.0]]), torch.tensor([0.99]), 0.0)
    assert tokens.tolist() == [1]
    assert float(logprobs) == pytest.approx(float(torch.log_softmax(torch.tensor([0.0, 2, 2, 1]), 0)[1]), abs=1e-6)


@pytest.mark.parametrize("uniform", [1e-17, 0.3, 1 - 2**-53])
def test_ruled_out_tokens_are_never_drawn(uniform):
    """Also at both ends, where rounding could step onto a neighbour of weight zero."""
    logits = torch.full((1, 3 * BLOCK), float("-inf"))
    logits[0, [5, BLOCK + 7]] = 0.0
    tokens, _ = draw(logits, torch.tensor([uniform], dtype=torch.float64), 1.0)
    assert int(tokens) == (5 if uniform < 0.5 else BLOCK + 7)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_broken_rows_are_named(bad):
    logits = torch.zeros(3, 10)
    logits[1, 4] = bad
    with pytest.raises(ValueError, match=r"rows \[1\]"):
        draw(logits, torch.full((3,), 0.5), 1.0)
    with pytest.raises(ValueError, match="rows"):
        draw(torch.full((1, 4), float("-inf")), torch.tensor([0.5]), 0.0)
