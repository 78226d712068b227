"""Which implementation does the work, chosen from a table of measurements (backends.csv beside this file).

Faith in fusion is not enough: on one machine the vendor's matrix product and a second look at its
output beats a fused kernel, on another it does not. ``python -m benchmarks.sampling_core --table``
measures every backend on the machine at hand and writes its rows. A device that has no rows gets the
plain torch version, which is the one that has been run everywhere.
"""

import csv
import functools
import math
from dataclasses import dataclass
from pathlib import Path

import torch

TABLE = Path(__file__).with_name("backends.csv")
# The first of each is what an unmeasured device gets.
BACKENDS = {
    "sketch_logits": ("torch", "triton"),  # logits in memory
    "lmhead_sketch": ("whole", "chunks", "triton"),  # one product; one per chunk of the vocabulary; fused
    "finish": ("torch", "triton"),  # draws, truncation, choices and random numbers
}


@dataclass(frozen=True, slots=True)
class Measured:
    """One row of the table: what a backend took."""

    op: str
    device: str  # as ``device_name`` gives it
    width: int  # hidden size; 0 where it does not matter
    rows: int
    backend: str
    median_us: float


def choose(
    op: str,
    *,
    device: torch.device,
    rows: int,
    width: int = 0,
    backend: str | None = None,
    dtype: torch.dtype | None = None,
) -> str:
    """The backend for this call: the one asked for, or the fastest in the nearest measured shape.

    ``dtype`` is that of the logits where they are looked at: the Triton kernels hold float32.
    """
    known = BACKENDS[op]
    if backend is not None:
        if backend not in known:
            raise ValueError(f"backend is {backend!r}; for {op} it must be one of {', '.join(known)}.")
        if backend == "triton" and dtype == torch.float64:
            raise ValueError(f"backend is 'triton'; for float64 it must be {known[0]!r}.")
        return backend
    if dtype == torch.float64:
        return known[0]
    return _fastest(op, device_name(device), width, rows)


@functools.cache
def device_name(device: torch.device) -> str:
    """How the table calls a device: "cpu" for every CPU, else the card's name."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


@functools.cache
def _fastest(op: str, device: str, width: int, rows: int) -> str:
    """The fastest backend at the measured (width, rows) nearest in octaves; cached, as it is asked at every step."""
    found = [m for m in _table() if m.op == op and m.device == device and m.backend in BACKENDS[op]]
    if not found:
        return BACKENDS[op][0]

    def octaves(a: int, b: int) -> float:
        return abs(math.log2(max(a, 1) / max(b, 1)))

    # one shape, the smaller of two equally near: times of different shapes say nothing about backends
    shape = min({(m.width, m.rows) for m in found}, key=lambda s: (octaves(s[0], width) + octaves(s[1], rows), s))
    return min((m for m in found if (m.width, m.rows) == shape), key=lambda m: m.median_us).backend


@functools.cache
def _table() -> list[Measured]:
    return read_table(TABLE)


def read_table(path: Path = TABLE) -> list[Measured]:
    """The measurements, or none where the table is missing."""
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return [
            Measured(r["op"], r["device"], int(r["width"]), int(r["rows"]), r["backend"], float(r["median_us"]))
            for r in csv.DictReader(file)
        ]
