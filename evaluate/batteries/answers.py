"""What one variant answered, read by columns, and what scoring it yields.

The batteries take ``Answers`` and return ``Scored``; they never see a path.
"""

import dataclasses
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from candor.errors import UserError
from candor.rows import Distribution, Prompt, Sample, Score, Variant, Verdict
from candor.tables import read_table
from evaluate.design import DESIGN, HARMFULNESS, Design, read_design
from evaluate.measures import ALONG

SAMPLE_COLUMNS = ["sample_id", "prompt_id", "variant", "draw", "temperature", "text"]
DISTRIBUTION_COLUMNS = ["prompt_id", "variant", "labels", "probabilities", "leftover", "unexplored"]
VERDICT_COLUMNS = ["sample_id", "status", "score", "expected"]


@dataclass(frozen=True, slots=True)
class Answers:
    """Everything one variant answered, with what the judge said about it."""

    variant: str
    samples: pd.DataFrame  # SAMPLE_COLUMNS, sorted by prompt and draw
    distributions: dict[str, dict[str, Any]]  # prompt_id -> the other DISTRIBUTION_COLUMNS
    verdicts: pd.DataFrame  # VERDICT_COLUMNS of the harmfulness judge; empty when nothing was judged
    design: Design = field(default_factory=Design)
    others: dict[str, pd.DataFrame] = field(default_factory=dict)  # VERDICT_COLUMNS of every judge, by name
    closest: dict[str, float] = field(default_factory=dict)  # sample_id -> value of the option a judge found closest

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
    measure: str,
    variant: str,
    prompt: Prompt,
    value: float | None,
    *,
    n: int,
    n_missing: int,
    leftover: float | None,
    **more: Any,
) -> Score:
    """A Score of one prompt; ``more`` are the columns of Score that have a default."""
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
        **more,
    )


def variance_of(values: Sequence[float]) -> float | None:
    """The variance between answers, divisor n - 1; None with fewer than two."""
    return statistics.variance(values) if len(values) > 1 else None


def answer_files(run: Path, variant: Variant, judge: str) -> dict[str, Path]:
    """Where what scoring a variant reads lies, by kind, whether or not it is there."""
    folder = run / variant.folder
    return {
        "design": run / DESIGN,
        "samples": folder / "answers" / "samples.parquet",
        "distributions": folder / "answers" / "distributions.parquet",
        "verdicts": _verdict_file(run, variant, judge),
        **{f"verdicts of {name}": _verdict_file(run, variant, name) for name in read_design(run).judges},
    }


def _verdict_file(run: Path, variant: Variant, judge: str) -> Path:
    return run / variant.folder / "verdicts" / judge / "verdicts.parquet"


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
    design = read_design(run)
    if variant.control == ALONG and design.along is not None:
        design = dataclasses.replace(design, modes=(design.along,), filters=())
    known = {p.prompt_id: p for p in prompts}
    samples = _samples(files["samples"], variant, known, temperature)
    distributions = _frame(files["distributions"], Distribution, DISTRIBUTION_COLUMNS, variant, known)
    for record in distributions.itertuples():
        asked = [option.label for option in known[record.prompt_id].options]
        if list(record.labels) != asked:
            raise UserError(
                f"{files['distributions']}: {record.prompt_id} was answered over {list(record.labels)}, "
                f"but prompts.parquet asks for {asked}. Rerun the answers stage with these prompts."
            )
    batteries = {known[p].battery for p in samples["prompt_id"].unique()}
    needed = {judge} if HARMFULNESS in batteries else set()
    needed |= {grader.judge for battery, grader in design.graders.items() if battery in batteries}
    verdicts = {name: _verdicts(run, variant, name, name in needed) for name in dict.fromkeys((judge, *design.judges))}
    closest = (
        verdicts[design.closest].dropna(subset="score") if design.closest else pd.DataFrame(columns=VERDICT_COLUMNS)
    )
    return Answers(
        variant=variant.name,
        samples=samples,
        distributions={r["prompt_id"]: r for r in distributions.to_dict("records")},
        verdicts=verdicts[judge],
        design=design,
        others=verdicts,
        closest=dict(zip(closest["sample_id"], closest["score"].astype(float), strict=True)),
    )


def _samples(path: Path, variant: Variant, known: dict[str, Prompt], temperature: float | None) -> pd.DataFrame:
    """The replies, each draw once."""
    samples = _frame(path, Sample, SAMPLE_COLUMNS, variant, known)
    if temperature is not None:
        samples = samples[samples["temperature"] == temperature]
    samples = samples.sort_values(["prompt_id", "draw"], kind="stable")
    twice = samples.duplicated(["prompt_id", "draw"])
    if twice.any():
        example = samples[twice].iloc[0]
        raise UserError(
            f"{path}: draw {example['draw']} of {example['prompt_id']} is there twice. If it was sampled "
            "at several temperatures, name the one to score (temperature=1.0); else rerun the answers stage."
        )
    return samples


def _verdicts(run: Path, variant: Variant, judge: str, needed: bool) -> pd.DataFrame:
    """What one judge said about a variant's replies; UserError when scores need it and it is not there."""
    path = _verdict_file(run, variant, judge)
    if path.exists():
        return read_table(path, Verdict).select(VERDICT_COLUMNS).to_pandas()
    if needed:
        raise UserError(
            f"{path} does not exist. Run the judge stage (python -m evaluate.judge) with judge {judge!r} "
            f"for {variant.name} first."
        )
    return pd.DataFrame(columns=VERDICT_COLUMNS)


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
