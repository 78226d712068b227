"""Scores as one matrix, and what each estimate is taken over.

One row per variant, one column per (measure, prompt). A ``Scope`` says which columns an estimate
averages, in which cells (the unweighted means of protocol.md 1.4), and which items are resampled
together. evaluate/crossed.py does the arithmetic.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd

from evaluate import components, crossed, stats
from evaluate.measures import CENTRED, CURVE, bounds, by_group, composites, scores_leftover
from evaluate.stats import Floats, Ints

LEFTOVER = "_leftover"
LOST = ("n_refused", "n_unparsed")
COUNTS = ("n", "n_missing", *LOST)
NUMBERS = ("value", "leftover", "lowest", "highest", "variance")


@dataclass(frozen=True, slots=True)
class Grid:
    """Scores as matrices (variants, columns)."""

    rows: dict[str, int]
    columns: pd.DataFrame  # measure, prompt_id, cluster, group, split
    numbers: dict[str, Floats]  # NUMBERS; NaN where missing
    counts: dict[str, Ints]  # COUNTS
    asked: np.ndarray  # whether the variant was asked at all

    def part(self, columns: Ints) -> "Grid":
        """Some of the columns."""
        return Grid(
            rows=self.rows,
            columns=self.columns.iloc[columns],
            numbers={name: matrix[:, columns] for name, matrix in self.numbers.items()},
            counts={name: matrix[:, columns] for name, matrix in self.counts.items()},
            asked=self.asked[:, columns],
        )


@dataclass(frozen=True, slots=True)
class Scope:
    """What one estimate is taken over."""

    measure: str
    group: str
    split: str
    columns: Ints
    clusters: Ints
    cells: Ints
    n_cells: int
    limits: tuple[float, float]  # what the measure can be
    bootstrap: crossed.Bootstrap

    def tables(self, values: Floats) -> components.Tables:
        """Sums and counts of values (estimates, seeds, columns of this scope)."""
        return components.tabulate(values, self.clusters, self.cells, self.bootstrap.strata, n_cells=self.n_cells)


def build_grid(scores: pd.DataFrame) -> Grid:
    """Pivot a table of Score rows."""
    keys = ["measure", "prompt_id", "cluster", "group", "split"]
    columns = scores[keys].drop_duplicates(["measure", "prompt_id"]).reset_index(drop=True)
    place = pd.MultiIndex.from_frame(columns[["measure", "prompt_id"]])
    column = place.get_indexer(pd.MultiIndex.from_frame(scores[["measure", "prompt_id"]]))
    rows = {name: i for i, name in enumerate(scores["variant"].drop_duplicates())}
    row = scores["variant"].map(rows).to_numpy()
    shape = (len(rows), len(columns))
    numbers = {name: scores[name].to_numpy(dtype=np.float64) for name in NUMBERS}
    numbers["lowest"], numbers["highest"] = _bounds(scores, numbers)

    def matrix(values: Floats, empty: float) -> Floats:
        filled = np.full(shape, empty)
        filled[row, column] = values
        return filled

    asked = np.zeros(shape, dtype=bool)
    asked[row, column] = True
    return Grid(
        rows=rows,
        columns=columns,
        numbers={name: matrix(values, np.nan) for name, values in numbers.items()},
        counts={name: matrix(scores[name].to_numpy(dtype=np.float64), 0).astype(np.int64) for name in COUNTS},
        asked=asked,
    )


def _bounds(scores: pd.DataFrame, numbers: dict[str, Floats]) -> tuple[Floats, Floats]:
    """What each score would be if all that is missing had scored as low, and as high, as can be.

    Missing are the answers that have no score, and of those that have one, the share outside the
    options: it is either left out of the value (exact probabilities) or in it at the middle of the
    scale (a language that is neither).
    """
    names, place = np.unique(scores["measure"].to_numpy(dtype=str), return_inverse=True)
    floor, ceiling = np.array([bounds(name) for name in names]).T[:, place]
    middling = np.array([scores_leftover(name) for name in names])[place]
    n, n_missing = (scores[name].to_numpy(dtype=np.float64) for name in ("n", "n_missing"))
    answered = 1 - n_missing / np.maximum(n + n_missing, 1)
    leftover = np.nan_to_num(numbers["leftover"])
    value = np.nan_to_num(numbers["value"])
    known = answered * (1 - leftover)
    inside = answered * np.where(middling, value - leftover * (floor + ceiling) / 2, value * (1 - leftover))
    found = []
    for name, extreme in (("lowest", floor), ("highest", ceiling)):
        given = numbers[name]
        found.append(np.where(np.isnan(given), inside + (1 - known) * extreme, given))
    return found[0], found[1]


def scopes(grid: Grid, *, draws: int, seed: int, worst: str = "") -> Iterator[Scope]:
    """Every measure over all items, over seen and unseen ones, and per group.

    Of the worst of k, only ``worst`` is split up; the other k are one point of a curve each. What is
    centred within a model is taken per group alone.
    """
    measures = _unique(grid.columns["measure"])
    parts = {m: (m,) for m in measures} | composites(measures)
    for measure, of in parts.items():
        mask = grid.columns["measure"].isin(of).to_numpy()
        groups = [(g, "all") for g in _unique(grid.columns[mask].group)]
        if measure.endswith(CENTRED):
            wanted = groups  # over all groups what is centred is 0
        elif measure.startswith(CURVE) and measure != worst:
            wanted = [("all", "all")]
        else:
            wanted = [("all", "all"), ("all", "seen"), ("all", "unseen"), *groups]
        for group, split in wanted:
            chosen = mask.copy()
            if group != "all":
                chosen &= (grid.columns["group"] == group).to_numpy()
            if split != "all":
                chosen &= (grid.columns["split"] == split).to_numpy()
            if chosen.any():
                yield _scope(grid.columns, measure, of, (group, split), np.flatnonzero(chosen), draws, seed)


def _unique(values: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(values))


def _scope(
    columns: pd.DataFrame,
    measure: str,
    of: tuple[str, ...],
    place: tuple[str, str],
    chosen: Ints,
    draws: int,
    seed: int,
) -> Scope:
    """Cells, clusters and strata of one scope; ``of`` are the measures that it averages."""
    part = columns.iloc[chosen]
    groups = _unique(part["group"]) if by_group(measure) else ["all"]
    code = part["group"].map({g: i for i, g in enumerate(groups)}).fillna(0).to_numpy(dtype=np.int64)
    # every part of a composite has its cells, asked or not: one without answers makes the average missing
    code = code + part["measure"].map({m: i * len(groups) for i, m in enumerate(of)}).to_numpy(dtype=np.int64)
    n_cells = len(groups) * len(of)
    owner = part["measure"] if len(of) > 1 else pd.Series("", index=part.index)
    name = owner + "/" + part["cluster"]
    names, clusters = np.unique(name.to_numpy(dtype=str), return_inverse=True)
    # an item that occurs in several groups (a self-assessment template) cannot be stratified by group
    nested = part["group"].groupby(name).nunique().max() == 1
    label = owner + "/" + part["group"] if nested else owner
    stratum_of = dict(zip(name, label, strict=True))
    strata = np.unique([stratum_of[n] for n in names], return_inverse=True)[1].astype(np.int64)
    strata = stats.merge_small_strata(strata)
    if n_cells == 1 and len(strata) - strata.max() - 1 < crossed.MANY_ITEMS:
        strata = np.zeros_like(strata)  # too few items to learn each stratum's spread; this errs on the wide side
    return Scope(
        measure=measure,
        group=place[0],
        split=place[1],
        columns=chosen,
        clusters=clusters.astype(np.int64),
        cells=code,
        n_cells=n_cells,
        limits=bounds(measure),
        # the same items get the same weights whatever the measure, so that measures are comparable draw by draw
        bootstrap=crossed.Bootstrap(strata, draws, seed, tuple(names)),
    )
