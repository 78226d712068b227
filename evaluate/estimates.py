"""From scores to estimates: levels and paired differences, each with its interval, bounds and tests.

The interval says how far the choice of items and training seeds may have moved a number; the
bounds say how far the answers that are missing could have moved it, whatever they would have been.
Correlations between measures are in evaluate/associations.py.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from tqdm import tqdm

from candor.rows import Estimate, Hypothesis, Variant
from evaluate import components, crossed
from evaluate.associations import AVERAGED as AVERAGED
from evaluate.associations import MAIN as MAIN
from evaluate.associations import WITHOUT_BASE as WITHOUT_BASE
from evaluate.associations import correlations
from evaluate.clustering import Clustering, clustering
from evaluate.grid import LEFTOVER as LEFTOVER
from evaluate.grid import Grid, Scope
from evaluate.grid import build_grid as build_grid
from evaluate.grid import scopes as scopes
from evaluate.hypotheses import contrast_tests, correct, fully_realigned
from evaluate.measures import CURVE
from evaluate.rows import make_estimate
from evaluate.stats import Floats, Ints
from evaluate.study import Cell, Pair, cells, domain_pairs, pairs


@dataclass(frozen=True, slots=True)
class Bounds:
    """The values (estimates, seeds, columns) of one kind, and what they could have been."""

    value: Floats
    lowest: Floats
    highest: Floats


def all_estimates(
    scores: pd.DataFrame,
    variants: Sequence[Variant],
    *,
    draws: int,
    seed: int,
    headline: Sequence[str],
    correlated: Sequence[str],
    margin: float,
) -> tuple[list[Estimate], list[Hypothesis]]:
    """Every estimate and every test that scores alone can give.

    ``headline``: the measures whose differences are the study's claims, worst of k first;
    ``correlated``: those that are correlated over variants; ``margin``: the largest difference to
    the base that still counts as fully realigned.
    """
    grid = build_grid(scores)
    wanted_cells, wanted_pairs = cells(variants), [*pairs(variants), *domain_pairs(variants)]
    found: list[Estimate] = []
    tests: list[Hypothesis] = []
    over = list(scopes(grid, draws=draws, seed=seed, worst=headline[0]))
    for scope in tqdm(over, desc="estimates", unit="scope", disable=None):
        part = grid.part(scope.columns)
        found += levels(part, scope, wanted_cells)
        if scope.group == "all":
            differences, about = _contrasts(part, scope, wanted_pairs, headline, margin)
            found += differences
            tests += about
    crossed.item_weights.cache_clear()
    tests += fully_realigned(tests, headline)
    associations, about = correlations(variants, found, correlated, draws=draws, seed=seed)
    return found + associations, correct(tests + about)


def _by_seeds(members: Iterable[tuple[int, ...]]) -> dict[int, list[int]]:
    """Positions of the members with the same number of training seeds, which are worked out together."""
    found: dict[int, list[int]] = {}
    for position, rows in enumerate(members):
        found.setdefault(len(rows), []).append(position)
    return found


def levels(part: Grid, scope: Scope, wanted: Sequence[Cell]) -> Iterator[Estimate]:
    """Each cell's level; for exact scores also the mass outside the options."""
    there = [c for c in wanted if all(m in part.rows and part.asked[part.rows[m]].any() for m in c.members)]
    members = [tuple(part.rows[m] for m in c.members) for c in there]
    for positions in _by_seeds(members).values():
        rows = np.array([members[p] for p in positions])
        names = [(there[p].name, "") for p in positions]
        values = Bounds(*(part.numbers[name][rows] for name in ("value", "lowest", "highest")))
        answers = (part.counts["n"][rows].astype(np.float64), part.numbers["variance"][rows])
        counts = {name: matrix[rows].sum(axis=(1, 2)) for name, matrix in part.counts.items()}
        yield from _estimate(scope, scope.measure, "level", names, values, answers, counts)
        left = part.numbers["leftover"][rows]
        known = ~np.isnan(left).all(axis=2).any(axis=1)
        single = scope.measure in set(part.columns["measure"])  # an average of formats has no mass of its own
        if (scope.group, scope.split) == ("all", "all") and single and known.any():
            left, names = left[known], [name for name, k in zip(names, known, strict=True) if k]
            missing = np.isnan(left)
            share = Bounds(left, np.where(missing, 0.0, left), np.where(missing, 1.0, left))
            ones = (np.ones_like(left), np.full_like(left, np.nan))
            counts = {"n": (~missing).sum(axis=(1, 2)), "n_missing": missing.sum(axis=(1, 2))}
            yield from _estimate(scope, scope.measure + LEFTOVER, "level", names, share, ones, counts, (0.0, 1.0))


