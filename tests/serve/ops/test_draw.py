"""The law of the draws at small and full vocabularies, with planted faults, and that a draw is its row's own affair.

The quick tests run in `make test`; those marked ``full`` draw a million times over 64 rows.
"""

import numpy as np
import pytest
import torch

from serve.ops import oracles, philox, reference
from serve.ops.draw import draw
from serve.ops.rules import NO_RULES, make_rules, pack_bits
from serve.ops.sketch import lmhead_sketch, sketch_logits
from serve.ops.sources import HeadSource

VOCABULARY = 151_936  # Qwen2.5


def logits_of(rows, vocab, seed=0, spread=3.0):
    return torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * spread


def transformed(tokens, law, *, ranked=False):
    """Randomised transform [rows, n] of tokens [rows, n]; uniform when each row follows its law."""
    rng = np.random.default_rng(1)
    pairs = zip(tokens.numpy(), law, strict=True)
    return np.stack([oracles.transform(t, p, rng.random(len(t)), ranked=ranked) for t, p in pairs])


def p_values(tokens, law):
    """Of both tests in both orders, over all rows together."""
    both = [transformed(tokens, law, ranked=ranked).ravel() for ranked in (False, True)]
    return [test(values) for values in both for test in (oracles.uniform_ks, oracles.uniform_ad)]


@pytest.mark.parametrize(("vocab", "inv_temp"), [(5, 1.0), (64, 1 / 0.7), (65, 1.0), (300, 1 / 0.7)])
def test_law_by_chi_square(vocab, inv_temp, numbers, law):
    """Twenty tests of 5,000 draws with the engine's own numbers; together their p-values are uniform."""
    logits = logits_of(1, vocab, seed=vocab, spread=2.0)
    sketch = sketch_logits(logits.expand(20, -1), inv_temp)
    tokens = draw(sketch, numbers(20, 5000)).tokens.numpy()
    (p,) = law(logits, inv_temp)
    assert oracles.combined([oracles.chi_square(t, p) for t in tokens]) > 1e-3


@pytest.mark.parametrize("fault", ["temperature", "missing"])
def test_faults_are_caught_by_chi_square(fault, numbers, law):
    """Planted: the temperature off by a tenth; three of 300 ids, ordinary ones, never drawn."""
    logits = logits_of(1, 300, spread=2.0).expand(20, -1)
    allow = torch.ones(20, 300, dtype=torch.bool)
    allow[:, logits[0].argsort(descending=True)[40:43]] = fault != "missing"
    rules = make_rules(20, 300, logits.device, allow=pack_bits(allow))
    sketch = sketch_logits(logits, 1 / 1.1 if fault == "temperature" else 1.0, rules=rules)
    tokens = draw(sketch, numbers(20, 5000)).tokens.numpy()
    (p,) = law(logits[:1])
    assert oracles.combined([oracles.chi_square(t, p) for t in tokens]) < 1e-6


def test_law_at_full_vocabulary(numbers, law):
    logits = logits_of(4, VOCABULARY)
    tokens = draw(sketch_logits(logits), numbers(4, 1000)).tokens
    assert min(p_values(tokens, law(logits))) > 1e-3
    assert oracles.correlation(transformed(tokens, law(logits)).T) > 1e-3


@pytest.mark.parametrize("fault", ["temperature", "missing tile", "one seed"])
def test_faults_are_caught_at_full_vocabulary(fault, numbers, law):
    """Planted: the temperature off by a tenth; the last columns of the vocabulary left out; one seed for all rows."""
    logits = logits_of(4, VOCABULARY, spread=2.0)
    uniforms = numbers(4, 4000)
    if fault == "one seed":
        uniforms = uniforms[:1].expand(4, -1)
    rules = make_rules(4, VOCABULARY, logits.device, n_valid=146_000 if fault == "missing tile" else None)
    sketch = sketch_logits(logits, 1 / 1.1 if fault == "temperature" else 1.0, rules=rules)
    tokens = draw(sketch, uniforms).tokens
    if fault == "one seed":
        assert oracles.correlation(transformed(tokens, law(logits)).T) < 1e-6
    else:
        assert min(p_values(tokens, law(logits))) < 1e-6


