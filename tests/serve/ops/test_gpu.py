"""The kernels compiled, at full sizes, on a CUDA device: `make gpu-test`. Every oracle of the CPU tests, larger.

Where a backend computes a row alike in every batch, equality is bit by bit; where it does not (cuBLAS picks its
algorithm by shape), tokens that differ are counted and bounded.
"""

import importlib.util

import numpy as np
import pytest
import torch

from serve.ops import oracles, philox, reference
from serve.ops.choices import choice_draw, choice_score
from serve.ops.draw import draw
from serve.ops.rules import make_rules, pack_bits
from serve.ops.sketch import lmhead_sketch, sketch_logits
from serve.ops.truncate import truncated_draw

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed"),
]
DEVICE = "cuda"
VOCABULARY, WIDTH = 151_936, 896  # Qwen2.5-0.5B
DRAWS = 156_250  # of each of 64 rows: ten million
BATCHES = (1, 2, 7, 64, 300, 1024, 3200)
SKETCHES, HEADS = ("torch", "triton"), ("whole", "chunks", "triton")


@pytest.fixture(params=SKETCHES)
def way(request):
    return request.param


def logits_of(rows, vocab=VOCABULARY, seed=0, spread=3.0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(rows, vocab, generator=generator) * spread).to(DEVICE)


def numbers(rows, n, key=11):
    at = torch.arange(max(rows, n), device=DEVICE)
    return philox.uniforms(key, at[:rows, None], at[None, :n], torch.zeros(1, 1, dtype=torch.int64, device=DEVICE))[0]