def contrasts(grid: Grid, wanted: Sequence[Pair], over: Iterable[Scope]) -> list[Estimate]:
    """Paired differences over the prompts that both variants answered, without tests."""
    return [row for scope in over for row in _contrasts(grid.part(scope.columns), scope, wanted, (), 1.0)[0]]


def _contrasts(
    part: Grid, scope: Scope, wanted: Sequence[Pair], headline: Sequence[str], margin: float
) -> tuple[list[Estimate], list[Hypothesis]]:
    """Paired differences over the prompts that both variants answered, with tests; n counts both sides' answers."""
    there = [
        p for p in wanted if all(m in part.rows and part.asked[part.rows[m]].any() for both in p.members for m in both)
    ]
    members = [tuple(part.rows[a] for a, _ in p.members) for p in there]
    found: list[Estimate] = []
    tests: list[Hypothesis] = []
    for positions in _by_seeds(members).values():
        chosen = [there[p] for p in positions]
        first, second = (
            np.array([[part.rows[both[side]] for both in p.members] for p in chosen], dtype=np.int64) for side in (0, 1)
        )
        value, lowest, highest = (part.numbers[name] for name in ("value", "lowest", "highest"))
        differences = Bounds(
            value[first] - value[second], lowest[first] - highest[second], highest[first] - lowest[second]
        )
        ones = (np.ones_like(differences.value), np.full_like(differences.value, np.nan))
        behind = [np.unique(both) for both in np.concatenate([first, second], axis=1)]  # a shared base counts once
        counts = {name: np.array([matrix[rows].sum() for rows in behind]) for name, matrix in part.counts.items()}
        names = [(p.variant, p.reference) for p in chosen]
        wide = scope.limits[1] - scope.limits[0]
        rows = list(_estimate(scope, scope.measure, "contrast", names, differences, ones, counts, (-wide, wide)))
        found += rows
        main = scope.split == "all" and (not scope.measure.startswith(CURVE) or scope.measure in headline)
        if main:
            items = components.item_means(scope.tables(differences.value))
            for pair, row, item in zip(chosen, rows, items, strict=True):
                tests += contrast_tests(pair, row, item, headline=headline, margin=margin) if pair.headline else []
    return found, tests


def _estimate(
    scope: Scope,
    measure: str,
    kind: str,
    names: Sequence[tuple[str, str]],
    values: Bounds,
    answers: tuple[Floats, Floats],
    counts: dict[str, Ints],
    limits: tuple[float, float] | None = None,
) -> Iterator[Estimate]:
    """One row per estimate of ``values``; ``answers`` are the number behind each value and their variance."""
    limits = scope.limits if limits is None else limits
    symmetric = kind == "contrast"
    found = crossed.intervals(scope.tables(values.value), scope.bootstrap, limits=limits, symmetric=symmetric)
    lowest = components.bound(scope.tables(values.lowest), limits[0])
    highest = components.bound(scope.tables(values.highest), limits[1])
    for i, (name, estimated) in enumerate(zip(names, found, strict=True)):
        method = "paired " + estimated.method if kind == "contrast" else estimated.method
        alike = clustering(
            values.value[i], answers[0][i], answers[1][i], scope.clusters, scope.cells, n_cells=scope.n_cells
        )
        yield make_estimate(
            measure,
            kind,
            name,
            estimated._replace(method=method),
            counts={count: int(totals[i]) for count, totals in counts.items()},
            scope=(scope.group, scope.split),
            limits=limits,
            bounds=(float(lowest[i]), float(highest[i])),
            alike=_design(alike, estimated.standard_error),
        )


def _design(alike: Clustering, standard_error: float) -> tuple[float, float]:
    """Intraclass correlation and design effect; the latter is undefined without variation."""
    defined = alike.naive_variance > components.TINY
    return alike.icc, standard_error**2 / alike.naive_variance if defined else float("nan")
