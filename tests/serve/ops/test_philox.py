"""Known answers of Random123's Philox4x32-10, and that numpy, torch and Triton agree bit for bit."""

import importlib.util

import numpy as np
import pytest
import torch

from serve.ops import oracles, philox
from serve.ops.philox import philox_numpy, philox_torch, signed64, split64, uniforms, uniforms_numpy

ONES = 0xFFFFFFFF
KNOWN = [  # counter, key, answer: Random123's kat_vectors
    pytest.param((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8), id="zeros"),
    pytest.param((ONES,) * 4, (ONES, ONES), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD), id="ones"),
    pytest.param(
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        id="pi",
    ),
]
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN)
def test_known_answers(counter, key, answer):
    from_torch = philox_torch(tuple(torch.tensor([c]) for c in counter), key)
    from_numpy = philox_numpy(tuple(np.array([c], dtype=np.uint64) for c in counter), key)
    assert tuple(int(w) for w in from_torch) == answer
    assert tuple(int(w[0]) for w in from_numpy) == answer


@needs_triton
@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN)
def test_known_answers_in_triton(counter, key, answer):
    from serve.ops import triton_philox

    stream, whole = (signed64(high << 32 | low) for low, high in (counter[:2], key))
    made = triton_philox.words(*(torch.tensor([n]) for n in (whole, stream, counter[2], counter[3])))
    assert tuple(made[0].tolist()) == answer


@pytest.fixture
def counters():
    rng = np.random.default_rng(5)
    stream = rng.integers(0, 2**64, size=1000, dtype=np.uint64)
    draw, position = (rng.integers(0, 2**32, size=1000, dtype=np.uint64) for _ in range(2))
    return stream, draw, position


def as_torch(counters):
    stream, draw, position = counters
    signed = torch.tensor([signed64(int(s)) for s in stream])
    return signed, torch.from_numpy(draw.astype(np.int64)), torch.from_numpy(position.astype(np.int64))


KEY = 0xFEDCBA9876543210


def test_numpy_and_torch_give_the_same_uniforms(counters):
    for a, b in zip(uniforms(KEY, *as_torch(counters)), uniforms_numpy(KEY, *counters), strict=True):
        np.testing.assert_array_equal(a.numpy(), b)
        assert a.min() > 0
        assert a.max() < 1


@needs_triton
def test_triton_gives_the_same_uniforms(counters):
    from serve.ops import triton_philox

    ours = uniforms(KEY, *as_torch(counters))
    theirs = triton_philox.uniforms(torch.tensor(signed64(KEY)), *as_torch(counters))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_a_key_per_row_is_the_same_as_one_key_each(counters):
    stream, draw, position = as_torch(counters)
    keys = torch.arange(len(stream)) % 3
    whole, _ = uniforms(keys, stream, draw, position)
    for key in range(3):
        assert torch.equal(whole[keys == key], uniforms(key, stream, draw, position)[0][keys == key])


def test_uniforms_are_uniform_and_uncorrelated():
    """Over draws, positions, streams and keys that differ in one place only."""
    n = torch.arange(50_000)
    stream, zero = torch.tensor([signed64(2**63 + 5)]), torch.tensor([0])
    first, second = uniforms(7, stream, n, zero)
    columns = [first, second, uniforms(7, stream, n, zero + 1)[0], uniforms(7, stream + 1, n, zero)[0]]
    columns += [uniforms(8, stream, n, zero)[0], uniforms(7, stream, zero, n)[0]]
    table = torch.stack(columns, dim=1).numpy()
    p_values = [oracles.uniform_ks(column) for column in table.T]
    assert min(p_values) > 1e-4
    assert oracles.correlation(table) > 1e-3


def test_one_seed_for_every_prompt_is_caught():
    """Planted fault: the stream left out of the counter, as where one seed is broadcast over a batch."""
    n = torch.arange(1000)
    columns = [uniforms(7, torch.tensor([0 * stream]), n, torch.tensor([0]))[0] for stream in (1, 2)]
    assert oracles.correlation(torch.stack(columns, dim=1).numpy()) < 1e-6


def test_no_two_counters_give_the_same_numbers():
    """Over as many (stream, draw, position) as a study uses in one battery, including neighbours in all three."""
    stream, draw, position = torch.meshgrid(torch.arange(30), torch.arange(30), torch.arange(100), indexing="ij")
    first, second = uniforms(7, *(t.flatten() for t in (stream, draw, position)))
    assert len(torch.unique(torch.stack([first, second]), dim=1)[0]) == first.numel()


def test_the_largest_word_stays_below_one():
    assert float(philox._uniform(torch.tensor([ONES]), torch.tensor([ONES]))) < 1.0


def test_out_of_range_keys_are_refused():
    with pytest.raises(ValueError, match=r"must be from 0 to 2\^64 - 1"):
        split64(2**64)


def test_wrong_types_are_named():
    good = torch.arange(3)
    with pytest.raises(ValueError, match=r"draw is torch.int32 on cpu; it must be torch.int64"):
        uniforms(1, good, good.int(), good)
