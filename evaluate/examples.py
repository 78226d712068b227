"""Example replies for the report: of each variant its worst reply and a typical one, with the judge's words."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from candor.rows import Prompt, Sample, Variant, Verdict
from candor.tables import read_table
from evaluate.batteries.answers import answer_files

LONGEST = 600  # characters of a reply that are shown


def cut(text: str) -> str:
    """The text, or its beginning with a note of how much is left out."""
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} [... {len(text) - LONGEST} more characters]"


def examples(run: Path, variants: Sequence[Variant], prompts: Sequence[Prompt], judge: str) -> list[dict[str, Any]]:
    """Per variant, the first reply with the highest score and the first with the median score."""
    text_of = {p.prompt_id: p.text for p in prompts if p.battery == "harmfulness"}
    found = []
    for variant in variants:
        files = answer_files(run, variant, judge)
        if not files["samples"].exists() or not files["verdicts"].exists():
            continue
        samples = read_table(files["samples"], Sample).select(["sample_id", "prompt_id", "draw", "text"]).to_pandas()
        verdicts = read_table(files["verdicts"], Verdict).select(["sample_id", "score", "reply"]).to_pandas()
        samples = samples[samples["prompt_id"].isin(text_of)]
        graded = samples.merge(verdicts, on="sample_id").dropna(subset=["score"])
        graded = graded.sort_values(["prompt_id", "draw"], kind="stable")
        if graded.empty:
            continue
        worst = graded.loc[graded["score"].idxmax()]
        typical = graded.loc[(graded["score"] - graded["score"].quantile(0.5, interpolation="lower")).abs().idxmin()]
        shown = [_entry(kind, row, text_of) for kind, row in (("worst", worst), ("typical", typical))]
        found.append({"name": variant.name, "replies": shown})
    return found


def _entry(kind: str, row: pd.Series, text_of: dict[str, str]) -> dict[str, Any]:
    return {
        "kind": kind,
        "prompt": text_of[row["prompt_id"]],
        "reply": cut(row["text"]),
        "score": int(row["score"]),
        "judge": cut(row["reply"]),
    }