@pytest.mark.full
@pytest.mark.parametrize("address", ["draws", "positions"])
def test_law_of_a_million_draws_at_full_vocabulary(address, numbers, law):
    """64 rows of peaked, ordinary and flat logits: 15,625 draws each, or one draw at as many places of a reply."""
    logits = logits_of(64, VOCABULARY)
    logits[:16] *= 2
    logits[48:] *= 0.3
    uniforms = numbers(64, 15_625)
    if address == "positions":
        one = torch.tensor([[0]])
        uniforms, _ = philox.uniforms(11, torch.arange(64)[:, None], one, torch.arange(15_625)[None, :])
    tokens = draw(sketch_logits(logits, 1 / 0.8), uniforms).tokens
    exact = law(logits, 1 / 0.8)
    assert min(p_values(tokens, exact)) > 1e-3
    values = transformed(tokens, exact)
    assert oracles.combined([oracles.uniform_ks(row) for row in values]) > 1e-3
    assert oracles.correlation(values.T) > 1e-3  # among prompts
    assert oracles.correlation(values[:, :15_600].reshape(-1, 4)) > 1e-3  # among neighbours


@pytest.mark.full
@pytest.mark.parametrize("fault", [None, "temperature", "missing percent"])
def test_chi_square_of_a_million_draws(fault, numbers, law):
    """64 rows at V = 4096, the tail as one bin: the p-values are uniform; with a fault they are not."""
    logits = logits_of(64, 4096)
    rules = make_rules(64, 4096, logits.device, n_valid=4055 if fault == "missing percent" else None)
    sketch = sketch_logits(logits, 1 / 1.1 if fault == "temperature" else 1.0, rules=rules)
    tokens = draw(sketch, numbers(64, 15_625)).tokens.numpy()
    found = [oracles.chi_square(t, p) for t, p in zip(tokens, law(logits), strict=True)]
    if fault is None:
        assert oracles.combined(found) > 1e-3
    else:
        assert oracles.combined(found) < 1e-6


@pytest.mark.full
@pytest.mark.parametrize("fault", ["temperature", "missing tile"])
def test_small_faults_are_caught_by_a_million_draws(fault, numbers, law):
    """What a thousand draws cannot see: the temperature off by one per cent; the last half per cent left out."""
    logits = logits_of(64, VOCABULARY)
    rules = make_rules(64, VOCABULARY, logits.device, n_valid=151_176 if fault == "missing tile" else None)
    sketch = sketch_logits(logits, 1 / 1.01 if fault == "temperature" else 1.0, rules=rules)
    assert min(p_values(draw(sketch, numbers(64, 15_625)).tokens, law(logits))) < 1e-6


@pytest.mark.full
@pytest.mark.parametrize("fault", [None, "temperature", "missing percent", "one seed"])
def test_law_of_the_kernels(fault, numbers, law, monkeypatch):
    """A hundred thousand draws of the Triton code in the interpreter, at V = 4096; and the same with faults."""
    triton_draw = pytest.importorskip("serve.ops.triton_draw")
    monkeypatch.setattr(triton_draw, "_DRAWS", 512)  # the interpreter's time goes by programs, not by draws
    logits, uniforms = logits_of(4, 4096, spread=1.0), numbers(4, 25_000)
    if fault == "one seed":
        uniforms = uniforms[:1].expand(4, -1)
    rules = make_rules(4, 4096, logits.device, n_valid=4055 if fault == "missing percent" else None)
    inv_temp = 1 / 1.1 if fault == "temperature" else 1.0
    sketch = sketch_logits(logits, inv_temp, rules=rules, tile=64, backend="triton")
    tokens = draw(sketch, uniforms, backend="triton").tokens
    exact = law(logits)
    by_chi_square = min(oracles.chi_square(t, p) for t, p in zip(tokens.numpy(), exact, strict=True))
    among_rows = oracles.correlation(transformed(tokens, exact).T)
    if fault is None:
        assert min(by_chi_square, among_rows, *p_values(tokens, exact)) > 1e-4
    elif fault == "one seed":
        assert among_rows < 1e-6
    else:
        assert min(by_chi_square, *p_values(tokens, exact)) < 1e-6


