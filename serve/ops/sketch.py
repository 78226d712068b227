"""A sketch of every row of logits: its maximum and its sum of exponentials, tile by tile of the vocabulary.

That is enough to answer every sampling and scoring question exactly by looking again only at the few
tiles that matter (serve.ops.draw, serve.ops.truncate, serve.ops.choices), and it can be made while
the logits are on chip, so that a fused kernel need never write them. One exponential per logit is
all it costs; noise per logit, as in Gumbel-max samplers, costs several times that on a GPU.

This is the plain torch version, which is the CPU path; serve/ops/triton_sketch.py holds the same
algorithm in Triton, serve/ops/reference.py what both must equal, in float64.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from serve.ops.backends import BACKENDS, choose
from serve.ops.checks import FLOATS, check_size, check_tensor, per_row
from serve.ops.rules import NO_RULES, Rules
from serve.ops.sources import HeadSource, LogitsSource, Source
from serve.ops.tiles import Tiles

# Logits handled at a time: on a CPU what stays in a core's cache (1 MiB), on a GPU enough to fill it.
_AT_A_TIME = {"cpu": 1 << 19, "cuda": 1 << 26}
# Columns per tile. A draw looks at one tile again, so a CPU, which pays for each element, takes fewer.
_TILES = {"cpu": 64, "cuda": 128}


@dataclass(frozen=True, slots=True)
class Temperatures:
    """Inverse temperatures of the rows, and what is known of them without asking a GPU."""

    scale: torch.Tensor  # [rows] float64; 1 for greedy rows
    greedy: torch.Tensor  # [rows] bool
    any_greedy: bool  # False when no row is known to be greedy
    plain: bool  # True when every row is known to have scale 1

    @classmethod
    def of(cls, inv_temp: float | torch.Tensor, rows: int, device: torch.device) -> "Temperatures":
        """Checked: finite and not negative."""
        rule = "it must be 0 (greedy) or above, and finite"
        high = torch.finfo(torch.float32).max
        scale = per_row("inv_temp", inv_temp, rows, rule=rule, low=0.0, high=high, device=device)
        greedy = scale == 0
        if not isinstance(inv_temp, torch.Tensor):
            any_greedy, plain = inv_temp == 0, inv_temp in (0, 1)
        elif device.type == "cpu":
            any_greedy, plain = bool(greedy.any()), bool(((scale == 1) | greedy).all())
        else:
            any_greedy, plain = True, False
        return cls(scale.masked_fill(greedy, 1.0) if any_greedy else scale, greedy, any_greedy, plain)


@dataclass(frozen=True, slots=True)
class Sketch:
    """Rows of logits summed up; made by ``sketch_logits`` or ``lmhead_sketch``.

    A greedy row (inverse temperature 0) takes the largest logit; its other numbers are those of
    temperature 1.
    """

    source: Source  # where single tiles can be looked at again
    tile: int  # columns per tile; the last tile may be short
    inv_temp: torch.Tensor  # [rows] float64; 1 for greedy rows
    greedy: torch.Tensor  # [rows] bool
    any_greedy: bool  # False when no row is known to be greedy
    plain: bool  # True when every row is known to have inverse temperature 1 (or 0)
    maxima: torch.Tensor  # [rows, tiles] largest penalised logit of each tile, before the temperature
    row_max: torch.Tensor  # [rows] float64
    edges: torch.Tensor  # [rows, tiles] float64: cumulative weights, weight = exp((x - row_max) inv_temp)
    total: torch.Tensor  # [rows] float64: the last edge
    raw_total: torch.Tensor | None  # [rows] float64: sum of exp(x - row_max), when asked for
    entropy: torch.Tensor | None  # [rows] float64, nats, when asked for

    @property
    def n_rows(self) -> int:
        """Rows."""
        return self.maxima.shape[0]

    @property
    def log_z(self) -> torch.Tensor:
        """Log of the normaliser of the scaled logits [rows], float64."""
        return self.row_max * self.inv_temp + self.total.log()

    @property
    def raw_log_z(self) -> torch.Tensor:
        """The same at temperature 1."""
        if self.raw_total is None:
            raise ValueError("raw is False in this sketch; make it with raw=True for numbers at temperature 1.")
        return self.row_max + self.raw_total.log()

    def broken(self) -> torch.Tensor:
        """Which rows [rows] are no distribution: NaN, +inf, or every token ruled out."""
        return ~(torch.isfinite(self.total) & torch.isfinite(self.row_max) & (self.total > 0))

    def refuse_broken(self, name: str) -> None:
        """ValueError that names the rows that are no distribution."""
        broken = self.broken()
        if bool(broken.any()):
            rows = broken.nonzero().flatten().tolist()
            raise ValueError(
                f"{name} of rows {rows[:8]} ({len(rows)} in all) are not a distribution: each row needs a finite "
                "logit that no mask rules out, and no NaN or +inf."
            )


def sketch_logits(
    logits: torch.Tensor,
    inv_temp: float | torch.Tensor = 1.0,
    *,
    rules: Rules = NO_RULES,
    raw: bool = False,
    entropy: bool = False,
    tile: int | None = None,
    check: bool = True,
    backend: str | None = None,
) -> Sketch:
    """Sketch of logits [rows, vocab] that lie in memory, read once.

    ``inv_temp`` is 1 / temperature, one number or [rows]; 0 is greedy. ``raw`` also sums at
    temperature 1, ``entropy`` also gives the entropy. ``check=False`` skips the test for rows that
    are no distribution, which makes the host wait for a GPU; from such rows some token is drawn, and its
    log-probability is NaN.
    """
    check_tensor("logits", logits, shape=(None, None), dtypes=FLOATS)
    source = LogitsSource(logits, rules)
    sketch = _sketch(source, inv_temp, raw, entropy, tile, backend)
    if check:
        sketch.refuse_broken("logits")
    return sketch


def lmhead_sketch(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    inv_temp: float | torch.Tensor = 1.0,
    *,
    rules: Rules = NO_RULES,
    raw: bool = False,
    entropy: bool = False,
    tile: int | None = None,
    check: bool = True,
    backend: str | None = None,
) -> Sketch:
    """Sketch of the logits hidden [rows, d] @ weight [vocab, d].T, which are never held as a whole.

    Products are summed in float32 whatever the inputs (float64 for float64). Otherwise as
    ``sketch_logits``.
    """
    check_tensor("hidden", hidden, shape=(None, None), dtypes=FLOATS)
    check_tensor("weight", weight, shape=(None, hidden.shape[1]), dtypes=(hidden.dtype,), device=hidden.device)
    source = HeadSource(hidden, weight, rules)
    sketch = _sketch(source, inv_temp, raw, entropy, tile, backend)
    if check:
        sketch.refuse_broken("hidden @ weight.T")
    return sketch


def _sketch(
    source: LogitsSource | HeadSource,
    inv_temp: float | torch.Tensor,
    raw: bool,
    entropy: bool,
    tile: int | None,
    backend: str | None,
) -> Sketch:
    rows, device = source.n_rows, source.device
    source.rules.check(rows, source.vocab, device)
    temperatures = Temperatures.of(inv_temp, rows, device)
    tile = check_size("tile", _TILES.get(device.type, 128) if tile is None else tile)
    n_tiles = -(-source.vocab // tile)
    tiles = Tiles.empty(rows, n_tiles, source.dtype, device, entropy=entropy, raw=raw)
    name = choose(source.op, device=device, rows=rows, width=source.width, backend=backend)
    fused = name == "triton" or (name == "chunks" and device.type == "cuda")
    if fused and source.dtype == torch.float64:
        if backend is not None:
            raise ValueError(f"backend is {backend!r}; for float64 it must be {BACKENDS[source.op][0]!r}.")
        fused = False
    if fused:
        from serve.ops import triton_sketch

        triton_sketch.fill(tiles, source, temperatures.scale, tile, name)
    else:
        for where, columns, values in _blocks(source, tile, name):
            scale = None if temperatures.plain else temperatures.scale[where, None, None].to(values.dtype)
            _fill(tiles.part(where, columns), values, scale, tile)
    return _finish(source, tile, temperatures, tiles, fused)


def _blocks(source: LogitsSource | HeadSource, tile: int, backend: str) -> Iterator[tuple[slice, slice, torch.Tensor]]:
    """Penalised logits in pieces that fit the cache: which rows, which tiles, values [rows, columns]."""
    room = _AT_A_TIME.get(source.device.type, 1 << 18)
    for columns in source.column_slices(tile, backend):
        width = columns.stop - columns.start
        tiles = slice(columns.start // tile, -(-columns.stop // tile))
        wide = source.columns(columns)
        step = max(1, room // width)
        for first in range(0, source.n_rows, step):
            rows = slice(first, min(first + step, source.n_rows))
            yield rows, tiles, source.rules.on_columns(wide[rows].to(source.dtype), rows, columns)


def _fill(out: Tiles, values: torch.Tensor, scale: torch.Tensor | None, tile: int) -> None:
    """Sum up values [rows, columns], whose first column begins a tile; ``scale`` None is 1."""
    whole = values.shape[1] // tile
    if whole:
        _fill_tiles(
            out.part(slice(None), slice(0, whole)), values[:, : whole * tile].reshape(len(values), whole, tile), scale
        )
    if whole * tile < values.shape[1]:
        _fill_tiles(out.part(slice(None), slice(whole, whole + 1)), values[:, None, whole * tile :], scale)


def _fill_tiles(out: Tiles, values: torch.Tensor, scale: torch.Tensor | None) -> None:
    """Sum up values [rows, tiles, tile]."""
    torch.amax(values, dim=2, out=out.maxima)
    base = out.maxima.masked_fill(out.maxima == float("-inf"), 0.0)  # a tile ruled out as a whole
    below = values - base[:, :, None]
    if out.raw_sums is not None and scale is not None:
        torch.sum(below.exp(), dim=2, out=out.raw_sums)
    if out.moments is None:
        weights = (below if scale is None else below.mul_(scale)).exp_()
    else:
        weights = (below if scale is None else below * scale).exp()
        torch.sum(below.masked_fill_(weights == 0, 0.0).mul_(weights), dim=2, out=out.moments)
    torch.sum(weights, dim=2, out=out.sums)
    if out.raw_sums is not None and scale is None:
        out.raw_sums.copy_(out.sums)


def _finish(source: Source, tile: int, temperatures: Temperatures, tiles: Tiles, fused: bool) -> Sketch:
    """From tiles to rows, in float64: a few thousand numbers a row."""
    if fused:
        from serve.ops import triton_sketch

        row_max, edges, total, raw_total, entropy = triton_sketch.finish(tiles, temperatures.scale)
    else:
        row_max, edges, total, raw_total, entropy = _cumulate(tiles, temperatures)
    return Sketch(
        source=source,
        tile=tile,
        inv_temp=temperatures.scale,
        greedy=temperatures.greedy,
        any_greedy=temperatures.any_greedy,
        plain=temperatures.plain,
        maxima=tiles.maxima,
        row_max=row_max,
        edges=edges,
        total=total,
        raw_total=raw_total,
        entropy=entropy,
    )


def _cumulate(
    tiles: Tiles, temperatures: Temperatures
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """row_max, edges, total, raw_total and entropy of ``Sketch``."""
    scale = temperatures.scale
    row_max = tiles.maxima.amax(dim=1).double()
    below = tiles.maxima.double() - row_max[:, None]
    lift = (below if temperatures.plain else below * scale[:, None]).exp()
    edges = (tiles.sums.double() * lift).cumsum(dim=1)
    total = edges[:, -1]
    raw_total = None
    if tiles.raw_sums is not None:
        raw_total = total if temperatures.plain else (tiles.raw_sums.double() * below.exp()).sum(dim=1)
    entropy = None
    if tiles.moments is not None:
        moments = lift * (tiles.moments.double() + below.masked_fill(lift == 0, 0.0) * tiles.sums.double())
        entropy = total.log() - scale * moments.sum(dim=1) / total
    return row_max, edges, total, raw_total, entropy
