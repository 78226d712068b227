"""Everything that compares parts of a study beyond levels and differences: the tables beside the estimates.

effects.csv (how a question is put), leave_one_format_out.csv, modes.csv (exact beside paper),
along_training.csv and moves_first.csv. Each number is an Estimate row too.
"""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from candor.rows import Estimate, Prompt, Variant
from evaluate.along import along_estimates, checkpoint_levels, course_table, final_steps, first_table, follow
from evaluate.effects import EFFECT, LEAVE_OUT, effects
from evaluate.grid import build_grid
from evaluate.measures import ALONG, composites
from evaluate.modes_compared import mode_differences, modes_table

_NUMBERS = ["value", "low", "high", "n", "n_missing", "n_clusters", "method"]


def comparisons(
    run: Path,
    scores: pd.DataFrame,
    prompts: Sequence[Prompt],
    variants: Sequence[Variant],
    estimates: Sequence[Estimate],
    *,
    draws: int,
    seed: int,
) -> tuple[list[Estimate], dict[str, pd.DataFrame]]:
    """Further estimates, and the tables by name; tables without a line are left out."""
    grid = build_grid(scores[~scores["variant"].isin({v.name for v in variants if v.control == ALONG})])
    sides = effects(grid, prompts, variants, draws=draws, seed=seed)
    modes = mode_differences(grid, variants, draws=draws, seed=seed)
    followed = follow(scores, variants, final_steps(run, variants), draws=draws, seed=seed)
    tables = {
        "effects": _long([e for e in sides if e.kind == EFFECT], "effect"),
        "leave_one_format_out": _leave_out(sides, estimates),
        "modes": modes_table([*estimates, *modes]),
        "along_training": course_table(followed),
        "moves_first": first_table(followed),
    }
    levels = checkpoint_levels(scores, variants, draws=draws, seed=seed)
    found = [*sides, *modes, *levels, *along_estimates(followed)]
    return found, {name: table for name, table in tables.items() if len(table)}


def _long(estimates: Sequence[Estimate], what: str) -> pd.DataFrame:
    """One line per estimate; ``what`` is the head of the column that says what is compared."""
    lines = [[e.variant, e.measure, e.reference, *(getattr(e, name) for name in _NUMBERS)] for e in estimates]
    return pd.DataFrame(lines, columns=["variant", "measure", what, *_NUMBERS])


def _leave_out(sides: Sequence[Estimate], estimates: Sequence[Estimate]) -> pd.DataFrame:
    """Averages over formats: all four, and without each."""
    averages = composites({e.measure for e in estimates})
    level = [
        e for e in estimates if e.kind == "level" and e.measure in averages and (e.group, e.split) == ("all", "all")
    ]
    rest = [e for e in sides if e.kind == LEAVE_OUT]
    there = {(e.variant, e.measure) for e in rest}
    found = _long([*(e for e in level if (e.variant, e.measure) in there), *rest], "formats")
    found["formats"] = found["formats"].replace("", "all")
    return found.sort_values(["variant", "measure"], kind="stable")