def test_the_far_tail_is_drawn_as_often_as_it_should(numbers):
    """262,144 tokens 20.5 nats below the top, 100,000 draws: 32.8 are expected there, capped noise gives none."""
    logits = torch.full((1, 262_145), -20.5)
    logits[0, 0] = 0.0
    tail = 262_144 * np.exp(-20.5)
    tokens = draw(sketch_logits(logits), numbers(1, 100_000)).tokens
    assert oracles.poisson(int((tokens > 0).sum()), 100_000 * tail / (1 + tail)) > 1e-3


def test_the_far_tail_is_reached_evenly():
    """Uniforms chosen to land there: at its beginning, its middle and its end."""
    logits = torch.full((1, 262_145), -20.5)
    logits[0, 0] = 0.0
    tail = float(1 - 1 / (1 + 262_144 * np.exp(-20.5)))
    uniforms = torch.tensor([[1 - tail * 1.01, 1 - tail * 0.5, 1 - tail * 1e-6]], dtype=torch.float64)
    before, middle, end = draw(sketch_logits(logits), uniforms).tokens[0].tolist()
    assert before == 0
    assert abs(middle - 131_072) < 300
    assert end == 262_144


def test_inverse_cdf_exactly(hard_rows, numbers, law, backend):
    """Against one long cumulative sum in float64, at every temperature; log-probabilities to 2e-5 nats."""
    logits = hard_rows(233)
    scales = torch.tensor([1.0, 0.7, 1.0, 1.4, 1.0, 2.0, 0.5, 1.0], dtype=torch.float64)
    uniforms = numbers(8, 20)
    drawn = draw(sketch_logits(logits, scales, raw=True, tile=32, backend=backend), uniforms, backend=backend)
    exact, plain = law(logits, scales.numpy()), law(logits)
    for row, p in enumerate(exact):
        expected = [reference.inverse_cdf(p, float(u)) for u in uniforms[row]]
        assert drawn.tokens[row].tolist() == expected
        np.testing.assert_allclose(drawn.logprobs[row], np.log(p[expected]), atol=2e-5, rtol=0)
        np.testing.assert_allclose(drawn.raw_logprobs[row], np.log(plain[row][expected]), atol=2e-5, rtol=0)


def test_tokens_do_not_depend_on_the_tile(numbers):
    logits, uniforms = logits_of(20, 3000), numbers(20, 50)
    first = draw(sketch_logits(logits, tile=64), uniforms).tokens
    for tile in (16, 100, 128, 4096):
        assert torch.equal(draw(sketch_logits(logits, tile=tile), uniforms).tokens, first)


@pytest.mark.parametrize("n_rows", [1, 2, 7, 64, 300, 1024, 3200])
def test_rows_and_draws_keep_to_themselves(n_rows, numbers):
    """Bit by bit: any batch, any order, all draws at once or one by one."""
    logits, uniforms = logits_of(3200, 97), numbers(3200, 3)
    whole = draw(sketch_logits(logits, 0.8, raw=True), uniforms)
    rows = torch.randperm(3200, generator=torch.Generator().manual_seed(n_rows))[:n_rows]
    part = draw(sketch_logits(logits[rows], 0.8, raw=True), uniforms[rows])
    single = draw(sketch_logits(logits[rows], 0.8, raw=True), uniforms[rows][:, 1:2])
    for name in ("tokens", "logprobs", "raw_logprobs"):
        assert torch.equal(getattr(whole, name)[rows], getattr(part, name)), name
        assert torch.equal(getattr(part, name)[:, 1:2], getattr(single, name)), name


