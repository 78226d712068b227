"""Known answers of Random123's Philox4x32-10, and that numpy and torch agree bit for bit."""

import numpy as np
import pytest
import torch

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


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN)
def test_known_answers(counter, key, answer):
    from_torch = philox_torch(tuple(torch.tensor([c]) for c in counter), key)
    from_numpy = philox_numpy(tuple(np.array([c], dtype=np.uint64) for c in counter), key)
    assert tuple(int(w) for w in from_torch) == answer
    assert tuple(int(w[0]) for w in from_numpy) == answer


def test_numpy_and_torch_give_the_same_uniforms():
    rng = np.random.default_rng(5)
    stream = rng.integers(0, 2**64, size=1000, dtype=np.uint64)
    draw, position = (rng.integers(0, 2**32, size=1000, dtype=np.uint64) for _ in range(2))
    key = 0xFEDCBA9876543210
    ours = uniforms(
        key,
        torch.tensor([signed64(int(s)) for s in stream]),
        torch.from_numpy(draw.astype(np.int64)),
        torch.from_numpy(position.astype(np.int64)),
    )
    theirs = uniforms_numpy(key, stream, draw, position)
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(a.numpy(), b)
        assert a.min() > 0
        assert a.max() < 1


def test_uniforms_are_uniform_and_uncorrelated():
    draws = torch.arange(200_000)
    first, second = uniforms(7, torch.tensor([signed64(2**63 + 5)]), draws, torch.tensor([0]))
    neighbour, _ = uniforms(7, torch.tensor([signed64(2**63 + 5)]), draws, torch.tensor([1]))
    for u in (first, second):
        counts = torch.histc(u, bins=100, min=0, max=1)
        statistic = float(((counts - 2000) ** 2 / 2000).sum())
        assert statistic < 160  # 99 degrees of freedom: p is about 1e-4
    for other in (second, neighbour):
        assert abs(float(torch.corrcoef(torch.stack([first, other]))[0, 1])) < 5 / len(draws) ** 0.5


def test_the_largest_word_stays_below_one():
    from serve.ops import philox

    assert float(philox._uniform(torch.tensor([ONES]), torch.tensor([ONES]))) < 1.0


def test_out_of_range_keys_are_refused():
    with pytest.raises(AssertionError):
        split64(2**64)
