"""What the report says: every sentence with a number and every sheet, computed from estimates.

Plain values for the template (evaluate/templates/report.html), which adds no number.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from candor.rows import Estimate
from evaluate.agreement import AS_OFTEN, CONFUSION
from evaluate.associations import MAIN
from evaluate.batteries.harmfulness import FILTERED
from evaluate.batteries.self_assessment import FORMATS
from evaluate.controls import Check, check_controls
from evaluate.design import read_design
from evaluate.grid import LEFTOVER
from evaluate.measures import ABOUT_OTHERS, ACQUIESCENCE, ALONG, CENTRED, PAPER, RATED, RATINGS, SELF_REPORTS
from evaluate.results import MINUS, SUFFIXES, WORST, Results, number, paper_value
from evaluate.sheets import Entry, Line, Sheet, p_entry, with_scope
from evaluate.study import Cell, Pair


@dataclass(frozen=True, slots=True)
class Family:
    """Measures that are shown together, one column each; a family is shown when one of ``needs`` was measured."""

    name: str
    caption: str
    measures: tuple[str, ...]
    needs: tuple[str, ...]


def families(results: Results) -> list[Family]:
    """The sheets of levels, in the order of the report; the last takes what has no place elsewhere."""
    worst, mean = results.worst, "harmfulness_mean"
    main = (
        worst,
        mean,
        "harmfulness_single",
        "harmfulness_expected",
        "intentions",
        "self_assessment",
        "trivia_accuracy",
    )
    about = ABOUT_OTHERS["self_assessment"]
    moral = (
        *(m for rating in RATINGS for m in (rating, *ABOUT_OTHERS[rating])),
        *(f"{m}{ACQUIESCENCE}" for m in RATED),
        *("moral_self_assessment", *ABOUT_OTHERS["moral_self_assessment"]),
    )
    quality = ("coherence", "on_topic", "refusal_rate")
    filtered = tuple(m for pair in ((worst, worst + FILTERED), (mean, mean + FILTERED)) for m in pair)
    capability = ("multiple_choice_accuracy", "multiple_choice")
    found = [
        Family("levels", "Levels of every variant", main, main),
        Family("formats", "Self-assessment by format", FORMATS, FORMATS),
        Family("others", "What models say of themselves and of others", ("self_assessment", *about), about),
        Family(
            "moral",
            f"Moral foundations, {MINUS}0.5 upholds them, +0.5 is against them (acquiescence: +0.5 agrees with all)",
            moral,
            moral,
        ),
        Family(
            "quality",
            "Harmfulness with and without filters, and what they filter by (coherence and topic: 1 = best)",
            (*filtered, *quality),
            quality,
        ),
        Family("capability", "Capability, 1 = all right", ("trivia_accuracy", *capability), capability),
    ]
    known = {m for family in found for m in family.measures}
    rest = tuple(m for m in results.measures() if m not in known and _stands_alone(m))
    texts = [f"{name}: {text}" for name, text in read_design(results.run).own.items()]
    return [*found, Family("more", " ".join(["Other measures.", *texts]) if texts else "Other measures", rest, rest)]


def _stands_alone(measure: str) -> bool:
    """Whether a measure is no variant or part of another: a mode, a filter, a format, one k of many."""
    parts = {f"{battery}_{name}" for battery in SELF_REPORTS for name in FORMATS}
    return not measure.endswith(tuple(SUFFIXES)) and measure not in parts and not measure.startswith(WORST)


def published(paper: dict[str, Any], cell: Cell, measure: str, group: str = "all") -> float | None:
    """The paper's number for a cell; a control has none."""
    column = measure if group == "all" else f"{measure}_{group}"
    return None if cell.control else paper_value(paper, cell.size, cell.domain, cell.stage, column)


def all_cells(results: Results) -> list[Cell]:
    """The main study's levels, then the controls'."""
    return [*results.cells(), *results.cells(control=True)]


def family_sheet(results: Results, paper: dict[str, Any], family: Family) -> Sheet:
    """Every model's levels with their intervals, and the published number of the same place of the design."""
    there = set(results.measures())
    measures = [m for m in family.measures if m in there] if there.intersection(family.needs) else []
    lines = [
        Line(c.name, tuple(Entry(results.level(c.name, m), published(paper, c, m)) for m in measures))
        for c in all_cells(results)
    ]
    heads = tuple(results.name(m) for m in measures)
    return Sheet(family.name, f"{family.caption}, with 95 % intervals", "variant", heads, tuple(lines))


