"""Where logits come from: a tensor in memory, or hidden states and the matrix that turns them into logits.

A sketch keeps its source, so that single tiles can be looked at again without anyone holding all logits.
"""

from collections.abc import Iterator
from typing import ClassVar, Protocol

import torch

from serve.ops.rules import Rules

_COLUMNS = 4096  # columns of the vocabulary per matrix product in the backend "chunks"
_VALUES = 1 << 27  # logits held at a time in the backend "whole": 512 MiB
_WIDENED = 1 << 26  # numbers of the matrix held a second time, widened to float32, in that backend: 256 MiB


class Source(Protocol):
    """Rows of logits that can be looked at tile by tile."""

    op: ClassVar[str]  # its name in the table of backends
    recomputes: ClassVar[bool]  # whether looking costs a matrix product
    rules: Rules

    @property
    def n_rows(self) -> int:
        """Rows."""
        ...

    @property
    def vocab(self) -> int:
        """Columns."""
        ...

    @property
    def width(self) -> int:
        """What the cost of one logit depends on: the hidden size, or 0 when it only has to be read."""
        ...

    @property
    def device(self) -> torch.device:
        """Where it lies."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """What values are computed in: float32, or float64 for float64 inputs."""
        ...

    def tiles(self, rows: torch.Tensor, tiles: torch.Tensor, tile: int) -> torch.Tensor:
        """Penalised values [n, tile] of tile ``tiles[i]`` of row ``rows[i]``, -inf beyond the vocabulary."""
        ...

    def at(self, ids: torch.Tensor) -> torch.Tensor:
        """Penalised values [rows, k] of the tokens ``ids`` [rows, k]."""
        ...


class LogitsSource:
    """Logits [rows, vocab] in memory."""

    op: ClassVar[str] = "sketch_logits"
    recomputes: ClassVar[bool] = False

    def __init__(self, logits: torch.Tensor, rules: Rules) -> None:
        self.logits, self.rules = logits, rules
        self.n_rows, self.vocab = logits.shape
        self.width, self.device = 0, logits.device
        self.dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32

    def column_slices(self, tile: int, backend: str) -> Iterator[slice]:
        """How the vocabulary is cut: not at all."""
        yield slice(0, self.vocab)

    def columns(self, which: slice) -> torch.Tensor:
        """Raw logits of some columns [rows, columns], as they lie in memory."""
        return self.logits[:, which]

    def tiles(self, rows: torch.Tensor, tiles: torch.Tensor, tile: int) -> torch.Tensor:
        """Penalised values of single tiles (Source.tiles)."""
        n_tiles, rest = divmod(self.vocab, tile)
        if rest == 0 and self.logits.is_contiguous():
            values = self.logits.view(-1, tile).index_select(0, rows * n_tiles + tiles).to(self.dtype)
            if self.rules.empty:
                return values
        else:
            values = None
        columns = tiles[:, None] * tile + torch.arange(tile, device=self.device)
        if values is None:
            values = self.logits[rows[:, None], columns.clamp(max=self.vocab - 1)].to(self.dtype)
        return _finish_tiles(values, rows, columns, self.vocab, self.rules)

    def at(self, ids: torch.Tensor) -> torch.Tensor:
        """Penalised values of single tokens (Source.at)."""
        values = self.logits.gather(1, ids).to(self.dtype)
        return self.rules.on_tokens(values, ids, torch.arange(self.n_rows, device=self.device))


class HeadSource:
    """Logits as hidden [rows, d] @ weight [vocab, d].T, summed in float32 or wider."""

    op: ClassVar[str] = "lmhead_sketch"
    recomputes: ClassVar[bool] = True

    def __init__(self, hidden: torch.Tensor, weight: torch.Tensor, rules: Rules) -> None:
        self.hidden, self.weight, self.rules = hidden, weight, rules
        self.n_rows, self.width = hidden.shape
        self.vocab, self.device = weight.shape[0], hidden.device
        self.dtype = torch.float64 if hidden.dtype == torch.float64 else torch.float32

    def column_slices(self, tile: int, backend: str) -> Iterator[slice]:
        """How the vocabulary is cut: into chunks whose logits stay in the cache, or as memory demands."""
        size = _COLUMNS if backend == "chunks" else _VALUES // self.n_rows
        if self.device.type == "cpu" and self.hidden.dtype != self.dtype:
            size = min(size, _WIDENED // self.width)
        size = max(tile, size // tile * tile)
        for first in range(0, self.vocab, size):
            yield slice(first, min(first + size, self.vocab))

    def columns(self, which: slice) -> torch.Tensor:
        """Logits of some columns [rows, columns]."""
        weight = self.weight[which]
        if self.device.type == "cuda" and self.hidden.dtype != self.dtype:
            return torch.mm(self.hidden, weight.T, out_dtype=self.dtype)
        # widening bfloat16 is exact, and a product of two is exact in float32: only the sums round
        return self.hidden.to(self.dtype) @ weight.to(self.dtype).T

    def tiles(self, rows: torch.Tensor, tiles: torch.Tensor, tile: int) -> torch.Tensor:
        """Penalised values of single tiles (Source.tiles), by one small product each."""
        columns = tiles[:, None] * tile + torch.arange(tile, device=self.device)
        values = torch.empty(columns.shape, dtype=self.dtype, device=self.device)
        step = max(1, (1 << 22) // (tile * self.width))
        for first in range(0, len(rows), step):
            part = slice(first, first + step)
            matrix = self.weight[columns[part].clamp(max=self.vocab - 1)].to(self.dtype)  # [n, tile, d]
            values[part] = (matrix @ self.hidden[rows[part], :, None].to(self.dtype)).squeeze(2)
        return _finish_tiles(values, rows, columns, self.vocab, self.rules)

    def at(self, ids: torch.Tensor) -> torch.Tensor:
        """Penalised values of single tokens (Source.at)."""
        matrix = self.weight[ids].to(self.dtype)  # [rows, k, d]
        values = (matrix @ self.hidden[:, :, None].to(self.dtype)).squeeze(2)
        return self.rules.on_tokens(values, ids, torch.arange(self.n_rows, device=self.device))


def _finish_tiles(
    values: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor, vocab: int, rules: Rules
) -> torch.Tensor:
    values = rules.on_tokens(values, columns, rows)
    return values.masked_fill_(columns >= vocab, float("-inf"))
