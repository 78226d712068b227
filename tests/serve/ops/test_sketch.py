"""Sketches equal the float64 reference, whatever the shape, dtype, temperature or rules; and alone equals together."""

import numpy as np
import pytest
import torch

from serve.ops import reference
from serve.ops.rules import NO_RULES, make_rules, pack_bits, unpack_bits
from serve.ops.sketch import lmhead_sketch, sketch_logits
from serve.ops.sources import HeadSource

NATS = 2e-5
TEMPERATURES = torch.tensor([1.0, 0.7, 0.0, 1.4, 2.0, 1.0, 0.5, 1.0], dtype=torch.float64)


def reference_numbers(logits, inv_temp):
    """log Z, log Z at temperature 1, entropy of each row; greedy rows count as temperature 1."""
    scales = np.where(inv_temp == 0, 1.0, inv_temp)
    rows = list(zip(logits.float().numpy(), scales, strict=True))
    return (
        np.array([reference.log_z(x, s) for x, s in rows]),
        np.array([reference.log_z(x) for x, _ in rows]),
        np.array([reference.entropy(x, s) for x, s in rows]),
    )


def assert_equals_reference(sketch, logits, inv_temp):
    log_z, raw, entropy = reference_numbers(logits, inv_temp)
    np.testing.assert_allclose(sketch.log_z.numpy(), log_z, atol=NATS, rtol=0)
    np.testing.assert_allclose(sketch.raw_log_z.numpy(), raw, atol=NATS, rtol=0)
    np.testing.assert_allclose(sketch.entropy.numpy(), entropy, atol=NATS, rtol=0)


@pytest.mark.parametrize(
    "vocab",
    [
        pytest.param(12, id="less-than-a-tile"),
        pytest.param(64, id="one-tile"),
        pytest.param(65, id="one-column-into-the-second-tile"),
        pytest.param(640, id="whole-tiles"),
    ],
)
def test_equals_reference(hard_rows, vocab, backend):
    logits = hard_rows(vocab)
    sketch = sketch_logits(logits, TEMPERATURES, raw=True, entropy=True, tile=64, backend=backend)
    assert_equals_reference(sketch, logits, TEMPERATURES.numpy())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_and_rows_that_do_not_touch(hard_rows, dtype, backend):
    if dtype == torch.float64 and backend == "triton":
        pytest.skip("the kernels work in float32; float64 is the torch path's")
    wide = hard_rows(300).to(dtype).repeat_interleave(2, dim=0)
    logits = wide[::2]
    assert not logits.is_contiguous()
    sketch = sketch_logits(logits, TEMPERATURES, raw=True, entropy=True, tile=64, backend=backend)
    assert_equals_reference(sketch, logits, TEMPERATURES.numpy())


def test_float64_stays_float64(hard_rows):
    logits = hard_rows(200).double()
    logits[0, 0] += 1e-9
    assert float(sketch_logits(logits).log_z[0]) == pytest.approx(float(logits[0].logsumexp(0)), abs=1e-13)


