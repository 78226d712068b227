"""Along training: behaviour, intentions and self-report against optimizer steps, and which moves first.

A stage of training is a course: its start (the base model, or the misaligned variant), its
checkpoints, and its end (the variant itself). Everything is the change since the start, over the
prompts that every point of the course answered, so that points differ in weights alone. Two rules,
fixed in advance, say when a measure has moved:

- ``first_shift``: the first step from which on the interval of the change (over items) excludes 0, on
  the side of the final change, at that point and at every later one;
- ``half_step``: the step at which the change first reaches half of its final value, on the straight line
  between neighbouring points; its interval comes from resampling the items.

A measure whose final change cannot be told from 0 did not move, and has neither. ``moves_first`` is the
share of bootstrap draws in which a measure's half step is the earliest of the three (behaviour,
intentions, self-report); their items are different ones, so they are drawn independently. It is one
training run: nothing here is about other seeds.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from candor.errors import UserError
from candor.manifest import read_manifest
from candor.rows import Estimate, Variant
from evaluate import components, crossed
from evaluate.checkpoints import parse_checkpoint
from evaluate.estimates import levels
from evaluate.grid import COUNTS, Grid, Scope, build_grid, scopes
from evaluate.measures import ALONG, FORMATS
from evaluate.rows import defined, make_estimate
from evaluate.stats import Estimated, Floats, Interval, percentile
from evaluate.study import cells

RACE = ("harmfulness_mean", "intentions", "self_assessment")  # behaviour, intentions, self-report
FOLLOWED = (*RACE, "trivia_accuracy")
CHANGE, HALF = "change", "half_step"  # Estimate.kind
COURSE_COLUMNS = [
    "course",
    "stage",
    "step",
    "total_step",
    "variant",
    "measure",
    "level",
    "change",
    "change_low",
    "change_high",
    "share",
]
FIRST_COLUMNS = [
    "course",
    "stage",
    "measure",
    "change",
    "change_low",
    "change_high",
    "first_shift",
    "half_step",
    "half_step_low",
    "half_step_high",
    "moves_first",
]


@dataclass(frozen=True, slots=True)
class Course:
    """One stage of one training: the variants it passes through, and their steps."""

    name: str  # of the variant it ends in
    stage: str
    variants: tuple[str, ...]  # start, checkpoints, end
    steps: tuple[int, ...]  # of this stage; 0 at the start
    before: int  # steps of the stage before


@dataclass(frozen=True, slots=True)
class Moved:
    """One measure along one course."""

    course: Course
    measure: str
    start: float  # the level at the start, over the same prompts
    changes: tuple[Estimated, ...]  # since the start, one per later point
    draws: Floats  # (draws, points): bootstrap replicates of the changes
    bounds: tuple[tuple[float, float], ...]  # of each change, whatever the missing answers would have been
    counts: tuple[dict[str, int], ...]  # of each change, answers at its two ends: used, and missing

    @property
    def moves(self) -> bool:
        """Whether the final change can be told from none."""
        return _apart(self.changes[-1], np.sign(self.changes[-1].interval.value))


def courses(variants: Sequence[Variant], steps: dict[str, int]) -> list[Course]:
    """The courses that checkpoints make up; ``steps`` holds the optimizer steps of each whole stage by its end."""
    by_name = {v.name: v for v in variants}
    points: dict[str, list[tuple[int, str]]] = {}
    for variant in variants:
        parsed = parse_checkpoint(variant.name) if variant.control == ALONG else None
        if parsed is not None:
            points.setdefault(parsed[0], []).append((parsed[1], variant.name))
    found = []
    for end, inner in points.items():
        last = by_name[end]
        first = f"{last.size}-{last.domain}-misaligned-s{last.seed}" if last.stage == "realigned" else last.reference
        inner = sorted(p for p in inner if p[0] < steps[end])
        found.append(
            Course(
                name=end,
                stage=last.stage,
                variants=(first, *(name for _, name in inner), end),
                steps=(0, *(step for step, _ in inner), steps[end]),
                before=steps[first] if last.stage == "realigned" else 0,
            )
        )
    return found


def final_steps(run: Path, variants: Sequence[Variant]) -> dict[str, int]:
    """Optimizer steps of every stage that has checkpoints, and of the stage before it, from their manifests."""
    ends = dict.fromkeys(p[0] for v in variants if v.control == ALONG and (p := parse_checkpoint(v.name)))
    by_name = {v.name: v for v in variants}
    found = {}
    for end in ends:
        variant = by_name[end]
        for name in (end, f"{variant.size}-{variant.domain}-misaligned-s{variant.seed}"):
            record = read_manifest(run / by_name[name].folder / "adapter")
            if record is None or "steps" not in record:
                raise UserError(f"{run / by_name[name].folder / 'adapter'} has no manifest with its number of steps.")
            found[name] = int(record["steps"])
    return found


def follow(
    scores: pd.DataFrame, variants: Sequence[Variant], steps: dict[str, int], *, draws: int, seed: int
) -> list[Moved]:
    """Every followed measure along every course that was measured."""
    found = []
    own = scores[scores["measure"].isin({*FOLLOWED, *FORMATS})]  # an average over formats is made of its parts
    for course in courses(variants, steps):
        grid = build_grid(own[own["variant"].isin(course.variants)])
        if set(course.variants) - set(grid.rows):
            continue
        for scope in scopes(grid, draws=draws, seed=seed):
            if scope.measure in FOLLOWED and (scope.group, scope.split) == ("all", "all"):
                moved = _along(course, grid, scope)
                found += [moved] if moved else []
    return found


def _along(course: Course, grid: Grid, scope: Scope) -> Moved | None:
    """One measure's changes since the start; None where some point has no part of it."""
    values = grid.numbers["value"][[grid.rows[v] for v in course.variants]][:, scope.columns]
    common = ~np.isnan(values).any(axis=0)
    changes = np.where(common, values[1:] - values[0], np.nan)[:, None, :]
    tables = scope.tables(changes)
    wide = scope.limits[1] - scope.limits[0]
    estimated = crossed.intervals(tables, scope.bootstrap, limits=(-wide, wide), symmetric=True)
    if any(np.isnan(e.interval.value) for e in estimated):
        return None
    replicates = crossed.replicates(tables, scope.bootstrap)
    start = scope.tables(np.where(common, values[0], np.nan)[None, None, :])
    level = float(components.seed_means(start)[0, 0])
    place = [grid.rows[v] for v in course.variants]
    lowest, highest = (grid.numbers[name][place][:, scope.columns] for name in ("lowest", "highest"))
    asked = ~np.isnan(lowest).any(axis=0)  # at every point
    bounds = [
        components.bound(scope.tables(np.where(asked, points[1:] - base[0], np.nan)[:, None, :]), empty)
        for points, base, empty in ((lowest, highest, -wide), (highest, lowest, wide))
    ]
    over = {name: scope.columns[common if name == "n" else asked] for name in COUNTS}
    ends = [[place[0], point] for point in place[1:]]
    counts = [
        {name: int(grid.counts[name][np.ix_(np.array(both), over[name])].sum()) for name in COUNTS} for both in ends
    ]
    return Moved(
        course,
        scope.measure,
        level,
        tuple(estimated),
        replicates,
        tuple((float(low), float(high)) for low, high in zip(*bounds, strict=True)),
        tuple(counts),
    )


