"""What one variant answered, read by columns, and what scoring it yields.

The batteries take ``Answers`` and return ``Scored``; they never see a path.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from candor.errors import UserError
from candor.rows import Distribution, Prompt, Sample, Score, Variant, Verdict
from candor.tables import read_table

SAMPLE_COLUMNS = ["sample_id", "prompt_id", "variant", "draw", "temperature", "text"]
DISTRIBUTION_COLUMNS = ["prompt_id", "variant", "labels", "probabilities", "leftover"]
VERDICT_COLUMNS = ["sample_id", "status", "score", "expected"]


@dataclass(frozen=True, slots=True)
class Answers:
    """Everything one variant answered, with what the judge said about it."""

    variant: str
    samples: pd.DataFrame  # SAMPLE_COLUMNS, sorted by prompt and draw
    distributions: dict[str, dict[str, Any]]  # prompt_id -> the other DISTRIBUTION_COLUMNS
    verdicts: pd.DataFrame  # VERDICT_COLUMNS; empty when nothing was judged

    def sampled(self, prompts: Iterable[Prompt]) -> dict[str, list[tuple[int, str, str]]]:
        """(draw, sample_id, text) of every reply to these prompts, in order of draws."""
        wanted = {p.prompt_id for p in prompts}
        part = self.samples[self.samples["prompt_id"].isin(wanted)]
        found: dict[str, list[tuple[int, str, str]]] = {}
        for prompt_id, draw, sample_id, text in zip(
            part["prompt_id"], part["draw"], part["sample_id"], part["text"], strict=True
        ):
            found.setdefault(prompt_id, []).append((int(draw), sample_id, text))
        return found


@dataclass(slots=True)
class Scored:
    """Scores of some prompts, and an account of every answer: n_in = used + left out by reason."""

    scores: list[Score] = field(default_factory=list)
    n_in: int = 0
    left_out: Counter[str] = field(default_factory=Counter)

    def add(self, other: "Scored") -> None:
        """Take over another's scores and counts."""
        self.scores += other.scores
        self.n_in += other.n_in
        self.left_out += other.left_out


def score_row(
    measure: str, variant: str, prompt: Prompt, value: float | None, *, n: int, n_missing: int, leftover: float | None
) -> Score:
    """A Score of one prompt."""
    return Score(
        measure=measure,
        variant=variant,
        prompt_id=prompt.prompt_id,
        cluster=prompt.cluster,
        group=prompt.group,
        form=prompt.form,
        split=prompt.split,
        value=value,
        n=n,
        n_missing=n_missing,
        leftover=leftover,
    )


def answer_files(run: Path, variant: Variant, judge: str) -> dict[str, Path]:
    """Where a variant's tables lie, by kind, whether or not they are there."""
    folder = run / variant.folder
    return {
        "samples": folder / "answers" / "samples.parquet",
        "distributions": folder / "answers" / "distributions.parquet",
        "verdicts": folder / "verdicts" / judge / "verdicts.parquet",
    }


def read_answers(
    run: Path, variant: Variant, prompts: Sequence[Prompt], judge: str, temperature: float | None
) -> Answers:
    """Read what a variant answered; UserError naming the stage to rerun when a needed table is absent.

    ``temperature`` picks among replies where a format was sampled at several; None takes them all.
    """
    files = answer_files(run, variant, judge)
    if not files["samples"].exists() and not files["distributions"].exists():
        raise UserError(
            f"{files['samples'].parent} holds neither samples.parquet nor distributions.parquet. "
            f"Run the answers stage (python -m serve.sample) of {variant.name} first."
        )
    known = {p.prompt_id: p for p in prompts}
    samples = _frame(files["samples"], Sample, SAMPLE_COLUMNS, variant, known)
    if temperature is not None:
        samples = samples[samples["temperature"] == temperature]
    samples = samples.sort_values(["prompt_id", "draw"], kind="stable")
    twice = samples.duplicated(["prompt_id", "draw"])
    if twice.any():
        example = samples[twice].iloc[0]
        raise UserError(
            f"{files['samples']}: draw {example['draw']} of {example['prompt_id']} is there twice. If it was sampled "
            "at several temperatures, name the one to score (temperature=1.0); else rerun the answers stage."
        )
    distributions = _frame(files["distributions"], Distribution, DISTRIBUTION_COLUMNS, variant, known)
    for record in distributions.itertuples():
        asked = [option.label for option in known[record.prompt_id].options]
        if list(record.labels) != asked:
            raise UserError(
                f"{files['distributions']}: {record.prompt_id} was answered over {list(record.labels)}, "
                f"but prompts.parquet asks for {asked}. Rerun the answers stage with these prompts."
            )
    judged = any(known[p].battery == "harmfulness" for p in samples["prompt_id"].unique())
    if judged and not files["verdicts"].exists():
        raise UserError(
            f"{files['verdicts']} does not exist. Run the judge stage (python -m evaluate.judge) with judge {judge!r} "
            f"for {variant.name} first."
        )
    verdicts = pd.DataFrame(columns=VERDICT_COLUMNS)
    if files["verdicts"].exists():
        verdicts = read_table(files["verdicts"], Verdict).select(VERDICT_COLUMNS).to_pandas()
    return Answers(
        variant=variant.name,
        samples=samples,
        distributions={r["prompt_id"]: r for r in distributions.to_dict("records")},
        verdicts=verdicts,
    )


def _frame(path: Path, row_type: type, columns: list[str], variant: Variant, known: dict[str, Prompt]) -> pd.DataFrame:
    """Some columns of a table of answers, checked to be this variant's and to these prompts."""
    if not path.exists():
        return pd.DataFrame(columns=columns)
    frame: pd.DataFrame = read_table(path, row_type).select(columns).to_pandas()
    others = sorted(set(frame["variant"]) - {variant.name})
    if others:
        raise UserError(f"{path} holds answers of {others[0]!r}, not of {variant.name!r}. Rerun its answers stage.")
    unknown = sorted(set(frame["prompt_id"]) - set(known))
    if unknown:
        raise UserError(
            f"{path} answers {unknown[0]!r}, which prompts.parquet does not hold. "
            "Rerun the answers stage with these prompts."
        )
    return frame