@pytest.mark.parametrize("way", ["whole", "chunks", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_head_equals_reference(way, dtype, monkeypatch):
    """On the same rounded inputs, products summed in float64."""
    if way == "triton":
        pytest.importorskip("triton")
    monkeypatch.setattr("serve.ops.sources._COLUMNS", 128)
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(8, 80, generator=generator).to(dtype)
    weight = (torch.randn(301, 80, generator=generator) * 0.5).to(dtype)
    exact = hidden.double() @ weight.double().T
    sketch = lmhead_sketch(hidden, weight, TEMPERATURES, raw=True, entropy=True, tile=64, backend=way)
    for ours, scale in ((sketch.log_z, TEMPERATURES.masked_fill(TEMPERATURES == 0, 1.0)), (sketch.raw_log_z, 1.0)):
        scaled = exact * (scale[:, None] if isinstance(scale, torch.Tensor) else scale)
        torch.testing.assert_close(ours, scaled.logsumexp(dim=1), atol=NATS, rtol=0)


def rules_for(logits, seed=0):
    """Every rule at once, and the reference's idea of the same."""
    generator = torch.Generator().manual_seed(seed)
    seen, allow = (torch.rand(logits.shape, generator=generator) < share for share in (0.2, 0.7))
    allow[:, :10] = True
    n_valid = logits.shape[1] - 3
    rules = make_rules(
        *logits.shape,
        logits.device,
        seen=pack_bits(seen),
        repetition=1.3,
        presence=0.4,
        allow=pack_bits(allow),
        n_valid=n_valid,
    )
    changed = [
        reference.penalised(x.numpy(), seen=s.numpy(), repetition=1.3, presence=0.4, allow=a.numpy(), n_valid=n_valid)
        for x, s, a in zip(logits, seen, allow, strict=True)
    ]
    return rules, torch.from_numpy(np.stack(changed))


@pytest.mark.parametrize("tile", [16, 64])
def test_penalties_masks_and_padding(hard_rows, backend, tile):
    logits = hard_rows(301)
    logits[7, :200] = 0.0
    before = logits.clone()
    rules, changed = rules_for(logits)
    sketch = sketch_logits(logits, TEMPERATURES, rules=rules, raw=True, entropy=True, tile=tile, backend=backend)
    assert_equals_reference(sketch, changed, TEMPERATURES.numpy())
    assert torch.equal(logits, before)
    tiles = torch.arange(sketch.maxima.shape[1])
    looked = sketch.source.tiles(torch.full_like(tiles, 2), tiles, tile).flatten()
    assert torch.equal(looked[:301], changed[2])  # the very same float32 numbers: ties are ties
    assert torch.isneginf(looked[301:]).all()


@pytest.mark.parametrize("way", ["whole", "chunks", "triton"])
def test_rules_reach_logits_that_are_never_written(way, monkeypatch):
    if way == "triton":
        pytest.importorskip("triton")
    monkeypatch.setattr("serve.ops.sources._COLUMNS", 96)
    generator = torch.Generator().manual_seed(2)
    hidden, weight = torch.randn(8, 32, generator=generator), torch.randn(301, 32, generator=generator)
    rules, changed = rules_for(hidden @ weight.T)
    sketch = lmhead_sketch(hidden, weight, rules=rules, tile=32, backend=way)
    torch.testing.assert_close(sketch.log_z, changed.double().logsumexp(dim=1), atol=NATS, rtol=0)


@pytest.mark.parametrize(("dtype", "most"), [(torch.bfloat16, 96), (torch.float32, 301)])
def test_a_narrow_matrix_is_widened_in_pieces(dtype, most, monkeypatch):
    """As a whole it would be held a second time, in float32; a float32 matrix is not copied."""
    monkeypatch.setattr("serve.ops.sources._WIDENED", 32 * 100)
    generator = torch.Generator().manual_seed(2)
    hidden, weight = (torch.randn(n, 32, generator=generator).to(dtype) for n in (8, 301))
    sizes = [c.stop - c.start for c in HeadSource(hidden, weight, NO_RULES).column_slices(32, "whole")]
    assert (max(sizes), sum(sizes)) == (most, 301)
    expected = (hidden.double() @ weight.double().T).logsumexp(dim=1)
    torch.testing.assert_close(
        lmhead_sketch(hidden, weight, tile=32, backend="whole").log_z, expected, atol=NATS, rtol=0
    )


def test_bits_go_in_and_out():
    mask = torch.rand(3, 77, generator=torch.Generator().manual_seed(1)) < 0.5
    words = pack_bits(mask)
    assert words.shape == (3, 3)
    assert torch.equal(unpack_bits(words)[:, :77], mask)
    assert not unpack_bits(words)[:, 77:].any()


@pytest.mark.parametrize("n_rows", [1, 2, 7, 64, 300])
def test_a_row_is_summed_alike_in_every_batch(n_rows, backend):
    """Bit by bit: alone, in any order, beside any others."""
    most = 300 if backend == "torch" else 8  # the interpreter runs one program per row
    logits = torch.randn(most, 333, generator=torch.Generator().manual_seed(4)) * 3
    whole = sketch_logits(logits, 0.8, raw=True, entropy=True, tile=64, backend=backend)
    rows = torch.randperm(most, generator=torch.Generator().manual_seed(n_rows))[:n_rows]
    part = sketch_logits(logits[rows], 0.8, raw=True, entropy=True, tile=64, backend=backend)
    for name in ("maxima", "edges", "total", "raw_total", "entropy"):
        assert torch.equal(getattr(whole, name)[rows], getattr(part, name)), name


def test_chunks_of_the_vocabulary_change_no_bit_given_the_same_logits(monkeypatch):
    logits = torch.randn(9, 1000, generator=torch.Generator().manual_seed(4)) * 3
    whole = sketch_logits(logits, tile=32)
    monkeypatch.setattr(
        "serve.ops.sources.LogitsSource.column_slices",
        lambda self, tile, backend: (slice(i, min(i + 96, 1000)) for i in range(0, 1000, 96)),
    )
    assert torch.equal(sketch_logits(logits, tile=32).edges, whole.edges)


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_change_no_bit(threads):
    logits = torch.randn(3, 151_936, generator=torch.Generator().manual_seed(4)) * 3
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        several = sketch_logits(logits).edges
    finally:
        torch.set_num_threads(before)
    assert torch.equal(several, sketch_logits(logits).edges)


def test_a_large_temperature_and_large_logits_do_not_overflow(backend):
    logits = torch.tensor([[3e4, -3e4, 3e4 - 1.0, float("-inf")]])
    for inv_temp in (1e-3, 1.0, 50.0):
        sketch = sketch_logits(logits, inv_temp, tile=16, backend=backend)
        expected = torch.logsumexp(logits.double() * inv_temp, dim=1)
        torch.testing.assert_close(sketch.log_z, expected, rtol=1e-9, atol=NATS)


def test_everything_that_is_read_was_written(hard_rows, backend, monkeypatch):
    """Outputs start as NaN: a tile, row or column that no program writes would show."""
    logits = hard_rows(333)
    clean = sketch_logits(logits, TEMPERATURES, raw=True, entropy=True, tile=32, backend=backend)
    empty = torch.empty

    def poisoned(*args, **kwargs):
        made = empty(*args, **kwargs)
        return made.fill_(float("nan")) if made.is_floating_point() else made.fill_(-7)

    monkeypatch.setattr(torch, "empty", poisoned)
    sketch = sketch_logits(logits, TEMPERATURES, raw=True, entropy=True, tile=32, backend=backend)
    for name in ("maxima", "edges", "total", "raw_total", "entropy"):
        assert torch.equal(getattr(sketch, name), getattr(clean, name)), name


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_broken_rows_are_named(bad, backend):
    logits = torch.zeros(3, 40)
    logits[1, 20] = bad
    with pytest.raises(ValueError, match=r"logits of rows \[1\] \(1 in all\) are not a distribution"):
        sketch_logits(logits, tile=16, backend=backend)
    rules = make_rules(3, 40, logits.device, allow=pack_bits(torch.zeros(3, 40, dtype=torch.bool)))
    with pytest.raises(ValueError, match=r"rows \[0, 1, 2\]"):
        sketch_logits(torch.zeros(3, 40), 0.0, rules=rules, tile=16, backend=backend)
    assert NO_RULES.empty
