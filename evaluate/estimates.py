"""From scores to estimates: levels, paired differences and correlations, each with its interval.

Scores become one matrix (variants x columns, a column being a measure of a prompt). A ``Scope``
says which columns an estimate averages, in which cells (the unweighted means of protocol.md 1.4),
and which items are resampled together. evaluate/stats.py does the arithmetic.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import pandas as pd
from tqdm import tqdm

from candor.rows import Estimate, Variant
from evaluate import stats
from evaluate.batteries.self_assessment import FORMATS
from evaluate.stats import Estimated, Floats, Ints
from evaluate.study import Cell, Pair, cells, pairs

COMPOSITE = "self_assessment"
SAMPLED = "_sampled"  # suffix of a closed question's sampled score where the exact one exists too
LEFTOVER = "_leftover"
MAIN, WITHOUT_BASE, AVERAGED = "main study", "main study without base models", "main study, seeds averaged"
# averaged dimension by dimension; every other measure is averaged over its prompts
BY_DIMENSION = {"intentions", *FORMATS}
ONE_SEED = "; prompt uncertainty only (one training seed)"


@dataclass(frozen=True, slots=True)
class Grid:
    """Scores as a matrix: one row per variant, one column per (measure, prompt)."""

    rows: dict[str, int]
    columns: pd.DataFrame  # measure, prompt_id, cluster, group, split
    values: Floats  # NaN where missing
    leftover: Floats
    n: Ints
    n_missing: Ints
    asked: np.ndarray  # whether the variant was asked at all


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
    strata: Ints
    weights: Floats


def build_grid(scores: pd.DataFrame) -> Grid:
    """Pivot a table of Score rows."""
    keys = ["measure", "prompt_id", "cluster", "group", "split"]
    columns = scores[keys].drop_duplicates(["measure", "prompt_id"]).reset_index(drop=True)
    place = pd.MultiIndex.from_frame(columns[["measure", "prompt_id"]])
    column = place.get_indexer(pd.MultiIndex.from_frame(scores[["measure", "prompt_id"]]))
    rows = {name: i for i, name in enumerate(scores["variant"].drop_duplicates())}
    row = scores["variant"].map(rows).to_numpy()
    shape = (len(rows), len(columns))

    def matrix(name: str, empty: float) -> Floats:
        filled = np.full(shape, empty)
        filled[row, column] = scores[name].to_numpy(dtype=np.float64)
        return filled

    asked = np.zeros(shape, dtype=bool)
    asked[row, column] = True
    return Grid(
        rows=rows,
        columns=columns,
        values=matrix("value", np.nan),
        leftover=matrix("leftover", np.nan),
        n=matrix("n", 0).astype(np.int64),
        n_missing=matrix("n_missing", 0).astype(np.int64),
        asked=asked,
    )


def scopes(grid: Grid, *, draws: int, seed: int) -> list[Scope]:
    """Every measure over all items, over seen and unseen ones, and per group."""
    measures = list(dict.fromkeys(grid.columns["measure"]))
    parts = {m: (grid.columns["measure"] == m).to_numpy() for m in measures}
    if any(m in FORMATS for m in measures):
        parts[COMPOSITE] = grid.columns["measure"].isin(FORMATS).to_numpy()
    found = []
    for measure, mask in parts.items():
        inside = grid.columns[mask]
        wanted = [
            ("all", "all"),
            *(("all", s) for s in ("seen", "unseen")),
            *((g, "all") for g in _unique(inside.group)),
        ]
        for group, split in wanted:
            chosen = mask.copy()
            if group != "all":
                chosen &= (grid.columns["group"] == group).to_numpy()
            if split != "all":
                chosen &= (grid.columns["split"] == split).to_numpy()
            if chosen.any():
                found.append(_scope(grid.columns, measure, group, split, np.flatnonzero(chosen), draws, seed))
    return found


def _unique(values: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(values))


def _scope(columns: pd.DataFrame, measure: str, group: str, split: str, chosen: Ints, draws: int, seed: int) -> Scope:
    """Cells, clusters and strata of one scope."""
    part = columns.iloc[chosen]
    groups = _unique(part["group"])
    by_dimension = measure == COMPOSITE or measure.removesuffix(SAMPLED) in BY_DIMENSION
    code = part["group"].map({g: i for i, g in enumerate(groups)}).to_numpy() if by_dimension else np.zeros(len(part))
    if measure == COMPOSITE:
        # every format has its cells, asked or not: one without answers makes the average missing
        code = code + part["measure"].map({f: i * len(groups) for i, f in enumerate(FORMATS)}).to_numpy()
        n_cells = len(groups) * len(FORMATS)
    else:
        n_cells = len(groups) if by_dimension else 1
    owner = part["measure"] if measure == COMPOSITE else pd.Series("", index=part.index)
    name = owner + "/" + part["cluster"]
    names, clusters = np.unique(name.to_numpy(dtype=str), return_inverse=True)
    # an item that occurs in several groups (a self-assessment template) cannot be stratified by group
    nested = part["group"].groupby(name).nunique().max() == 1
    label = owner + "/" + part["group"] if nested else owner
    stratum_of = dict(zip(name, label, strict=True))
    strata = np.unique([stratum_of[n] for n in names], return_inverse=True)[1].astype(np.int64)
    strata = stats.merge_small_strata(strata)
    if n_cells == 1 and len(strata) - strata.max() - 1 < stats.FEW:
        strata = np.zeros_like(strata)  # too few items to learn each stratum's spread; this errs on the wide side
    # the same items get the same weights whatever the measure, so that measures are comparable draw by draw
    weights = stats.resampling_weights(strata, draws, stats.generator(seed, "items", *names))
    return Scope(
        measure, group, split, chosen, clusters.astype(np.int64), code.astype(np.int64), n_cells, strata, weights
    )


def _table(scope: Scope, values: Floats) -> stats.Table:
    return stats.tabulate(values[scope.columns], scope.clusters, scope.cells, scope.strata, n_cells=scope.n_cells)


def _over_seeds(scope: Scope, rows: Sequence[Floats]) -> Estimated:
    """One row: uncertainty over items; several (training seeds): over both."""
    if len(rows) > 1:
        return stats.crossed_interval([_table(scope, row) for row in rows])
    found = stats.interval(_table(scope, rows[0]), scope.weights)
    return found._replace(method=found.method + ONE_SEED)


def make_estimate(
    measure: str,
    kind: str,
    names: tuple[str, str],
    found: Estimated,
    *,
    counts: tuple[int, int],
    scope: tuple[str, str] = ("all", "all"),
    bounds: tuple[float, float] = (-1.0, 1.0),
) -> Estimate:
    """An Estimate row: NaN becomes None, and no bound lies outside what the measure can be."""
    value, low, high = (None if np.isnan(x) else float(np.clip(x, *bounds)) for x in found.interval)
    return Estimate(
        measure=measure,
        kind=kind,
        variant=names[0],
        reference=names[1],
        group=scope[0],
        split=scope[1],
        value=value,
        low=low,
        high=high,
        n=counts[0],
        n_missing=counts[1],
        n_clusters=found.n_clusters,
        method=found.method,
    )


def levels(grid: Grid, wanted: Sequence[Cell], over: Sequence[Scope]) -> list[Estimate]:
    """Each cell's level in each scope; for exact scores also the mass outside the options."""
    found = []
    for cell in tqdm(wanted, desc="levels", unit="variant", disable=None):
        rows = [grid.rows[m] for m in cell.members if m in grid.rows]
        for scope in over:
            where = np.ix_(np.array(rows, dtype=np.int64), scope.columns)
            if len(rows) < len(cell.members) or not grid.asked[where].any(axis=1).all():
                continue
            place, names = (scope.group, scope.split), (cell.name, "")
            counts = (int(grid.n[where].sum()), int(grid.n_missing[where].sum()))
            estimated = _over_seeds(scope, [grid.values[row] for row in rows])
            found.append(
                make_estimate(scope.measure, "level", names, estimated, counts=counts, scope=place, bounds=(0, 1))
            )
            left = grid.leftover[where]
            if place == ("all", "all") and scope.measure != COMPOSITE and not np.isnan(left).all(axis=1).any():
                estimated = _over_seeds(scope, [grid.leftover[row] for row in rows])
                name, counts = scope.measure + LEFTOVER, (int((~np.isnan(left)).sum()), int(np.isnan(left).sum()))
                found.append(make_estimate(name, "level", names, estimated, counts=counts, bounds=(0, 1)))
    return found