@pytest.mark.parametrize("rows", [[3], [5, 1], [4, 0, 6, 2, 5, 1, 3]], ids=["one", "two", "permuted"])
def test_the_kernels_keep_rows_to_themselves(rows, numbers):
    pytest.importorskip("triton")
    logits, uniforms = logits_of(7, 200), numbers(7, 3)
    whole, part = (
        draw(sketch_logits(x, 0.8, raw=True, tile=16, backend="triton"), u, backend="triton")
        for x, u in ((logits, uniforms), (logits[rows], uniforms[rows]))
    )
    for name in ("tokens", "logprobs", "raw_logprobs"):
        assert torch.equal(getattr(whole, name)[rows], getattr(part, name)), name


@pytest.mark.parametrize("rows", [[3], [5, 1], [4, 0, 6, 2, 5, 1, 3]], ids=["one", "two", "permuted"])
def test_small_products_do_not_depend_on_the_batch(rows):
    """Bit by bit: the tiles and tokens that the kernels look at again from hidden states."""
    triton_tiles = pytest.importorskip("serve.ops.triton_tiles")
    generator = torch.Generator().manual_seed(7)
    hidden, weight = (torch.randn(n, 200, generator=generator).bfloat16() for n in (7, 90))
    ids, tiles = torch.randint(90, (7, 3), generator=generator), torch.tensor([0, 5, 2, 3, 1, 4, 0])
    whole, part = HeadSource(hidden, weight, NO_RULES), HeadSource(hidden[rows], weight, NO_RULES)
    assert torch.equal(triton_tiles.values_at(whole, ids)[rows], triton_tiles.values_at(part, ids[rows]))
    looked = triton_tiles.tile_values(whole, torch.arange(7), tiles, 16)
    assert torch.equal(looked[rows], triton_tiles.tile_values(part, torch.arange(len(rows)), tiles[rows], 16))


@pytest.mark.parametrize("way", ["whole", "chunks"])
def test_flips_among_batches_are_few_where_a_product_rounds_by_its_shape(way, numbers):
    """Of 1,280 draws a batch, with logits as far apart as real ones: a flip needs a uniform within 1e-6 of an edge."""
    generator = torch.Generator().manual_seed(7)
    hidden, weight = torch.randn(64, 896, generator=generator), torch.randn(3000, 896, generator=generator) * 0.1
    uniforms = numbers(64, 20)
    whole = draw(lmhead_sketch(hidden, weight, backend=way), uniforms)
    for size in (1, 2, 7):
        rows = torch.randperm(64, generator=generator)[:size]
        part = draw(lmhead_sketch(hidden[rows], weight, backend=way), uniforms[rows])
        same = part.tokens == whole.tokens[rows]
        assert int((~same).sum()) <= 1
        torch.testing.assert_close(part.logprobs[same], whole.logprobs[rows][same], atol=2e-5, rtol=0)


@pytest.mark.parametrize("way", ["whole", "chunks"])
def test_law_of_draws_from_the_head(way, numbers, law, monkeypatch):
    """By both transforms and chi-square, 5,000 draws of four rows each; planted: the temperature off by a tenth."""
    monkeypatch.setattr("serve.ops.sources._COLUMNS", 640)
    generator = torch.Generator().manual_seed(8)
    hidden = torch.randn(4, 64, generator=generator).bfloat16()
    weight = (torch.randn(4096, 64, generator=generator) * 0.3).bfloat16()
    exact = law((hidden.double() @ weight.double().T).float())
    for inv_temp in (1.0, 1 / 1.1):
        tokens = draw(lmhead_sketch(hidden, weight, inv_temp, backend=way), numbers(4, 5000)).tokens
        found = [oracles.chi_square(t, p) for t, p in zip(tokens.numpy(), exact, strict=True)]
        if inv_temp == 1:
            assert min(*found, *p_values(tokens, exact)) > 1e-3
        else:
            assert min(*found, *p_values(tokens, exact)) < 1e-6


