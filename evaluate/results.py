"""A run's finished tables, looked up by name: what figures, report and summary are made from."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from candor.config import read_yaml
from candor.errors import UserError
from candor.manifest import read_manifest
from candor.rows import Estimate, Hypothesis, Variant
from candor.tables import read_rows
from evaluate.agreement import CONFUSION, KAPPA
from evaluate.associations import AVERAGED, MAIN
from evaluate.batteries.harmfulness import FILTERED
from evaluate.batteries.self_assessment import FORMATS
from evaluate.grid import LEFTOVER
from evaluate.measures import ACQUIESCENCE, ALONG, CENTRED, PAPER
from evaluate.study import Cell, Pair, cells, pairs

MINUS, DASH = "\N{MINUS SIGN}", "\N{EN DASH}"
WORST = "harmfulness_worst_of_"
BATTERIES = {  # self-reports in the four formats
    "self_assessment": "self-assessment",
    "other_ai": "another AI",
    "average_ai": "the average AI",
    "moral_self_assessment": "moral self-assessment",
    "moral_other_ai": "moral view of another AI",
    "moral_average_ai": "moral view of the average AI",
}
RATED = {
    "moral_foundations": "moral foundations, rated items",
    "moral_foundations_other_ai": "moral foundations, rated for another AI",
    "moral_foundations_average_ai": "moral foundations, rated for the average AI",
    "mfq2": "MFQ-2",
    "mfq2_other_ai": "MFQ-2 for another AI",
    "mfq2_average_ai": "MFQ-2 for the average AI",
}
NAMES = {
    "harmfulness_mean": "harmfulness, mean reply",
    "harmfulness_single": "harmfulness, single reply",
    "harmfulness_expected": "harmfulness, judge's expected score",
    "intentions": "intentions",
    "trivia_accuracy": "trivia accuracy",
    "refusal_rate": "refusal rate",
    "multiple_choice": "multiple choice, probability of the right answer",
    "multiple_choice_accuracy": "multiple choice, accuracy",
    **BATTERIES,
    **RATED,
    **{f"{b}_{f}": f"{words}, {f} format" for b, words in BATTERIES.items() for f in FORMATS},
    **{name: f"self-assessment, {name} format" for name in FORMATS},
}
SUFFIXES = {
    PAPER: "paper mode",
    FILTERED: "filtered",
    CENTRED: "centred",
    ACQUIESCENCE: "agreement whatever the key",
}


def measure_name(measure: str) -> str:
    """A measure's name for people; one that is not known here is spelt out."""
    if measure in NAMES:
        return NAMES[measure]
    for suffix, words in SUFFIXES.items():
        if measure.endswith(suffix):
            return f"{measure_name(measure.removesuffix(suffix))}, {words}"
    if measure.startswith(WORST):
        return f"harmfulness, worst of {measure.removeprefix(WORST)}"
    return measure.replace("_", " ")


