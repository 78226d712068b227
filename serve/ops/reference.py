"""What the sampling core must equal, in float64 numpy: short, slow and plainly right.

Nothing in the package uses it. The tests hold every implementation against it, and the benchmarks
check with it what they time. It works on penalised float32 logits (serve.ops.rules): ties are ties
of those numbers, and everything after them is float64.
"""

from typing import Literal

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Order = Literal["vllm", "hf"]


def penalised(
    logits: NDArray[np.float32],
    *,
    seen: NDArray[np.bool_] | None = None,
    repetition: float = 1.0,
    presence: float = 0.0,
    allow: NDArray[np.bool_] | None = None,
    n_valid: int | None = None,
) -> NDArray[np.float32]:
    """Logits [vocab] of one row after penalties and masks (serve.ops.rules.Rules)."""
    out = logits.copy()
    if seen is not None:
        penalty, minus = np.float32(repetition), np.float32(presence)
        out = np.where(seen, np.where(out > 0, out / penalty, out * penalty) - minus, out)
    if allow is not None:
        out[~allow] = -np.inf
    if n_valid is not None:
        out[n_valid:] = -np.inf
    return out


def probabilities(logits: NDArray[np.float32], inv_temp: float = 1.0) -> Floats:
    """Softmax [vocab] of one row."""
    scaled = logits.astype(np.float64)
    weights = np.exp((scaled - scaled.max()) * inv_temp)
    return np.asarray(weights / weights.sum())


def log_z(logits: NDArray[np.float32], inv_temp: float = 1.0) -> float:
    """Log of the normaliser of the scaled logits of one row."""
    scaled = logits.astype(np.float64)
    return float(scaled.max() * inv_temp + np.log(np.exp((scaled - scaled.max()) * inv_temp).sum()))


def entropy(logits: NDArray[np.float32], inv_temp: float = 1.0) -> float:
    """Entropy of one row in nats."""
    p = probabilities(logits, inv_temp)
    return float(-(p[p > 0] * np.log(p[p > 0])).sum())


def inverse_cdf(weights: Floats, uniform: float) -> int:
    """The token of one row whose slice of the cumulative sum, in token order, holds uniform * total."""
    edges = weights.cumsum()
    return int(min(np.searchsorted(edges, uniform * edges[-1], side="right"), np.flatnonzero(weights)[-1]))


def kept_set(
    logits: NDArray[np.float32],
    inv_temp: float = 1.0,
    *,
    top_k: int | None = None,
    top_p: float = 1.0,
    min_p: float = 0.0,
    order: Order = "vllm",
) -> NDArray[np.int64]:
    """Ids that survive the filters, best first.

    Tokens are ordered by (logit descending, id ascending); every filter keeps a beginning of that
    order. top-k keeps exactly k. min-p keeps what has at least min_p times the largest probability.
    top-p keeps a token when the mass before it, as a share of what the filters before top-p left, is
    below top_p. ``vllm``: min-p, top-k, top-p. ``hf``: top-k, top-p, min-p.
    """
    scaled = logits.astype(np.float64)
    ranked = np.argsort(-scaled, kind="stable")
    ranked = ranked[np.isfinite(scaled[ranked])]
    if inv_temp == 0:
        return np.asarray(ranked[:1])
    below = (scaled[ranked] - scaled[ranked[0]]) * inv_temp
    n_min_p = int((below >= np.log(min_p)).sum()) if min_p > 0 else len(ranked)
    n_top_k = len(ranked) if top_k is None else min(top_k, len(ranked))
    n = min(n_top_k, n_min_p) if order == "vllm" else n_top_k
    if top_p < 1:
        weights = np.exp(below[:n])
        before = np.concatenate([[0.0], weights.cumsum()[:-1]])
        n = int((before < top_p * weights.cumsum()[-1]).sum())
    return np.asarray(ranked[: min(n, n_min_p)])


def choice_scores(
    logits: NDArray[np.float32], ids: NDArray[np.int64], inv_temp: float = 1.0
) -> tuple[Floats, Floats, float]:
    """Of one row: log-probabilities of the tokens ``ids``, the same among themselves, and their mass together."""
    lp = logits.astype(np.float64)[ids] * inv_temp - log_z(logits, inv_temp)
    mass = float(np.exp(lp).sum())
    return lp, lp - np.log(mass), mass


def choice_counts(lp: Floats, uniforms: Floats) -> NDArray[np.int64]:
    """Of one row: how many uniforms fall to each option, and to none of them (the last entry)."""
    edges = np.exp(lp).cumsum()
    return np.bincount(np.searchsorted(edges, uniforms, side="right"), minlength=len(lp) + 1)
