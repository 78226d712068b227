"""Exact and paper mode side by side: what each says of the same battery, and their difference.

Two differences are made, exact minus paper. ``as designed`` compares the two numbers as they are:
the paper's counts never turn the 0-10 scale round, and weigh forms as it printed them, so part of it
is the design. ``same prompts`` compares the prompts both modes asked, and there only sampling error and
the paper's scoring rules are left.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pandas as pd

from candor.rows import Estimate, Variant
from evaluate.effects import shown_cells
from evaluate.grid import LEFTOVER, Grid
from evaluate.linear import Contrast, cell_codes, columns_of, estimate
from evaluate.measures import PAPER, by_group, composites

KIND = "mode"
AS_DESIGNED, SAME_PROMPTS = "paper, as designed", "paper, same prompts"
COLUMNS = [
    "variant",
    "measure",
    "exact",
    "exact_low",
    "exact_high",
    "paper",
    "paper_low",
    "paper_high",
    "difference",
    "difference_low",
    "difference_high",
    "same_prompts",
    "same_prompts_low",
    "same_prompts_high",
    "exact_leftover",
    "paper_defaulted",
    "paper_n",
    "paper_excluded",
]


def mode_differences(grid: Grid, variants: Sequence[Variant], *, draws: int, seed: int) -> list[Estimate]:
    """Exact minus paper for every measure that both modes made, as Estimate rows of kind "mode"."""
    return estimate(list(_contrasts(grid)), grid, shown_cells(variants), draws=draws, seed=seed)


def _contrasts(grid: Grid) -> Iterator[Contrast]:
    """Both differences of every single measure and every average over formats."""
    there = list(dict.fromkeys(grid.columns["measure"]))
    parts = {m: (m,) for m in there} | composites(there)
    for measure, of in parts.items():
        twins = tuple(m + PAPER for m in of)
        if measure.endswith(PAPER) or not set(twins) <= set(there):
            continue
        exact, paper = columns_of(grid, of), columns_of(grid, twins)
        yield _contrast(measure, AS_DESIGNED, exact, paper)
        keys = [frame["measure"].str.removesuffix(PAPER) + "/" + frame["prompt_id"] for frame in (exact, paper)]
        same = [frame[own.isin(other)] for frame, own, other in zip((exact, paper), keys, keys[::-1], strict=True)]
        if len(same[0]):
            yield _contrast(measure, SAME_PROMPTS, *same)


def _contrast(measure: str, name: str, exact: pd.DataFrame, paper: pd.DataFrame) -> Contrast:
    """The mean over the exact cells minus the mean over the paper's."""
    both = pd.concat([exact, paper])
    groups = both["group"].tolist() if by_group(measure) else ["all"] * len(both)
    sides = ["exact"] * len(exact) + ["paper"] * len(paper)
    codes, labels = cell_codes(sides, [m.removesuffix(PAPER) for m in both["measure"]], groups)
    n = {side: sum(label[0] == side for label in labels) for side in ("exact", "paper")}
    weights = np.array([1 / n["exact"] if side == "exact" else -1 / n["paper"] for side, _, _ in labels])
    return Contrast(KIND, measure, name, both.index.to_numpy(dtype=np.int64), codes, weights)


def modes_table(estimates: Sequence[Estimate]) -> pd.DataFrame:
    """One line per variant and measure: both modes, their differences, and what each could not read."""
    level = {(e.variant, e.measure): e for e in estimates if e.kind == "level" and (e.group, e.split) == ("all", "all")}
    difference = {(e.variant, e.measure, e.reference): e for e in estimates if e.kind == KIND}
    lines = []
    for variant, measure in dict.fromkeys((v, m) for v, m, _ in difference):
        paper = level.get((variant, measure + PAPER))
        found = {
            "exact": level.get((variant, measure)),
            "paper": paper,
            "difference": difference.get((variant, measure, AS_DESIGNED)),
            "same_prompts": difference.get((variant, measure, SAME_PROMPTS)),
        }
        line: dict[str, Any] = {"variant": variant, "measure": measure}
        for name, e in found.items():
            line |= {name: e and e.value, f"{name}_low": e and e.low, f"{name}_high": e and e.high}
        for name, key in (("exact_leftover", measure), ("paper_defaulted", measure + PAPER)):
            e = level.get((variant, key + LEFTOVER))
            line[name] = e and e.value
        lines.append(line | {"paper_n": paper and paper.n, "paper_excluded": paper and paper.n_missing})
    return pd.DataFrame(lines, columns=COLUMNS)
