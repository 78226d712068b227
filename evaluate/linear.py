"""Differences between parts of one battery: any weighted sum of cells, with the intervals of evaluate/crossed.py.

A position effect, the effect of a format, "about myself minus about others" and "exact minus sampled"
are all the same thing: sums of cell means with weights that add up to nothing (an average without
one of the formats has weights that add up to 1, and is a level like any other). Every estimate of this
project is a plain mean over cells, and a mean is linear, so multiplying the columns of a cell by its
weight (times the number of cells) turns the mean over cells into the weighted sum, and the interval
with it. What is resampled stays the item: a column and its counterpart share their cluster.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from candor.rows import Estimate
from evaluate import components, crossed
from evaluate.grid import COUNTS, Grid, Scope
from evaluate.rows import make_estimate
from evaluate.stats import Floats, Ints
from evaluate.study import Cell

ROUNDING = 1e-9
ONE_ITEM = "one item only in a part of it: no interval"


@dataclass(frozen=True, slots=True)
class Contrast:
    """A weighted sum of cells of a grid's columns."""

    kind: str  # Estimate.kind
    measure: str
    name: str  # Estimate.reference: what is compared
    columns: Ints  # of the grid
    cells: Ints  # (columns,): which cell each belongs to
    weights: Floats  # (cells,): of the cells' means in the sum
    limits: tuple[float, float] = (-1.0, 1.0)

    @property
    def difference(self) -> bool:
        """Whether the weights add up to nothing: a paired difference, and not an average of some of the cells."""
        return abs(float(self.weights.sum())) < ROUNDING

    def scope(self, grid: Grid, *, draws: int, seed: int) -> Scope:
        """What it is taken over; items of all parts are resampled together, in one stratum."""
        clusters = grid.columns["cluster"].to_numpy(dtype=str)[self.columns]
        names, codes = np.unique(clusters, return_inverse=True)
        strata = np.zeros(len(names), dtype=np.int64)
        return Scope(
            measure=self.measure,
            group="all",
            split="all",
            columns=self.columns,
            clusters=codes.astype(np.int64),
            cells=self.cells,
            n_cells=len(self.weights),
            limits=self.limits,
            bootstrap=crossed.Bootstrap(strata, draws, seed, tuple(names)),
        )


def cell_codes(*labels: Sequence[str]) -> tuple[Ints, list[tuple[str, ...]]]:
    """Columns' cells numbered from 0 in order of appearance, and the labels of each cell."""
    keys = list(zip(*labels, strict=True))
    order = {key: i for i, key in enumerate(dict.fromkeys(keys))}
    return np.array([order[key] for key in keys], dtype=np.int64), list(order)


def estimate(
    contrasts: Sequence[Contrast], grid: Grid, wanted: Sequence[Cell], *, draws: int, seed: int
) -> list[Estimate]:
    """Every contrast of every cell of the study whose variants have all its parts."""
    found: list[Estimate] = []
    for contrast in contrasts:
        scope = contrast.scope(grid, draws=draws, seed=seed)
        factors = (contrast.weights * len(contrast.weights))[contrast.cells]
        part = grid.part(contrast.columns)
        for cells in _same_seeds(grid, wanted):
            rows = np.array([[grid.rows[m] for m in cell.members] for cell in cells])
            there = _complete(part.numbers["value"][rows], contrast.cells, len(contrast.weights))
            if there.any():
                kept = [cell for cell, has in zip(cells, there, strict=True) if has]
                found += _rows(contrast, scope, kept, part, rows[there], factors)
    crossed.item_weights.cache_clear()
    return found


def _same_seeds(grid: Grid, wanted: Sequence[Cell]) -> list[list[Cell]]:
    """Cells that have answers, grouped by their number of training seeds, which are worked out together."""
    groups: dict[int, list[Cell]] = {}
    for cell in wanted:
        if all(member in grid.rows for member in cell.members):
            groups.setdefault(len(cell.members), []).append(cell)
    return list(groups.values())


def _complete(values: Floats, cells: Ints, n_cells: int) -> NDArray[np.bool_]:
    """Which estimates have a value in every cell, (estimates,)."""
    filled = np.stack([~np.isnan(values[:, :, cells == c]).all(axis=2) for c in range(n_cells)], axis=2)
    return np.asarray(filled.all(axis=(1, 2)))


def _rows(
    contrast: Contrast, scope: Scope, cells: Sequence[Cell], part: Grid, members: Ints, factors: Floats
) -> list[Estimate]:
    """Estimate rows of one contrast; without an interval where a part of it rests on one item.

    ``members`` (estimates, seeds) are rows of ``part``, the grid's columns of the contrast. The lowest
    that it can be takes the lowest of what is added and the highest of what is subtracted.
    """
    values, lowest, highest = (part.numbers[name][members] for name in ("value", "lowest", "highest"))
    added = factors > 0
    bounds = [
        components.bound(scope.tables(np.where(added, first, second) * factors), float("nan"))
        for first, second in ((lowest, highest), (highest, lowest))
    ]
    tables = scope.tables(values * factors)
    estimated = crossed.intervals(tables, scope.bootstrap, limits=contrast.limits, symmetric=contrast.difference)
    thin = (tables.counts > 0).sum(axis=2).min(axis=(1, 2)) < 2
    rows = []
    for i, (cell, one) in enumerate(zip(cells, estimated, strict=True)):
        if thin[i]:
            nan = float("nan")
            one = one._replace(
                interval=one.interval._replace(low=nan, high=nan), method=ONE_ITEM, standard_error=nan, freedom=nan
            )
        counts = {name: int(part.counts[name][members[i]].sum()) for name in COUNTS}
        rows.append(
            make_estimate(
                contrast.measure,
                contrast.kind,
                (cell.name, contrast.name),
                one,
                counts=counts,
                limits=contrast.limits,
                bounds=(float(bounds[0][i]), float(bounds[1][i])),
            )
        )
    return rows


def columns_of(grid: Grid, measures: Sequence[str]) -> pd.DataFrame:
    """The grid's columns of some measures, with their positions as the index."""
    columns = grid.columns.reset_index(drop=True)
    return columns[columns["measure"].isin(measures)]