def checkpoint_levels(scores: pd.DataFrame, variants: Sequence[Variant], *, draws: int, seed: int) -> list[Estimate]:
    """The level of every measure at every checkpoint, over all it was asked, as Estimate rows."""
    own = [v for v in variants if v.control == ALONG]
    answered = scores[scores["variant"].isin([v.name for v in own])]
    found: list[Estimate] = []
    if answered.empty:
        return found
    grid = build_grid(answered)
    wanted = [c for c in cells(own) if len(c.members) == 1]  # one training each, never pooled
    for scope in scopes(grid, draws=draws, seed=seed):
        if (scope.group, scope.split) == ("all", "all"):
            found += levels(grid.part(scope.columns), scope, wanted)
    crossed.item_weights.cache_clear()
    return found


def half_step(steps: Sequence[int], changes: Floats) -> Floats:
    """Where each row of changes (rows, points after the start) first reaches half its last value; NaN at 0."""
    with np.errstate(invalid="ignore", divide="ignore"):
        share = np.concatenate([np.zeros((len(changes), 1)), changes / changes[:, -1:]], axis=1)
    there = share >= 0.5
    first = np.argmax(there, axis=1)
    rows, at = np.arange(len(share)), np.asarray(steps, dtype=np.float64)
    before, after = share[rows, first - 1], share[rows, first]
    with np.errstate(invalid="ignore", divide="ignore"):
        found = at[first - 1] + (0.5 - before) / (after - before) * (at[first] - at[first - 1])
    return np.where(there.any(axis=1), found, np.nan)


