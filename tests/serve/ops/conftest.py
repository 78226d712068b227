"""Logits of several shapes, uniforms, and what the kernels are tested on."""

import importlib.util

import numpy as np
import pytest
import torch

from serve.ops import reference
from serve.ops.philox import uniforms

# Sums of float32 exponentials, relative to the float64 reference: a few rounding steps of the largest terms.
NATS = 2e-5

# With this mark, tests run twice: in plain torch, and as Triton kernels in the interpreter.
_TRITON = pytest.param(
    "triton", marks=pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
)


@pytest.fixture(params=["torch", _TRITON])
def backend(request):
    return request.param


@pytest.fixture
def numbers():
    """Uniforms [rows, n], the core's own: key 11, a stream per row."""

    def make(rows, n, key=11):
        return uniforms(key, torch.arange(rows)[:, None], torch.arange(n)[None, :], torch.tensor([[0]]))[0]

    return make


@pytest.fixture
def hard_rows():
    """Rows that separate a right sampler from a lazy one: peaked, flat, tied, masked, one-hot, nearly flat."""

    def make(vocab, seed=0):
        generator = torch.Generator().manual_seed(seed)
        logits = torch.randn(8, vocab, generator=generator) * 3
        logits[1] = 0.0
        logits[2] = logits[2].round()
        logits[3, 10:] = float("-inf")
        logits[4] = -50.0
        logits[4, vocab // 3] = 0.0
        logits[5] *= 0.1
        logits[6, vocab // 2 :] = logits[6].max()  # ties reach over many tiles
        logits[7, : vocab // 2] = float("-inf")  # whole tiles ruled out
        return logits

    return make


@pytest.fixture
def law():
    """Float64 probabilities [rows, vocab] of logits at temperatures."""

    def make(logits, inv_temp=1.0):
        scales = np.broadcast_to(np.asarray(inv_temp, dtype=np.float64), len(logits))
        return np.stack(
            [reference.probabilities(row, s) for row, s in zip(logits.float().numpy(), scales, strict=True)]
        )

    return make