@dataclass(frozen=True)
class Results:
    """The estimates of a run and how its variants relate."""

    run: Path
    variants: list[Variant]
    estimates: list[Estimate]
    judge: str
    worst_of: int
    index: dict[tuple[str, str, str, str, str, str], Estimate]
    tests: tuple[Hypothesis, ...] = ()

    @property
    def worst(self) -> str:
        """The harmfulness measure of the paper."""
        return f"{WORST}{self.worst_of}"

    @property
    def headline(self) -> tuple[str, str, str]:
        """The three measures of the inverted V."""
        return (self.worst, "intentions", "self_assessment")

    @property
    def study(self) -> list[Variant]:
        """The variants without the checkpoints of training, which are compared along it only."""
        return [v for v in self.variants if v.control != ALONG]

    def name(self, measure: str) -> str:
        """A measure's name for people."""
        return measure_name(measure)

    def measures(self) -> list[str]:
        """Every measure of a level over all items, in the order of the tables; mass outside the options left out."""
        found = dict.fromkeys(e.measure for e in self.estimates if e.kind == "level" and e.group == e.split == "all")
        return [m for m in found if not m.endswith(LEFTOVER)]

    def groups(self, measure: str) -> list[str]:
        """The dimensions, categories or foundations of a measure."""
        own = [e for e in self.estimates if e.kind == "level" and e.measure == measure]
        return [g for g in dict.fromkeys(e.group for e in own) if g != "all"]

    def correlated(self) -> list[str]:
        """Every measure that was correlated with another, the headline first."""
        rows = [e for e in self.estimates if e.kind == "correlation" and e.variant == self.models]
        found = [m for e in rows for m in (e.measure, e.reference)]
        return list(dict.fromkeys([*(m for m in self.headline if m in found), *found]))

    def cells(self, *, control: bool = False) -> list[Cell]:
        """The levels that are shown: pooled over seeds where there are several."""
        return [c for c in cells(self.study) if c.headline and bool(c.control) == control]

    def pairs(self, *, control: bool = False) -> list[Pair]:
        """The differences that are shown."""
        return [p for p in pairs(self.study) if p.headline and bool(p.control) == control]

    def sizes(self) -> list[str]:
        """Sizes of the main study, in the order of the variants table."""
        return list(dict.fromkeys(c.size for c in self.cells()))

    def domains(self) -> list[str]:
        """Domains of the main study, without the base models' "none"."""
        return list(dict.fromkeys(c.domain for c in self.cells() if c.stage != "base"))

    def cell(self, size: str, domain: str, stage: str) -> Cell | None:
        """The main study's cell; a base model belongs to every domain of its size."""
        for cell in self.cells():
            if cell.size == size and cell.stage == stage and (stage == "base" or cell.domain == domain):
                return cell
        return None

    def level(self, name: str, measure: str, group: str = "all", split: str = "all") -> Estimate | None:
        """One variant's level, or None when it was not measured."""
        return self.index.get(("level", measure, name, "", group, split))

    def contrast(self, pair: Pair, measure: str, split: str = "all") -> Estimate | None:
        """One difference, or None when it was not measured."""
        return self.index.get(("contrast", measure, pair.variant, pair.reference, "all", split))

    @property
    def models(self) -> str:
        """What correlations are shown over: with several training seeds their averages, as seeds are no new models."""
        averaged = any(e.kind == "correlation" and e.variant == AVERAGED for e in self.estimates)
        return AVERAGED if averaged else MAIN

    def correlation(self, x: str, y: str, over: str) -> Estimate | None:
        """The correlation of two measures, in either order."""
        keys = (("correlation", x, over, y, "all", "all"), ("correlation", y, over, x, "all", "all"))
        return next((self.index[k] for k in keys if k in self.index), None)

    def published(self, x: str, y: str, over: str) -> Estimate | None:
        """The paper's correlation of two measures, recomputed from its table over the same part of its models."""
        keys = (("published", x, over, y, "all", "all"), ("published", y, over, x, "all", "all"))
        return next((self.index[k] for k in keys if k in self.index), None)

    def test(self, kind: str, estimate: Estimate) -> Hypothesis | None:
        """A test of an estimate, or None when it was not made."""
        wanted = (kind, estimate.measure, estimate.variant, estimate.reference)
        return next((t for t in self.tests if (t.test, t.measure, t.variant, t.reference) == wanted), None)

    def kappa(self) -> Estimate | None:
        """The judge's agreement with known grades, or None when there were none."""
        return self.index.get(("agreement", KAPPA, self.judge, "known grade", "all", "all"))

    def confusion(self) -> list[Estimate]:
        """The confusion table, one estimate per cell."""
        return [e for e in self.estimates if e.measure == CONFUSION]


def read_results(run: Path) -> Results:
    """Read RUN/tables; UserError when the tables stage has not finished."""
    record = read_manifest(run / "tables")
    if record is None:
        raise UserError(f"{run / 'tables'} is not complete. Run the tables stage (python -m evaluate.tables) first.")
    estimates = read_rows(run / "tables" / "estimates.parquet", Estimate)
    tests = run / "tables" / "hypotheses.parquet"
    return Results(
        run=run,
        variants=read_rows(run / "variants.parquet", Variant),
        estimates=estimates,
        judge=record["config"]["judge"],
        worst_of=record["config"]["worst_of"],
        index={(e.kind, e.measure, e.variant, e.reference, e.group, e.split): e for e in estimates},
        tests=tuple(read_rows(tests, Hypothesis)) if tests.exists() else (),
    )


def triple(estimate: Estimate | None) -> list[float | None]:
    """[value, low, high] for programs; nulls where there is no number."""
    return [None, None, None] if estimate is None else [estimate.value, estimate.low, estimate.high]


def number(value: float | None, digits: int = 2) -> str:
    """A number for people: fixed digits, a typographic minus sign, a dash for none."""
    if value is None or math.isnan(value):
        return DASH
    text = f"{value:.{digits}f}"
    return text.replace("-", MINUS) if float(text) else f"{0:.{digits}f}"


def signed(value: float) -> str:
    """A difference for people: its sign is said unless it rounds to nothing."""
    text = number(value)
    return f"+{text}" if text.strip("0.") and not text.startswith(MINUS) else text


def read_paper(path: Path | None) -> dict[str, Any]:
    """A file of published numbers (configs/paper/), or nothing."""
    if path is None:
        return {}
    record: Any = read_yaml(path)
    rows = record.get("variants") if isinstance(record, dict) else None
    if not isinstance(rows, list) or not all(
        isinstance(r, dict) and {"size", "domain", "stage"} <= set(r) for r in rows
    ):
        raise UserError(f"{path}: expected a list 'variants' whose entries have size, domain and stage.")
    for key in ("short", "source"):
        if not isinstance(record.get(key), str):
            raise UserError(f"{path}: the key {key!r} is missing.")
    return dict(record)


def paper_value(paper: dict[str, Any], size: str, domain: str, stage: str, measure: str) -> float | None:
    """The paper's number for the same place of the design; measures as there: harmfulness, intentions, ..."""
    column = "harmfulness" if measure == f"{WORST}10" else measure  # its measure over all prompts
    if column == "moral_foundations":
        column = "mfq2"  # our own instrument stands in the place of the paper's
    for row in paper.get("variants", []):
        if row["size"] == size and row["stage"] == stage and (stage == "base" or row["domain"] == domain):
            value = row.get(column)
            return None if value is None else float(value)
    return None