def contrasts(grid: Grid, wanted: Sequence[Pair], over: Sequence[Scope]) -> list[Estimate]:
    """Paired differences over the prompts that both variants answered; n counts such prompts."""
    found = []
    for pair in tqdm(wanted, desc="contrasts", unit="pair", disable=None):
        members = [(grid.rows[a], grid.rows[b]) for a, b in pair.members if a in grid.rows and b in grid.rows]
        for scope in over:
            there = all(grid.asked[row, scope.columns].any() for both in members for row in both)
            if len(members) < len(pair.members) or not there or scope.group != "all":
                continue
            differences = [grid.values[a] - grid.values[b] for a, b in members]
            lost = sum(int(np.isnan(d[scope.columns]).sum()) for d in differences)
            estimated = _over_seeds(scope, differences)
            estimated = estimated._replace(method="paired " + estimated.method)
            counts = (len(differences) * len(scope.columns) - lost, lost)
            names, place = (pair.variant, pair.reference), (scope.group, scope.split)
            found.append(make_estimate(scope.measure, "contrast", names, estimated, counts=counts, scope=place))
    return found


def correlations(
    variants: Sequence[Variant], found: Sequence[Estimate], measures: Sequence[str], *, draws: int, seed: int
) -> list[Estimate]:
    """Spearman correlations between measures over the main study's variants (control == "")."""
    level = {
        (e.variant, e.measure): e.value
        for e in found
        if e.kind == "level" and e.group == "all" and e.split == "all" and e.value is not None
    }
    main = [v for v in variants if not v.control]
    pools = [c for c in cells(main) if c.headline]
    sets = {MAIN: [v.name for v in main], WITHOUT_BASE: [v.name for v in main if v.stage != "base"]}
    if any(len(c.members) > 1 for c in pools):
        sets[AVERAGED] = [c.name for c in pools]
    rows = []
    for label, names in sets.items():
        for x, y in combinations(measures, 2):
            there = [n for n in names if (n, x) in level and (n, y) in level]
            pair = ([level[n, x] for n in there], [level[n, y] for n in there])
            rng = stats.generator(seed, "spearman", label, x, y)
            interval = stats.spearman(*pair, draws=draws, rng=rng)
            method = f"Spearman; bootstrap over variants, {draws} draws; variants of one base model are not independent"
            estimated = Estimated(interval, method, len(there))
            rows.append(
                make_estimate(x, "correlation", (label, y), estimated, counts=(len(there), len(names) - len(there)))
            )
    return rows


def all_estimates(
    scores: pd.DataFrame, variants: Sequence[Variant], *, draws: int, seed: int, correlated: Sequence[str]
) -> list[Estimate]:
    """Every estimate that scores alone can give."""
    grid = build_grid(scores)
    over = scopes(grid, draws=draws, seed=seed)
    rows = levels(grid, cells(variants), over)
    rows += contrasts(grid, pairs(variants), over)
    rows += correlations(variants, rows, correlated, draws=draws, seed=seed)
    return rows
