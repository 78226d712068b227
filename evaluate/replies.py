"""The replies that report.html carries: a choice of those that were judged, packed small.

A study has tens of thousands of replies; a page that people mail around has room for some
thousands. Of every variant and category the worst are taken first, then an even choice of the
others, so that both ends of every filter have something to show. How many were left out is said
on the page; nothing is left out of the run's own tables.
"""

import base64
import gzip
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from candor.rows import Prompt, Sample, Variant, Verdict
from candor.tables import read_table
from evaluate.batteries.answers import answer_files

LONGEST = 600  # characters of a reply that are shown
LONGEST_JUDGE = 200  # characters of the judge's own words
NO_VERDICT = "no verdict"
COLUMNS = ("variant", "prompt", "draw", "score", "status", "text", "judge")  # of a packed row


@dataclass(frozen=True, slots=True)
class Packed:
    """Replies ready for the page."""

    data: str  # base64 of gzip of JSON: variants, categories, statuses, prompts, judges and rows
    n_shown: int
    n_replies: int
    longest: int = LONGEST


def cut(text: str, longest: int = LONGEST) -> str:
    """The text, or its beginning with a note of how much is left out."""
    return text if len(text) <= longest else f"{text[:longest]} [... {len(text) - longest} more characters]"


def judged_replies(run: Path, variant: Variant, prompts: dict[str, Prompt], judge: str) -> pd.DataFrame | None:
    """A variant's replies to the prompts of batteries that the judge graded; None when there are none.

    Columns: prompt_id, draw, text, score (NaN without one), status, judge (its words), category.
    """
    files = answer_files(run, variant, judge)
    if not files["samples"].exists() or not files["verdicts"].exists():
        return None
    samples = read_table(files["samples"], Sample).select(["sample_id", "prompt_id", "draw", "text"]).to_pandas()
    verdicts = read_table(files["verdicts"], Verdict).select(["sample_id", "score", "status", "reply"]).to_pandas()
    both = samples.merge(verdicts.rename(columns={"reply": "judge"}), on="sample_id", how="left")
    both["battery"] = both["prompt_id"].map({k: p.battery for k, p in prompts.items()})
    graded = both.loc[both["status"].notna(), "battery"].unique()
    both = both[both["battery"].isin(graded)]
    if both.empty:
        return None
    both["category"] = both["prompt_id"].map({k: p.group for k, p in prompts.items()})
    both["status"] = both["status"].fillna(NO_VERDICT)
    both["judge"] = both["judge"].fillna("")
    both["variant"] = variant.name
    return both.sort_values(["prompt_id", "draw"], kind="stable")


def choose(replies: pd.DataFrame, quota: int) -> pd.DataFrame:
    """Up to ``quota`` replies of each category: half the worst, half evenly from the rest, worst first."""
    chosen = []
    for _, part in replies.groupby(["battery", "category"], sort=False):
        ordered = part.sort_values("score", ascending=False, kind="stable", na_position="last")
        if len(ordered) > quota:
            worst = (quota + 1) // 2
            rest = np.linspace(worst, len(ordered) - 1, quota - worst).round().astype(np.int64)
            ordered = ordered.iloc[[*range(worst), *rest]]
        chosen.append(ordered)
    return pd.concat(chosen)


def _indices(values: Sequence[Any]) -> dict[Any, int]:
    return {value: i for i, value in enumerate(dict.fromkeys(values))}


def pack(chosen: pd.DataFrame, prompts: dict[str, Prompt]) -> str:
    """The replies as one string: repeated words are stored once, then compressed."""
    several = chosen["battery"].nunique() > 1
    labels = (chosen["battery"] + ": " if several else "") + chosen["category"]
    judged = chosen["judge"].map(lambda words: cut(words, LONGEST_JUDGE))
    variants, statuses, judges = _indices(chosen["variant"]), _indices(chosen["status"]), _indices(judged)
    categories, asked = _indices(labels), _indices(chosen["prompt_id"])
    category_of = dict(zip(chosen["prompt_id"], labels, strict=True))
    rows = [
        [variants[v], asked[p], int(d), None if np.isnan(s) else s, statuses[t], cut(text), judges[j]]
        for v, p, d, s, t, text, j in zip(
            chosen["variant"],
            chosen["prompt_id"],
            chosen["draw"],
            chosen["score"],
            chosen["status"],
            chosen["text"],
            judged,
            strict=True,
        )
    ]
    record = {
        "columns": COLUMNS,
        "variants": list(variants),
        "categories": list(categories),
        "statuses": list(statuses),
        "judges": list(judges),
        "prompts": [[categories[category_of[p]], prompts[p].text] for p in asked],
        "rows": rows,
    }
    text = json.dumps(record, ensure_ascii=False, separators=(",", ":")).encode()
    return base64.b64encode(gzip.compress(text, mtime=0)).decode("ascii")


def replies(
    run: Path, variants: Sequence[Variant], prompts: Sequence[Prompt], judge: str, *, most: int, most_bytes: int
) -> Packed | None:
    """At most ``most`` replies in at most ``most_bytes`` bytes of page; None when none were judged."""
    by_id = {p.prompt_id: p for p in prompts}
    found = [r for v in variants if (r := judged_replies(run, v, by_id, judge)) is not None]
    if not found or most < 1:
        return None
    groups = sum(r.groupby(["battery", "category"]).ngroups for r in found)
    quota = max(1, most // groups)
    while True:
        chosen = pd.concat([choose(r, quota) for r in found])
        data = pack(chosen, by_id)
        if len(data) <= most_bytes or quota == 1:
            return Packed(data, len(chosen), sum(len(r) for r in found))
        quota //= 2
