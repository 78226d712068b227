"""What truncation is told and what it gives back, for both of its implementations."""

from dataclasses import dataclass
from typing import Literal

import torch

Order = Literal["vllm", "hf"]
OPENED = 4096  # columns opened at first; then 8 times as many, then all
# Bounds on relative errors of a sum of weights: a sum of float32 exponentials, and one of float64 ones.
SKETCH_ERROR = 4e-6
EXACT_ERROR = 1e-12
# A head's values are computed twice, by products that round differently: what two products of one number differ
# by is taken to be at most so many times what the maxima of the opened tiles show.
MARGIN = 2.0


@dataclass(frozen=True, slots=True)
class Filters:
    """The filters of each row, as numbers that filter nothing where they are off."""

    top_k: torch.Tensor  # [rows] int64; the vocabulary's size when off
    top_p: torch.Tensor  # [rows] float64; 1 when off
    min_p: torch.Tensor  # [rows] float64; 0 when off
    order: Order

    def rows(self, which: torch.Tensor) -> "Filters":
        """Those of some rows."""
        return Filters(self.top_k[which], self.top_p[which], self.min_p[which], self.order)


@dataclass(frozen=True, slots=True)
class Truncated:
    """Draws [rows, n] from what the filters leave."""

    tokens: torch.Tensor  # int64
    logprobs: torch.Tensor  # float64, nats, of the law before the filters (temperature applied)
    kept_logprobs: torch.Tensor  # the same among what is kept; it sums to 1 there
    raw_logprobs: torch.Tensor | None  # before filters and temperature; None when the sketch has no raw sums
    n_kept: torch.Tensor  # [rows] int64; the size of the vocabulary for rows whose filters are all off
    certified: torch.Tensor  # [rows] bool: no rounding of sums could have changed the set; False for broken rows