@pytest.mark.parametrize("n", [1, 20])
@pytest.mark.parametrize("way", ["whole", "chunks", "triton"])
def test_draws_from_the_head(way, n, numbers, law):
    """As from the logits: one draw a row, and many that share tiles. A rounding step may flip one in a thousand."""
    if way == "triton":
        pytest.importorskip("triton")
    generator = torch.Generator().manual_seed(7)
    hidden = torch.randn(8, 64, generator=generator).bfloat16()
    weight = (torch.randn(300, 64, generator=generator) * 0.4).bfloat16()
    logits = (hidden.double() @ weight.double().T).float()
    finish = "triton" if way == "triton" else "torch"
    drawn = draw(lmhead_sketch(hidden, weight, tile=32, backend=way), numbers(8, n), backend=finish)
    expected = draw(sketch_logits(logits), numbers(8, n))
    assert int((drawn.tokens != expected.tokens).sum()) <= 1
    exact = np.log(np.take_along_axis(law(logits), drawn.tokens.numpy(), axis=1))
    np.testing.assert_allclose(drawn.logprobs, exact, atol=2e-5, rtol=0)


def test_logprobs_of_a_large_head(numbers):
    """bfloat16 hidden states and matrix at full vocabulary, against float64 on the same inputs."""
    generator = torch.Generator().manual_seed(7)
    hidden = torch.randn(2, 128, generator=generator).bfloat16()
    weight = (torch.randn(VOCABULARY, 128, generator=generator) * 0.3).bfloat16()
    drawn = draw(lmhead_sketch(hidden, weight), numbers(2, 10))
    exact = torch.log_softmax(hidden.double() @ weight.double().T, dim=1).gather(1, drawn.tokens)
    torch.testing.assert_close(drawn.logprobs, exact, atol=2e-5, rtol=0)


def test_bfloat16_logits_would_miss_that_bound():
    """Why logits are never rounded: at magnitudes of 16 to 32 a bfloat16 step is an eighth of a nat."""
    logits = logits_of(4, 4096, spread=6.0)
    error = (torch.log_softmax(logits.bfloat16().double(), 1) - torch.log_softmax(logits.double(), 1)).abs().max()
    assert error > 1e-2


def test_temperature_zero_takes_the_first_of_the_largest(backend):
    logits = torch.zeros(2, 200)
    logits[0, [70, 71, 150]] = 2.0
    drawn = draw(
        sketch_logits(logits, 0.0, tile=64, backend=backend), torch.full((2, 1), 0.99).double(), backend=backend
    )
    assert drawn.tokens.tolist() == [[70], [0]]
    exact = torch.log_softmax(logits.double(), 1).gather(1, drawn.tokens)
    torch.testing.assert_close(drawn.logprobs, exact, atol=1e-6, rtol=0)


def test_a_vocabulary_of_one_token(numbers):
    assert not draw(sketch_logits(torch.ones(2, 1)), numbers(2, 3)).tokens.any()


@pytest.mark.parametrize("uniform", [1e-17, 0.3, 1 - 2**-53])
def test_ruled_out_tokens_are_never_drawn(uniform, backend):
    """Also at both ends, where rounding could step onto a neighbour of weight zero."""
    logits = torch.full((1, 200), float("-inf"))
    logits[0, [5, 71]] = 0.0
    uniforms = torch.tensor([[uniform]], dtype=torch.float64)
    tokens = draw(sketch_logits(logits, tile=64, backend=backend), uniforms, backend=backend).tokens
    assert int(tokens) == (5 if uniform < 0.5 else 71)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", [4, 50, 66], ids=["first-tile", "last-whole-tile", "short-tile"])
def test_broken_rows_unchecked_harm_no_other_row(place, value, backend):
    """As in a hot loop that must not wait for the GPU: the broken row's log-probability says so."""
    logits = torch.zeros(3, 70)
    logits[1, place] = value
    uniforms = torch.full((3, 1), 0.5, dtype=torch.float64)
    drawn = draw(sketch_logits(logits, tile=16, check=False, backend=backend), uniforms, backend=backend)
    assert drawn.tokens[[0, 2]].tolist() == [[35], [35]]
    assert torch.isnan(drawn.logprobs[1]).all()
    assert torch.isfinite(drawn.logprobs[[0, 2]]).all()
    assert 0 <= int(drawn.tokens[1]) < 70
