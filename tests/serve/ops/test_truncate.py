"""Kept sets equal the float64 reference on every row, ties included, and draws follow what is kept."""

import dataclasses
import importlib
import itertools

import numpy as np
import pytest
import torch

from serve.ops import oracles, reference
from serve.ops.choices import choice_draw, choice_score
from serve.ops.draw import draw
from serve.ops.rules import NO_RULES, make_rules, pack_bits
from serve.ops.sketch import lmhead_sketch, sketch_logits
from serve.ops.sources import HeadSource
from serve.ops.truncate import truncated_draw

SCALES = torch.tensor([1.0, 0.7, 1.4, 1.0, 1.0, 1.0, 1.0, 0.0], dtype=torch.float64)


@pytest.fixture(params=[64, 4096], ids=["few-tiles-opened", "all-tiles-opened"])
def opened(request, monkeypatch):
    """Columns opened at first: so few that rows need a second and a third look, or all at once."""
    monkeypatch.setattr("serve.ops.truncate.OPENED", request.param)


def shrink(monkeypatch, *, opened=64, block=256, listed=128, sample=64):
    """Sizes of the kernels at which small rows are read as a whole, and at which the interpreter is not slow."""
    triton_truncate = pytest.importorskip("serve.ops.triton_truncate")
    for name, value in (("OPENED", opened), ("_BLOCK", block), ("_LIST", listed), ("_SAMPLE", sample)):
        monkeypatch.setattr(triton_truncate, name, value)
    return triton_truncate


def count_reads(monkeypatch, n_rows):
    """Blocks that the kernels will have read of each row that the opened tiles do not settle; two are the sample."""
    triton_truncate = pytest.importorskip("serve.ops.triton_truncate")
    reads, values = [0] * n_rows, triton_truncate._row_values

    def counted(here, row, *rest):
        reads[int(row.handle.data.item())] += 1
        return values(here, row, *rest)

    monkeypatch.setattr(triton_truncate, "_row_values", counted)
    return reads


def assert_equals_reference(logits, scales, uniforms, made, **filters):
    """Numbers kept, tokens and log-probabilities of every row."""
    for row, (x, scale) in enumerate(zip(logits.float().numpy(), scales.tolist(), strict=True)):
        kept = reference.kept_set(x, scale, **filters)
        weights = np.zeros(len(x))
        p = reference.probabilities(x, scale or 1.0)
        weights[kept] = p[kept]
        expected = [reference.inverse_cdf(weights, float(u)) for u in uniforms[row]]
        assert int(made.n_kept[row]) == len(kept), (row, filters)
        assert made.tokens[row].tolist() == expected, (row, filters)
        np.testing.assert_allclose(made.logprobs[row], np.log(p[expected]), atol=2e-5, rtol=0)
        np.testing.assert_allclose(made.kept_logprobs[row], np.log(p[expected] / weights.sum()), atol=2e-5, rtol=0)


@pytest.mark.parametrize("order", ["vllm", "hf"])
def test_equals_reference(hard_rows, numbers, opened, order):
    logits, uniforms = hard_rows(1500), numbers(8, 3)
    sketch = sketch_logits(logits, SCALES, tile=16)
    for top_k, top_p, min_p in itertools.product((None, 1, 7, 600), (1.0, 0.999, 0.5), (0.0, 0.02, 1.0)):
        if (top_k, top_p, min_p) == (None, 1.0, 0.0):
            continue
        filters = {"top_k": top_k, "top_p": top_p, "min_p": min_p, "order": order}
        assert_equals_reference(logits, SCALES, uniforms, truncated_draw(sketch, uniforms, **filters), **filters)


# In the interpreter top-p costs seconds a row; one order of all filters is enough for `make test`.
TRITON_CASES = [
    pytest.param({"top_k": 7}, id="top-k"),
    pytest.param({"top_p": 0.9}, id="top-p"),
    pytest.param({"min_p": 0.05}, id="min-p"),
    pytest.param({"top_k": 200, "top_p": 0.95, "min_p": 0.001}, id="all"),
    pytest.param({"top_k": 200, "top_p": 0.5, "min_p": 0.02, "order": "hf"}, id="all-hf", marks=pytest.mark.full),
    pytest.param({"top_p": 0.99, "min_p": 0.001, "order": "hf"}, id="top-p-min-p-hf", marks=pytest.mark.full),
]