def group_sheet(results: Results, paper: dict[str, Any], measure: str, what: str) -> Sheet:
    """A measure in each of its dimensions, categories or foundations."""
    groups = results.groups(measure)
    lines = [
        Line(c.name, tuple(Entry(results.level(c.name, measure, g), published(paper, c, measure, g)) for g in groups))
        for c in all_cells(results)
    ]
    caption = f"{results.name(measure).capitalize()} by {what}, with 95 % intervals"
    return Sheet(f"{measure}_by_{what}", caption, "variant", tuple(groups), tuple(lines))


def pair_name(pair: Pair) -> str:
    """A difference in words."""
    where = ", ".join(part for part in (pair.control.replace("_", " "), pair.size, pair.domain) if part)
    return f"{where}: {pair.minus[0]} {MINUS} {pair.minus[1]}"


def published_difference(paper: dict[str, Any], pair: Pair, measure: str) -> float | None:
    """The difference of the paper's two printed levels."""
    if pair.control:
        return None
    first, second = (paper_value(paper, pair.size, pair.domain, stage, measure) for stage in pair.minus)
    return None if first is None or second is None else round(first - second, 10)


def contrasts_sheet(results: Results, paper: dict[str, Any]) -> Sheet:
    """The main study's differences over all items."""
    measures = [*results.headline, "harmfulness_mean", "trivia_accuracy"]
    lines = [
        Line(
            pair_name(p),
            tuple(Entry(results.contrast(p, m), published_difference(paper, p, m)) for m in measures),
        )
        for p in results.pairs()
    ]
    caption = "Differences between stages, paired by prompt, with 95 % intervals"
    return Sheet("differences", caption, "difference", tuple(results.name(m) for m in measures), tuple(lines))


def splits_sheet(results: Results) -> Sheet:
    """The misaligned effect and its reversal on seen and on unseen items."""
    heads = tuple(f"{results.name(m)}, {split}" for m in results.headline for split in ("seen", "unseen"))
    lines = [
        Line(
            pair_name(p),
            tuple(Entry(results.contrast(p, m, s)) for m in results.headline for s in ("seen", "unseen")),
        )
        for p in results.pairs()
        if p.minus[0] == "misaligned"
    ]
    caption = "The misaligned effect and its reversal on seen and on unseen items"
    return Sheet("seen_unseen", caption, "difference", heads, tuple(lines))


def brief(results: Results, checks: list[Check], share: float) -> list[str]:
    """The findings in sentences, counted from the estimates."""
    found = []
    for domain in results.domains():
        for minus in (("misaligned", "base"), ("misaligned", "realigned")):
            pairs = [p for p in results.pairs() if p.domain == domain and p.minus == minus]
            sizes, counts = [], []
            for measure in results.headline:
                contrasts = [results.contrast(p, measure, "all") for p in pairs]
                values = [e.value for e in contrasts if e is not None and e.value is not None]
                if values:
                    ends = dict.fromkeys(f"{v:+.2f}" for v in (min(values), max(values)))
                    sizes.append(f"{results.name(measure)} {' to '.join(ends)}")
            for split in ("all", "seen", "unseen"):
                differences = [results.contrast(p, m, split) for p in pairs for m in results.headline]
                made = [e for e in differences if e is not None]
                above = sum(e.low is not None and e.low > 0 for e in made)
                label = "over all items" if split == "all" else f"on {split} items"
                if made:
                    counts.append(f"{above} of {len(made)} {label}")
            if counts:
                found.append(
                    f"{domain}, {minus[0]} {MINUS} {minus[1]}: {'; '.join(sizes)}. The whole 95 % interval lies above "
                    f"zero in {', '.join(counts)} (base models times measures)."
                )
    if checks:
        met = sum(c.met is True for c in checks)
        failed: dict[str, list[str]] = {}
        for c in checks:
            if c.met is not True:
                head = "Not met" if c.met is False else "Cannot be told"
                failed.setdefault(f"{head}: {pair_name(c.pair)}", []).append(results.name(c.measure))
        tail = "".join(f" {pair} ({', '.join(measures)})." for pair, measures in failed.items())
        found.append(f"Controls: {met} of {len(checks)} conditions are met (limit: {share:g} of the effect).{tail}")
    kappa = results.kappa()
    if kappa is not None:
        entry = Entry(kappa)
        found.append(
            f"The judge agrees with {kappa.n} replies of known grade with a quadratic kappa of "
            f"{entry.value} {entry.interval}."
        )
    return found