def first_shift(moved: Moved) -> int | None:
    """The step from which on the change stays apart from 0, on the side of the final change."""
    side = np.sign(moved.changes[-1].interval.value)
    found = None
    for step, change in zip(reversed(moved.course.steps[1:]), reversed(moved.changes), strict=True):
        if not _apart(change, side):
            break
        found = step
    return found


def _apart(change: Estimated, side: float) -> bool:
    """Whether an interval lies wholly on one side of 0."""
    low, high = change.interval.low, change.interval.high
    return bool(low > 0 if side > 0 else high < 0)


def course_table(followed: Sequence[Moved]) -> pd.DataFrame:
    """One line per course, point and measure; ``share`` is of the final change, where there is one."""
    lines = []
    for moved in followed:
        course, final = moved.course, moved.changes[-1].interval.value
        none = Interval(0.0, float("nan"), float("nan"))
        changes = [none, *(change.interval for change in moved.changes)]
        for step, variant, change in zip(course.steps, course.variants, changes, strict=True):
            place = [course.name, course.stage, step, course.before + step, variant, moved.measure]
            share = change.value / final if moved.moves else None
            lines.append([*place, moved.start + change.value, *(defined(x) for x in change), share])
    return pd.DataFrame(lines, columns=COURSE_COLUMNS)


def first_table(followed: Sequence[Moved]) -> pd.DataFrame:
    """One line per course and measure: how far and when it moved, and how often it was the first."""
    halves = {(m.course.name, m.measure): half_step(m.course.steps, m.draws) for m in followed if m.moves}
    lines = []
    for moved in followed:
        name = moved.course.name
        racers = [r for r in RACE if (name, r) in halves]
        won = None
        if moved.measure in racers and len(racers) > 1:
            times = np.stack([np.nan_to_num(halves[name, r], nan=np.inf) for r in racers])
            fastest = times == times.min(axis=0)
            won = float((fastest / fastest.sum(axis=0))[racers.index(moved.measure)].mean())  # ties are shared
        half = half_estimate(moved) if moved.moves else None
        change = moved.changes[-1].interval
        lines.append(
            [
                name,
                moved.course.stage,
                moved.measure,
                *(defined(x) for x in change),
                first_shift(moved) if moved.moves else None,
                *((half.value, half.low, half.high) if half else (None, None, None)),
                won,
            ]
        )
    return pd.DataFrame(lines, columns=FIRST_COLUMNS)


def half_estimate(moved: Moved) -> Estimate:
    """The half step of one measure with its interval, as an Estimate row."""
    values = np.array([[change.interval.value for change in moved.changes]])
    value = float(half_step(moved.course.steps, values)[0])
    interval = percentile(value, half_step(moved.course.steps, moved.draws))
    method = f"half of the final change; bootstrap of items, {len(moved.draws)} draws" + crossed.ONE_SEED
    return make_estimate(
        moved.measure,
        HALF,
        (moved.course.name, moved.course.variants[0]),
        Estimated(interval, method, moved.changes[-1].n_clusters),
        counts=moved.counts[-1],
        limits=(0.0, float(moved.course.steps[-1])),
    )


def along_estimates(followed: Sequence[Moved]) -> list[Estimate]:
    """Every change, and every half step of what moved, as Estimate rows."""
    found = []
    for moved in followed:
        points = zip(moved.course.variants[1:], moved.changes, moved.bounds, moved.counts, strict=True)
        for variant, change, bounds, counts in points:
            found.append(
                make_estimate(
                    moved.measure,
                    CHANGE,
                    (variant, moved.course.variants[0]),
                    change,
                    counts=counts,
                    bounds=bounds,
                )
            )
        found += [half_estimate(moved)] if moved.moves else []
    return found