@pytest.mark.parametrize("filters", TRITON_CASES)
def test_the_kernels_equal_reference(hard_rows, numbers, filters, monkeypatch):
    """Few tiles opened, so that half the rows are settled among them and half are read again as a whole."""
    shrink(monkeypatch)
    logits, uniforms = hard_rows(500), numbers(8, 2)
    sketch = sketch_logits(logits, SCALES, tile=16, backend="triton")
    made = truncated_draw(sketch, uniforms, backend="triton", **filters)
    assert_equals_reference(logits, SCALES, uniforms, made, **filters)
    plain = truncated_draw(sketch, uniforms, backend="torch", **filters)
    assert torch.equal(made.certified, plain.certified)


@pytest.mark.parametrize(
    ("filters", "fault"),
    [
        pytest.param({"top_k": 300}, False, id="top-k"),
        pytest.param({"top_p": 0.9}, False, id="top-p"),
        pytest.param({"min_p": 0.1}, False, id="min-p", marks=pytest.mark.full),
        pytest.param({"top_k": 300}, True, id="top-k-planted-fault", marks=pytest.mark.full),
        pytest.param({"top_p": 0.9}, True, id="top-p-planted-fault", marks=pytest.mark.full),
    ],
)
def test_the_kernels_read_a_row_twice(filters, fault, numbers, monkeypatch):
    """Once for the sketch, and once more at most: a sample, every block once, and one block for each draw.

    Planted fault: a sample that misleads. It costs readings; what is kept stays the same.
    """
    triton_truncate = shrink(monkeypatch, listed=2048, sample=1024)
    logits = torch.randn(3, 5000, generator=torch.Generator().manual_seed(4)) * torch.tensor([[0.3], [1.0], [1.3]])
    uniforms, blocks = numbers(3, 2), -(-5000 // 256)
    reads, guess = count_reads(monkeypatch, 3), triton_truncate._guess

    def misled(sample, *rest):
        return guess(sample, *rest[:4], rest[4] * 4, *(r * 0.25 for r in rest[5:7]), *rest[7:])

    if fault:
        monkeypatch.setattr(triton_truncate, "_guess", misled)
    made = truncated_draw(sketch_logits(logits, tile=16, backend="triton"), uniforms, backend="triton", **filters)
    assert_equals_reference(logits, torch.ones(3), uniforms, made, **filters)
    assert reads[0] > 0  # the flattest row is not settled among the tiles opened
    assert (max(reads) <= 2 + blocks + 2) != fault, reads


@pytest.mark.parametrize("filters", [{"top_k": 300}, {"top_p": 0.9}], ids=["top-k", "top-p"])
def test_more_ties_than_can_be_listed_cost_one_reading_more(filters, numbers, monkeypatch):
    shrink(monkeypatch)
    reads = count_reads(monkeypatch, 2)
    logits, uniforms = torch.zeros(2, 1000), numbers(2, 1)
    logits[1, 500:] = -1.0
    made = truncated_draw(sketch_logits(logits, tile=16, backend="triton"), uniforms, backend="triton", **filters)
    assert_equals_reference(logits, torch.ones(2), uniforms, made, **filters)
    assert max(reads) <= 2 + 2 * 4 + 1, reads


@pytest.mark.full
@pytest.mark.parametrize("filters", [{"top_p": 0.8}, {"top_p": 0.99}, {"top_k": 50}])
def test_the_kernels_as_they_are_launched(filters, numbers, monkeypatch):
    """At the vocabulary of Qwen2.5: likely tokens over a body, and a flat row; half of it may be kept."""
    vocab, uniforms = 151_936, numbers(2, 2)
    reads = count_reads(monkeypatch, 2)
    logits = torch.randn(2, vocab, generator=torch.Generator().manual_seed(0)) * torch.tensor([[2.0], [1.0]])
    logits[0, ::760] += torch.linspace(14, 6, 200)
    sketch = sketch_logits(logits, tile=128, backend="triton")
    made = truncated_draw(sketch, uniforms, backend="triton", **filters)
    assert_equals_reference(logits, torch.ones(2), uniforms, made, **filters)
    assert made.certified.all()
    assert 0 < max(reads) <= 2 + 38 + 2, reads


@pytest.mark.parametrize("order", ["vllm", pytest.param("hf", marks=pytest.mark.full)])
@pytest.mark.parametrize("source", ["logits", "head"])
def test_filters_after_rules(source, order, hard_rows, numbers, backend, monkeypatch):
    """Penalties, allow-masks and padding rows of the vocabulary, in rows that do not touch in memory."""
    vocab = 300
    monkeypatch.setattr("serve.ops.truncate.OPENED", 64)
    if backend == "triton":
        shrink(monkeypatch)
    generator = torch.Generator().manual_seed(6)
    hidden, weight = torch.randn(3, 40, generator=generator)[:, :32], torch.randn(vocab, 32, generator=generator) * 0.5
    logits = hard_rows(vocab + 20)[[0, 1, 5], :vocab] if source == "logits" else hidden @ weight.T
    seen, allow = (torch.rand(3, vocab, generator=generator) < share for share in (0.3, 0.9))
    told = {"repetition": 1.3, "presence": 0.25, "n_valid": vocab - 7}
    rules = make_rules(3, vocab, logits.device, seen=pack_bits(seen), allow=pack_bits(allow), **told)
    if source == "logits":
        sketch = sketch_logits(logits, rules=rules, tile=16, backend=backend)
    else:
        way = "triton" if backend == "triton" else "whole"
        sketch = lmhead_sketch(hidden, weight, rules=rules, tile=16, backend=way)
    uniforms, filters = numbers(3, 2), {"top_k": 120, "top_p": 0.9, "min_p": 0.01, "order": order}
    made = truncated_draw(sketch, uniforms, backend=backend, **filters)
    rows = zip(logits.numpy(), seen.numpy(), allow.numpy(), strict=True)
    penalised = [reference.penalised(x, seen=s, allow=a, **told) for x, s, a in rows]
    assert_equals_reference(torch.from_numpy(np.stack(penalised)), torch.ones(3), uniforms, made, **filters)


def test_the_kernels_on_logits_that_were_never_written(numbers, monkeypatch):
    shrink(monkeypatch, listed=128)
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(3, 32, generator=generator) * torch.tensor([[1.0], [0.1], [3.0]])
    weight = torch.randn(300, 32, generator=generator)
    uniforms = numbers(3, 2)
    for filters in ({"top_k": 3}, {"top_p": 0.9}):
        made = truncated_draw(
            lmhead_sketch(hidden, weight, tile=16, backend="triton"), uniforms, backend="triton", **filters
        )
        plain = truncated_draw(lmhead_sketch(hidden, weight, tile=16), uniforms, backend="torch", **filters)
        assert torch.equal(made.n_kept, plain.n_kept)
        assert torch.equal(made.tokens, plain.tokens)


@pytest.mark.parametrize("min_p", [1.0, 0.5])
def test_min_p_is_relative_to_the_largest_value_of_its_own_product(min_p, numbers, backend, monkeypatch):
    """A head's values are computed twice, and the second product may round the largest below the sketch's maximum."""
    n_rows, vocab = (64, 3000) if backend == "torch" else (3, 300)
    monkeypatch.setattr("serve.ops.truncate.OPENED", 64)
    if backend == "triton":
        shrink(monkeypatch)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(n_rows, 896, generator=generator).bfloat16()
    weight = (torch.randn(vocab, 896, generator=generator) * 0.1).bfloat16()
    sketch = lmhead_sketch(hidden, weight, tile=16, backend="whole")
    sketch.row_max.add_(2e-6)  # what another product's rounding does; some rows of the first test have it of themselves
    made = truncated_draw(sketch, numbers(n_rows, 1), min_p=min_p, backend=backend)
    logits = hidden.double() @ weight.double().T
    law = torch.softmax(logits, dim=1)
    kept = law >= min_p * law.amax(dim=1, keepdim=True)
    assert torch.equal(made.n_kept, kept.sum(dim=1))
    assert kept.gather(1, made.tokens).all()
    assert made.certified.all()


@pytest.mark.parametrize("value", [float("nan"), pytest.param(float("inf"), marks=pytest.mark.full)])
@pytest.mark.parametrize("filters", [{"top_k": 3}, {"top_p": 0.9}, {"min_p": 0.1}, {"top_k": 70}])
def test_broken_rows_unchecked_get_a_token_and_no_certificate(value, filters, numbers, backend, monkeypatch):
    """In the first tile, the last whole one and the short one; among the tiles opened, or read again as a whole."""
    monkeypatch.setattr("serve.ops.truncate.OPENED", 32)
    if backend == "triton":
        shrink(monkeypatch, opened=32, block=64, listed=16)
    logits = torch.randn(5, 70, generator=torch.Generator().manual_seed(3))
    broken, places = [0, 2, 4], [3, 50, 66]
    logits[broken, places] = value
    sketch, uniforms = sketch_logits(logits, tile=16, check=False, backend=backend), numbers(5, 4)
    made = truncated_draw(sketch, uniforms, backend=backend, **filters)
    assert ((made.tokens >= 0) & (made.tokens < 70)).all()
    assert made.certified.tolist() == [False, True, False, True, False]
    assert torch.isnan(made.logprobs[broken]).all()
    assert (made.n_kept >= 1).all()
    good = truncated_draw(sketch_logits(logits[[1, 3]], tile=16), uniforms[[1, 3]], **filters)
    assert torch.equal(made.tokens[[1, 3]], good.tokens)


def test_rows_may_have_filters_of_their_own(hard_rows, numbers, backend):
    logits, uniforms = hard_rows(300), numbers(8, 2)
    top_k = torch.tensor([300, 5, 300, 300, 2, 300, 40, 300], dtype=torch.int32)
    top_p = torch.tensor([1.0, 1.0, 0.5, 1.0, 0.9, 0.25, 0.5, 1.0])  # float32, as vLLM keeps them
    min_p = torch.tensor([0.0, 0.0, 0.0, 0.25, 0.0, 0.0, 0.0, 0.0])
    sketch = sketch_logits(logits, SCALES, tile=16, backend=backend)
    made = truncated_draw(sketch, uniforms, top_k=top_k, top_p=top_p, min_p=min_p, backend=backend)
    for row in range(1, 8):
        one = {"top_k": int(top_k[row]), "top_p": float(top_p[row]), "min_p": float(min_p[row])}
        part = truncated_draw(
            sketch_logits(logits[row : row + 1], SCALES[row : row + 1], tile=16), uniforms[row : row + 1], **one
        )
        assert torch.equal(made.tokens[row], part.tokens[0])
        assert int(made.n_kept[row]) == int(part.n_kept[0])
    assert torch.equal(made.tokens[0], draw(sketch, uniforms, backend=backend).tokens[0])


def test_filters_that_cut_nothing_change_no_token(numbers):
    logits = torch.randn(40, 2000, generator=torch.Generator().manual_seed(5))
    sketch, uniforms = sketch_logits(logits), numbers(40, 10)
    expected = draw(sketch, uniforms).tokens
    assert torch.equal(truncated_draw(sketch, uniforms, min_p=1e-9).tokens, expected)
    assert torch.equal(truncated_draw(sketch, uniforms, top_k=2000, top_p=1.0).tokens, expected)


def test_a_tie_at_the_boundary_keeps_exactly_k(numbers, backend):
    """Two tokens of .3 each beside one of .4, and k = 2: the lower id stays (a sampler in use keeps all three)."""
    logits = torch.tensor([[0.3, 0.4, 0.3]]).log()
    made = truncated_draw(sketch_logits(logits, tile=16), numbers(1, 200), top_k=2, backend=backend)
    assert set(made.tokens.flatten().tolist()) == {0, 1}
    assert int(made.n_kept) == 2


def test_certified_says_where_rounding_could_matter(numbers, backend):
    """Ten equal tokens and p = 0.5: the mass before the sixth is the limit itself, up to rounding."""
    logits = torch.zeros(2, 10)
    sketch = sketch_logits(logits, tile=16)
    made = truncated_draw(sketch, numbers(2, 1), top_p=torch.tensor([0.5, 0.55]), backend=backend)
    assert made.n_kept.tolist() == [5, 6]
    assert made.certified.tolist() == [False, True]


def test_a_normaliser_that_is_not_exact_is_not_trusted(numbers, monkeypatch):
    """The boundary is put within the error of the sketch's sums: the row must be looked at as a whole."""
    monkeypatch.setattr("serve.ops.truncate.OPENED", 64)
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(1, 3000, generator=generator) * 4
    p = np.sort(reference.probabilities(logits[0].numpy()))[::-1].cumsum()
    for place in (3, 10, 30):
        for nudge, expected in ((-1e-9, place + 1), (1e-9, place + 2)):
            made = truncated_draw(sketch_logits(logits, tile=16), numbers(1, 1), top_p=float(p[place] + nudge))
            assert int(made.n_kept) == expected
            assert bool(made.certified)


def test_trusting_the_normaliser_is_caught(numbers, monkeypatch):
    """Planted fault: the error of float32 sums taken for zero, and those sums a little off."""
    monkeypatch.setattr("serve.ops.truncate.OPENED", 64)
    monkeypatch.setattr("serve.ops.truncate.SKETCH_ERROR", 0.0)
    logits = torch.randn(1, 3000, generator=torch.Generator().manual_seed(1)) * 4
    p = np.sort(reference.probabilities(logits[0].numpy()))[::-1].cumsum()
    sketch = sketch_logits(logits, tile=16)
    sketch.total.mul_(1 + 1e-6)
    assert int(truncated_draw(sketch, numbers(1, 1), top_p=float(p[10] - 1e-9)).n_kept) != 11


@pytest.mark.parametrize("fault", [False, True], ids=["", "planted-fault"])
def test_a_second_product_that_rounds_differently_is_not_trusted(fault, numbers, backend, monkeypatch):
    """The product that looks again gives 2e-5 more above 2 than the sketch's; a boundary of top-p lies within that.

    Planted fault: the difference taken for none.
    """
    triton = backend == "triton"
    module = importlib.import_module("serve.ops.triton_truncate" if triton else "serve.ops.truncate")
    monkeypatch.setattr(module, "OPENED", 64)
    monkeypatch.setattr(module, "MARGIN", 0.0 if fault else 2.0)

    def rounded(values):
        return torch.where(values > 2, values + 2e-5, values)

    if triton:
        shrink(monkeypatch)
        tile_values = module.tile_values
        monkeypatch.setattr(module, "tile_values", lambda *a: rounded(tile_values(*a)))
    else:
        tiles = HeadSource.tiles
        monkeypatch.setattr(HeadSource, "tiles", lambda *a: rounded(tiles(*a)))
    generator = torch.Generator().manual_seed(1)
    hidden, weight = torch.randn(1, 32, generator=generator), torch.randn(400, 32, generator=generator) * 0.3
    sketch = lmhead_sketch(hidden, weight, tile=16, backend="whole")
    again = (HeadSource(hidden, weight, NO_RULES), torch.zeros(25, dtype=torch.int64), torch.arange(25), 16)
    every = module.tile_values(*again) if triton else HeadSource.tiles(*again)
    p = np.sort(reference.probabilities(every.flatten().numpy()))[::-1].cumsum()
    found = []
    for place in (3,) if triton else (3, 6, 10):
        for nudge, expected in ((-1e-9, place + 1), (1e-9, place + 2)):
            made = truncated_draw(sketch, numbers(1, 1), top_p=float(p[place] + nudge), backend=backend)
            found.append(int(made.n_kept) == expected and bool(made.certified))
    assert all(found) != fault


def test_law_of_what_is_kept(numbers):
    logits = torch.randn(1, 4096, generator=torch.Generator().manual_seed(9)) * 2
    made = truncated_draw(sketch_logits(logits), numbers(1, 20_000), top_k=200, top_p=0.9)
    kept = reference.kept_set(logits[0].numpy(), top_k=200, top_p=0.9)
    p = np.zeros(4096)
    p[kept] = reference.probabilities(logits[0].numpy())[kept]
    p /= p.sum()
    tokens = made.tokens[0].numpy()
    assert oracles.chi_square(tokens, p) > 1e-3
    slightly = p.copy()
    slightly[kept[-1]] = 0  # planted fault: the last kept token never drawn
    assert oracles.chi_square(tokens, slightly / slightly.sum()) < 1e-6


@pytest.mark.parametrize("n_rows", [1, 7, 64])
def test_rows_keep_to_themselves(n_rows, numbers, opened):
    logits, uniforms = torch.randn(200, 700, generator=torch.Generator().manual_seed(6)) * 2, numbers(200, 2)
    filters = {"top_k": 50, "top_p": 0.9, "min_p": 0.01}
    whole = truncated_draw(sketch_logits(logits, tile=16), uniforms, **filters)
    rows = torch.randperm(200, generator=torch.Generator().manual_seed(n_rows))[:n_rows]
    part = truncated_draw(sketch_logits(logits[rows], tile=16), uniforms[rows], **filters)
    for name in ("tokens", "logprobs", "kept_logprobs", "n_kept", "certified"):
        assert torch.equal(getattr(whole, name)[rows], getattr(part, name)), name


@pytest.mark.full
@pytest.mark.parametrize("rows", [[2], [3, 0, 1]], ids=["one", "permuted"])
def test_the_kernels_keep_rows_to_themselves(rows, numbers, monkeypatch):
    """Bit by bit; rows settled among the tiles opened, and rows read again as a whole."""
    shrink(monkeypatch, opened=32, block=128, listed=32)
    logits, uniforms = torch.randn(4, 200, generator=torch.Generator().manual_seed(6)) * 2, numbers(4, 2)
    filters = {"top_k": torch.tensor([3, 50, 3, 50]), "min_p": 0.01}
    whole = truncated_draw(sketch_logits(logits, tile=16, backend="triton"), uniforms, backend="triton", **filters)
    sketch = sketch_logits(logits[rows], tile=16, backend="triton")
    filters["top_k"] = filters["top_k"][rows]
    part = truncated_draw(sketch, uniforms[rows], backend="triton", **filters)
    for name in ("tokens", "logprobs", "kept_logprobs", "n_kept", "certified"):
        assert torch.equal(getattr(whole, name)[rows], getattr(part, name)), name


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=pytest.mark.full)])
def test_everything_that_is_read_was_written(hard_rows, numbers, backend, monkeypatch):
    """Outputs of draws, cuts and choices start as NaN, as those of the sketch do in its own test."""
    if backend == "triton":
        shrink(monkeypatch, block=128, listed=32)
    monkeypatch.setattr("serve.ops.truncate.OPENED", 64)
    logits, uniforms = hard_rows(200)[4:], numbers(4, 3)
    sketch = sketch_logits(logits, SCALES[4:], raw=True, tile=16, backend=backend)
    ids = logits.topk(2).indices

    def made():
        cut = truncated_draw(sketch, uniforms, top_k=5, min_p=0.01, backend=backend)
        scores = choice_score(sketch, ids, backend=backend)
        return (
            draw(sketch, uniforms, backend=backend),
            cut,
            scores,
            choice_draw(scores.logprobs, uniforms, backend=backend),
        )

    clean = made()
    for name in ("empty", "empty_like"):
        plain = getattr(torch, name)

        def poisoned(*args, plain=plain, **kwargs):
            out = plain(*args, **kwargs)
            return out.fill_(float("nan")) if out.is_floating_point() else out.fill_(-7)

        monkeypatch.setattr(torch, name, poisoned)
    again = made()
    assert torch.equal(clean[-1], again[-1])
    for before, after in zip(clean[:-1], again[:-1], strict=True):
        for field in dataclasses.fields(before):
            one, other = getattr(before, field.name), getattr(after, field.name)
            assert one is None or torch.equal(one, other), field.name


def test_raw_logprobs_are_those_of_temperature_one(numbers, backend):
    logits, uniforms = torch.randn(3, 200, generator=torch.Generator().manual_seed(6)), numbers(3, 2)
    sketch = sketch_logits(logits, 2.0, raw=True, tile=16, backend=backend)
    made = truncated_draw(sketch, uniforms, top_k=20, backend=backend)
    exact = torch.log_softmax(logits.double(), 1).gather(1, made.tokens)
    torch.testing.assert_close(made.raw_logprobs, exact, atol=2e-5, rtol=0)