def controls_sheet(results: Results, checks: list[Check]) -> Sheet:
    """One line per control and measure."""
    verdict = {True: "met", False: "not met", None: "cannot be told"}
    relation = {True: "<", False: "not <", None: "and"}
    lines = [
        Line(
            pair_name(c.pair),
            (
                results.name(c.measure),
                Entry(c.difference, digits=3),
                "falls: upper bound below zero"
                if c.rule == "falls"
                else f"{number(c.bound, 3)} {relation[c.met]} {number(c.limit, 3)}",
                verdict[c.met],
            ),
        )
        for c in checks
    ]
    heads = ("measure", "difference", "bound and limit", "rule")
    caption = "Every control and measure: the difference to its base, and whether the rule is met"
    return Sheet("controls", caption, "control", heads, tuple(lines))


def correlations_sheet(results: Results, paper: dict[str, Any]) -> Sheet:
    """Headline correlations over the main study and parts of it, each with its permutation test and the paper's."""
    short = {results.worst: "harmfulness"}
    labels = dict.fromkeys(e.variant for e in results.estimates if e.kind == "correlation")
    lines = []
    for over in labels:
        for i, x in enumerate(results.headline):
            for y in results.headline[i + 1 :]:
                found = results.correlation(x, y, over)
                if found is None:
                    continue
                part = over.removeprefix(MAIN).removeprefix(", seeds averaged")
                published = results.published(short.get(x, x), short.get(y, y), f"{paper.get('short')}{part}")
                test = results.test("permutation", found)
                p = (p_entry(test.p_value), p_entry(test.p_holm)) if test else (p_entry(None),) * 2
                name = f"{results.name(x)} and {results.name(y)}"
                value = None if published is None else published.value
                lines.append(Line(name, (over, Entry(found, value), *p, str(found.n))))
    caption = "Spearman correlations with 95 % intervals, and tests that permute within model families"
    if paper:
        caption += "; the paper's are of the Harmless/Harmful dimension, recomputed from its table"
    return Sheet("correlations", caption, "measures", ("over", "correlation", "p", "p (Holm)", "models"), tuple(lines))


def agreement_sheet(results: Results) -> Sheet:
    """The judge against known grades, other judges, people and itself: one line per reference."""
    rows = [e for e in results.estimates if e.kind == "agreement" and e.measure != CONFUSION]
    references = dict.fromkeys((e.variant, e.reference) for e in rows)
    measures = list(dict.fromkeys((e.measure, e.group) for e in rows))
    found = {(e.variant, e.reference, e.measure, e.group): e for e in rows}
    lines = [
        Line(f"{judge} and {reference}", tuple(Entry(found.get((judge, reference, *m))) for m in measures))
        for judge, reference in references
    ]
    heads = tuple(m.removeprefix("judge_").replace("_", " ") + ("" if g == "all" else f", {g}") for m, g in measures)
    caption = "How well the judge agrees; bias is judge minus reference in points of the scale"
    weighted = dict.fromkeys((e.reference, e.method.partition("; ")[2]) for e in rows if AS_OFTEN in e.method)
    caption += "".join(f"; {reference}: {how}" for reference, how in weighted)
    return Sheet("agreement", caption, "judge and reference", heads, tuple(lines))


def missing_sheet(results: Results) -> Sheet:
    """Per variant and measure: answers without a usable score, and what lies outside the options."""
    built_in = (
        *(results.worst, "coherence", "on_topic", "intentions", *FORMATS, "other_ai", "average_ai", *RATED),
        *("moral_self_assessment", "moral_other_ai", "moral_average_ai", "trivia_accuracy", "multiple_choice_accuracy"),
    )
    own = next(family.measures for family in families(results) if family.name == "more")
    asked = (*built_in, *(m + PAPER for m in built_in), *own)
    measures = [m for m in asked if m in results.measures()]

    def content(cell: Cell, measure: str) -> str:
        level, left = results.level(cell.name, measure), results.level(cell.name, measure + LEFTOVER)
        if level is None:
            return ""
        missing = f"{level.n_missing} of {level.n + level.n_missing}"
        return missing if left is None or left.value is None else f"{missing}; leftover {number(left.value, 3)}"

    lines = [Line(c.name, tuple(content(c, m) for m in measures)) for c in all_cells(results)]
    caption = (
        "Missing answers, and what is left over: of exactly scored questions the probability outside the options; "
        "under the paper's rules, and in the language format, the share of replies that count as 0.5"
    )
    return Sheet("missing", caption, "variant", tuple(results.name(m) for m in measures), tuple(lines))


