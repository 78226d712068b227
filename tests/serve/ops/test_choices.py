"""Scores of listed tokens against the float64 reference, and counts of draws from them."""

import numpy as np
import pytest
import torch

from serve.ops import oracles, reference
from serve.ops.choices import choice_draw, choice_score, probabilities
from serve.ops.draw import draw
from serve.ops.rules import make_rules
from serve.ops.sketch import lmhead_sketch, sketch_logits

IDS = torch.tensor([[3, 77, 150], [0, 199, -1], [5, -1, -1]])


def test_equals_reference(backend):
    logits = torch.randn(3, 200, generator=torch.Generator().manual_seed(1)) * 3
    scales = torch.tensor([1.0, 0.5, 2.0], dtype=torch.float64)
    sketch = sketch_logits(logits, scales, entropy=True, tile=16, backend=backend)
    scores = choice_score(sketch, IDS, backend=backend)
    for row in range(3):
        listed = IDS[row][IDS[row] >= 0].numpy()
        lp, restricted, mass = reference.choice_scores(logits[row].numpy(), listed, float(scales[row]))
        np.testing.assert_allclose(scores.logprobs[row, : len(listed)], lp, atol=2e-5, rtol=0)
        np.testing.assert_allclose(scores.restricted[row, : len(listed)], restricted, atol=2e-5, rtol=0)
        assert float(scores.mass[row]) == pytest.approx(mass, rel=2e-5)
        assert torch.isneginf(scores.logprobs[row, len(listed) :]).all()
        assert float(scores.entropy[row]) == pytest.approx(
            reference.entropy(logits[row].numpy(), float(scales[row])), abs=2e-5
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_from_hidden_states(dtype, backend):
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(3, 200, generator=generator).to(dtype)
    weight = (torch.randn(300, 200, generator=generator) * 0.3).to(dtype)
    way = "whole" if backend == "torch" else "triton"
    scores = choice_score(lmhead_sketch(hidden, weight, tile=32, backend=way), IDS, backend=backend)
    exact = torch.log_softmax(hidden.double() @ weight.double().T, dim=1)
    for row in range(3):
        listed = IDS[row][IDS[row] >= 0]
        torch.testing.assert_close(scores.logprobs[row, : len(listed)], exact[row, listed], atol=2e-5, rtol=0)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_broken_rows_unchecked_say_so(value, backend):
    logits = torch.randn(3, 200, generator=torch.Generator().manual_seed(1))
    good = choice_score(sketch_logits(logits, tile=16), IDS)
    logits[1, 195] = value  # a token that is not listed
    scores = choice_score(sketch_logits(logits, tile=16, check=False, backend=backend), IDS, backend=backend)
    assert torch.isnan(scores.logprobs[1, :2]).all()
    assert torch.isnan(scores.mass[1])
    torch.testing.assert_close(scores.logprobs[[0, 2]], good.logprobs[[0, 2]], atol=2e-5, rtol=0)


def test_scores_and_draws_agree(numbers):
    """Sampling as in a paper and scoring must say the same; with the temperature off by a tenth they do not."""
    logits = torch.randn(1, 500, generator=torch.Generator().manual_seed(2)) * 2
    best = logits[0].topk(4).indices[None]
    p = choice_score(sketch_logits(logits), best).logprobs[0].exp().numpy()
    for inv_temp in (1.0, 1 / 1.1):
        tokens = draw(sketch_logits(logits, inv_temp), numbers(1, 20_000)).tokens
        counts = np.array([int((tokens == i).sum()) for i in best[0]])
        near = np.abs(counts / 20_000 - p) < 4.5 * np.sqrt(p * (1 - p) / 20_000)
        assert near.all() == (inv_temp == 1)


@pytest.mark.parametrize("n", [1, 7, 500])
def test_counts_equal_reference(n, numbers, backend):
    lp = torch.tensor([[0.2, 0.5, 0.1], [1e-9, 0.3, 0.7], [0.0, 0.0, 0.25]], dtype=torch.float64).log()
    lp[1, 2] = np.log(1 - 0.3 - 1e-9)
    uniforms = numbers(3, n)
    counts = choice_draw(lp, uniforms, backend=backend)
    for row in range(3):
        expected = reference.choice_counts(lp[row].numpy(), uniforms[row].numpy())
        assert counts[row].tolist() == expected.tolist()
    assert counts.sum(dim=1).tolist() == [n] * 3


def test_counts_follow_the_multinomial(numbers):
    """Their sums over many rows by chi-square; a law off by a tenth is caught."""
    p = np.array([0.05, 0.6, 0.15, 0.2])
    lp = torch.tensor(p[:3]).log().expand(200, -1).contiguous()
    tokens = np.repeat(np.arange(4), choice_draw(lp, numbers(200, 500)).sum(dim=0).numpy())
    assert oracles.chi_square(tokens, p) > 1e-3
    wrong = p ** (1 / 1.1) / (p ** (1 / 1.1)).sum()
    assert oracles.chi_square(tokens, wrong) < 1e-6


def test_every_probability(hard_rows, law):
    logits = hard_rows(300)
    rules = make_rules(8, 300, logits.device, n_valid=290)
    cut = logits.clone()
    cut[:, 290:] = float("-inf")
    np.testing.assert_allclose(
        probabilities(sketch_logits(logits, 0.7, rules=rules)), law(cut, 0.7), rtol=1e-5, atol=1e-12
    )
    np.testing.assert_allclose(probabilities(sketch_logits(logits.double())).numpy(), law(logits), rtol=1e-12)