def head(rows, seed=7):
    """Hidden states and a head, bfloat16, with logits of the size real models have."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(rows, WIDTH, generator=generator).bfloat16()
    weight = (torch.randn(VOCABULARY, WIDTH, generator=generator) * 3 / WIDTH**0.5).bfloat16()
    return hidden.to(DEVICE), weight.to(DEVICE)


def transformed(tokens, law, *, ranked):
    rng = np.random.default_rng(1)
    pairs = zip(tokens.cpu().numpy(), law, strict=True)
    return np.stack([oracles.transform(t, p, rng.random(len(t)), ranked=ranked) for t, p in pairs])


def p_values(tokens, law):
    both = [transformed(tokens, law, ranked=ranked).ravel() for ranked in (False, True)]
    return [test(values) for values in both for test in (oracles.uniform_ks, oracles.uniform_ad)]


def law_of(logits, inv_temp=1.0):
    return torch.softmax(logits.double() * inv_temp, dim=1).cpu().numpy()


# --- the law ---------------------------------------------------------------------------------------------------------


def test_random_numbers_are_those_of_the_cpu():
    at = torch.arange(100_000)
    for a, b in zip(philox.uniforms(2**63 + 1, at, at * 3, at % 50), _compiled_uniforms(at), strict=True):
        assert torch.equal(a, b.cpu())


def _compiled_uniforms(at):
    from serve.ops import triton_philox

    key = torch.tensor(philox.signed64(2**63 + 1), device=DEVICE)
    return triton_philox.uniforms(key, *(t.to(DEVICE) for t in (at, at * 3, at % 50)))


def test_ten_million_draws_at_full_vocabulary(way):
    logits = logits_of(64)
    logits[:16] *= 2
    logits[48:] *= 0.3
    tokens = draw(sketch_logits(logits, 1 / 0.8, backend=way), numbers(64, DRAWS), backend=way).tokens
    law = law_of(logits, 1 / 0.8)
    assert min(p_values(tokens, law)) > 1e-3
    values = transformed(tokens, law, ranked=False)
    assert oracles.combined([oracles.uniform_ks(row) for row in values]) > 1e-3
    assert oracles.correlation(values.T) > 1e-3


@pytest.mark.parametrize("fault", ["temperature", "missing percent", "one seed"])
def test_planted_faults_are_caught(fault):
    """The temperature off by a tenth, a percent of the vocabulary never drawn, one seed broadcast over the rows."""
    logits, uniforms = logits_of(64), numbers(64, DRAWS // 16)
    if fault == "one seed":
        uniforms = uniforms[:1].expand(64, -1).contiguous()
    missing = int(VOCABULARY * 0.99) if fault == "missing percent" else None
    rules = make_rules(64, VOCABULARY, logits.device, n_valid=missing)
    sketch = sketch_logits(logits, 1 / 1.1 if fault == "temperature" else 1.0, rules=rules, backend="triton")
    tokens = draw(sketch, uniforms, backend="triton").tokens
    if fault == "one seed":
        assert oracles.correlation(transformed(tokens, law_of(logits), ranked=False).T) < 1e-6
    else:
        assert min(p_values(tokens, law_of(logits))) < 1e-6


def test_chi_square_at_v_4096():
    """Ten million draws, twenty laws; the p-values are uniform."""
    logits = logits_of(20, 4096)
    tokens = draw(sketch_logits(logits, backend="triton"), numbers(20, 500_000), backend="triton").tokens
    found = [oracles.chi_square(t, p) for t, p in zip(tokens.cpu().numpy(), law_of(logits), strict=True)]
    assert oracles.combined(found) > 1e-3


def test_the_far_tail(way):
    """262,144 tokens 20.5 nats below the top: 328 of a million draws are theirs; capped noise would give none."""
    logits = torch.full((10, 262_145), -20.5, device=DEVICE)
    logits[:, 0] = 0.0
    tail = 262_144 * np.exp(-20.5)
    tokens = draw(sketch_logits(logits, backend=way), numbers(10, 100_000), backend=way).tokens
    assert oracles.poisson(int((tokens > 0).sum()), 1_000_000 * tail / (1 + tail)) > 1e-3


# --- numbers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", HEADS)
def test_log_probabilities_from_the_head(backend):
    """Within 2e-5 nats of float64 on the same bfloat16 inputs."""
    hidden, weight = head(16)
    sketch = lmhead_sketch(hidden, weight, raw=True, entropy=True, backend=backend)
    drawn = draw(sketch, numbers(16, 20), backend="triton")
    exact = hidden.double() @ weight.double().T
    logprobs = torch.log_softmax(exact, dim=1)
    torch.testing.assert_close(drawn.logprobs, logprobs.gather(1, drawn.tokens), atol=2e-5, rtol=0)
    torch.testing.assert_close(sketch.log_z, exact.logsumexp(dim=1), atol=2e-5, rtol=0)
    torch.testing.assert_close(sketch.entropy, -(logprobs.exp() * logprobs).sum(dim=1), atol=1e-4, rtol=0)
    ids = torch.rand(16, VOCABULARY, device=DEVICE).topk(20).indices  # twenty different ones each
    scores = choice_score(sketch, ids, backend="triton")
    torch.testing.assert_close(scores.logprobs, logprobs.gather(1, ids), atol=2e-5, rtol=0)


def test_the_backends_draw_the_same_tokens_but_for_rounding():
    """Where rounding moves an edge past a uniform, and nowhere else: counted, at most one in ten thousand."""
    hidden, weight = head(320)
    uniforms = numbers(320, 100)
    drawn = [draw(lmhead_sketch(hidden, weight, backend=b), uniforms, backend="triton").tokens for b in HEADS]
    for other in drawn[1:]:
        assert int((other != drawn[0]).sum()) <= drawn[0].numel() * 1e-4


def test_counts_of_choices():
    lp = torch.log_softmax(torch.randn(3000, 20, generator=torch.Generator().manual_seed(1)).double(), 1) - 0.1
    uniforms = numbers(3000, 500)
    counts = choice_draw(lp.to(DEVICE), uniforms, backend="triton")
    assert torch.equal(counts.cpu(), choice_draw(lp, uniforms.cpu(), backend="torch"))


# --- truncation ------------------------------------------------------------------------------------------------------

FILTERS = [
    pytest.param({"top_k": 20}, id="top-k"),
    pytest.param({"top_p": 0.8}, id="top-p"),
    pytest.param({"min_p": 0.05}, id="min-p"),
    pytest.param({"top_k": 20, "top_p": 0.8}, id="qwen"),
    pytest.param({"top_k": 5000, "top_p": 0.95, "min_p": 1e-4, "order": "hf"}, id="all-hf"),
]


@pytest.mark.parametrize("filters", FILTERS)
def test_kept_sets_equal_the_reference(filters):
    """Ordinary, peaked, flat, tied, masked and constant rows; ties at the boundary included."""
    logits = logits_of(64)
    logits[8:16] = logits[8:16].round()
    logits[16:24] *= 0.1
    logits[24] = 0.0
    logits[25, 40:] = float("-inf")
    logits[26] = -50.0
    logits[26, 77] = 0.0
    uniforms = numbers(64, 4)
    made = truncated_draw(sketch_logits(logits, backend="triton"), uniforms, backend="triton", **filters)
    for row, x in enumerate(logits.cpu().numpy()):
        kept = reference.kept_set(x, **filters)
        if bool(made.certified[row]):
            assert int(made.n_kept[row]) == len(kept), row
            assert set(made.tokens[row].tolist()) <= set(kept.tolist()), row
    assert int((~made.certified).sum()) <= 2  # the constant rows end on a tie of masses


# --- invariance and races --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_rows", BATCHES)
def test_a_row_is_drawn_alike_in_every_batch_given_its_logits(n_rows, way):
    logits = logits_of(64).repeat(50, 1)
    uniforms = numbers(3200, 2)
    rows = torch.randperm(3200, generator=torch.Generator().manual_seed(n_rows))[:n_rows].to(DEVICE)
    whole = draw(sketch_logits(logits, 0.8, raw=True, backend=way), uniforms, backend=way)
    part = draw(sketch_logits(logits[rows], 0.8, raw=True, backend=way), uniforms[rows], backend=way)
    if way == "triton":
        for name in ("tokens", "logprobs", "raw_logprobs"):
            assert torch.equal(getattr(whole, name)[rows], getattr(part, name)), name
    else:  # torch's own sums may depend on the shape
        assert int((whole.tokens[rows] != part.tokens).sum()) <= max(1, n_rows // 1000)


@pytest.mark.parametrize("n_rows", BATCHES)
def test_a_row_is_drawn_alike_in_every_batch_on_our_own_product(n_rows):
    hidden, weight = head(3200)
    uniforms = numbers(3200, 3)
    rows = torch.randperm(3200, generator=torch.Generator().manual_seed(n_rows))[:n_rows].to(DEVICE)
    whole = draw(lmhead_sketch(hidden, weight, 0.8, backend="triton"), uniforms, backend="triton")
    part = draw(lmhead_sketch(hidden[rows], weight, 0.8, backend="triton"), uniforms[rows], backend="triton")
    single = draw(
        lmhead_sketch(hidden[rows], weight, 0.8, backend="triton"),
        uniforms[rows][:, 1:2].contiguous(),
        backend="triton",
    )
    for name in ("tokens", "logprobs"):
        assert torch.equal(getattr(whole, name)[rows], getattr(part, name)), name
        assert torch.equal(getattr(part, name)[:, 1:2], getattr(single, name)), name


def test_a_hundred_times_the_same(monkeypatch):
    """Outputs start poisoned, differently each time: a race or a place that nothing writes would show."""
    hidden, weight = head(64)
    uniforms = numbers(64, 8)
    allow = pack_bits(torch.rand(64, VOCABULARY, generator=torch.Generator().manual_seed(1)) < 0.9).to(DEVICE)
    rules = make_rules(64, VOCABULARY, hidden.device, allow=allow, n_valid=VOCABULARY - 200)
    empty, poison = torch.empty, [0]

    def poisoned(*args, **kwargs):
        made = empty(*args, **kwargs)
        return made.fill_(float("nan") if made.is_floating_point() else -poison[0] - 1)

    first = None
    monkeypatch.setattr(torch, "empty", poisoned)
    for turn in range(100):
        poison[0] = turn
        sketch = lmhead_sketch(hidden, weight, rules=rules, raw=True, backend="triton")
        drawn = draw(sketch, uniforms, backend="triton")
        cut = truncated_draw(sketch, uniforms, top_k=50, top_p=0.9, backend="triton")
        found = (sketch.edges, drawn.tokens, drawn.logprobs, cut.tokens, cut.n_kept)
        first = first or tuple(t.clone() for t in found)
        assert all(torch.equal(a, b) for a, b in zip(first, found, strict=True)), turn