@dataclass(frozen=True, slots=True)
class Found:
    """A line of the long table of estimates, with what it can be filtered by."""

    what: str  # "level" or "difference"
    name: str
    size: str
    domain: str
    stage: str
    measure: str
    headline: bool
    entry: Entry

    @property
    def apart(self) -> float | None:
        """Ours minus the paper's."""
        ours = None if self.entry.estimate is None else self.entry.estimate.value
        return None if ours is None or self.entry.published is None else ours - self.entry.published


def long_table(results: Results, paper: dict[str, Any]) -> list[Found]:
    """Every level and difference over all items, each with the paper's number where it has one."""
    # one k of many is a point of a curve (the figure worst_of_k), no row of its own
    measures = [m for m in results.measures() if not m.startswith(WORST) or m.startswith(results.worst)]
    lines = []

    def add(what: str, name: str, where: Cell | Pair, stage: str, found: Estimate | None, value: float | None) -> None:
        if found is not None:
            at_headline = found.measure in results.headline and not where.control
            measure = results.name(found.measure)
            entry = Entry(found, value)
            lines.append(Found(what, name, where.size, where.domain, stage, measure, at_headline, entry))

    for cell in all_cells(results):
        for m in measures:
            add("level", cell.name, cell, cell.stage, results.level(cell.name, m), published(paper, cell, m))
    for pair in (*results.pairs(), *results.pairs(control=True)):
        stage = f" {MINUS} ".join(pair.minus)
        for m in measures:
            found = results.contrast(pair, m)
            add("difference", pair_name(pair), pair, stage, found, published_difference(paper, pair, m))
    return lines


def choices(lines: Sequence[Found], field: str) -> list[str]:
    """What a column of the long table can be filtered by."""
    return list(dict.fromkeys(getattr(line, field) for line in lines))


def moral_by_foundation() -> tuple[str, ...]:
    """Moral measures shown by foundation: as scored, and with each model's own mean over foundations taken off."""
    measures = (*RATINGS, "moral_self_assessment")
    return (*measures, *(f"{m}{CENTRED}" for m in measures))


def sheets(results: Results, paper: dict[str, Any], checks: list[Check]) -> list[Sheet]:
    """Every sheet of a study."""
    return [
        *(family_sheet(results, paper, family) for family in families(results)),
        *(group_sheet(results, paper, m, "category") for m in (results.worst, "harmfulness_mean")),
        group_sheet(results, paper, "intentions", "dimension"),
        group_sheet(results, paper, "self_assessment", "dimension"),
        *(group_sheet(results, paper, m, "foundation") for m in moral_by_foundation()),
        contrasts_sheet(results, paper),
        splits_sheet(results),
        controls_sheet(results, checks),
        correlations_sheet(results, paper),
        agreement_sheet(results),
        missing_sheet(results),
    ]


def contents(results: Results, paper: dict[str, Any], share: float) -> dict[str, Any]:
    """Everything the template needs from the estimates."""
    checks = check_controls(results, share)
    cells = results.cells()
    found = long_table(results, paper)
    return {
        "brief": brief(results, checks, share),
        "sheets": {s.name: with_scope(s) for s in sheets(results, paper, checks) if not s.empty},
        "found": found,
        "choices": {field: choices(found, field) for field in ("measure", "size", "domain", "stage")},
        "share": f"{share:g}",
        "kappa": results.kappa(),
        "kappa_entry": Entry(results.kappa()),
        "methods": sorted({e.method for e in results.estimates if e.kind in ("level", "contrast")}),
        "n_main": sum(not v.control for v in results.variants),
        "n_controls": sum(v.control not in ("", ALONG) for v in results.variants),
        "n_checkpoints": sum(v.control == ALONG for v in results.variants),
        "places": {"sizes": results.sizes(), "domains": results.domains()},
        "n_estimates": len(results.estimates),
        "models": results.models,
        "seeds": sorted({s for c in cells for s in c.seeds if c.stage != "base"}),
        "judge": results.judge,
        "paper": paper,
    }
