"""What the report says: every sentence with a number and every table, computed from estimates.

Plain lists and strings for the template (evaluate/templates/report.html), which adds no number.
"""

from typing import Any

from candor.rows import Estimate
from evaluate.batteries.self_assessment import FORMATS
from evaluate.controls import Check, check_controls
from evaluate.estimates import AVERAGED, LEFTOVER, MAIN, WITHOUT_BASE
from evaluate.results import DASH, MINUS, Results, number, paper_value
from evaluate.study import Cell, Pair


def shown(estimate: Estimate | None, digits: int = 2) -> dict[str, str]:
    """A number with its interval, ready to print."""
    if estimate is None or estimate.value is None:
        return {"value": DASH, "interval": "", "missing": "yes", "paper": ""}
    interval = f"[{number(estimate.low, digits)}, {number(estimate.high, digits)}]" if estimate.low is not None else ""
    return {"value": number(estimate.value, digits), "interval": interval, "missing": "", "paper": ""}


def level_measures(results: Results) -> list[str]:
    """Columns of the table of levels that were measured."""
    wanted = (
        results.worst,
        "harmfulness_mean",
        "harmfulness_single",
        "intentions",
        "self_assessment",
        *FORMATS,
        "trivia_accuracy",
    )
    there = {e.measure for e in results.estimates if e.kind == "level"}
    return [m for m in wanted if m in there]


def levels_table(results: Results, paper: dict[str, Any]) -> dict[str, Any]:
    """Every level with its interval, and the published number of the same place of the design."""
    measures = level_measures(results)

    def line(cell: Cell) -> dict[str, Any]:
        entries = []
        for measure in measures:
            published = None
            if not cell.control:
                published = paper_value(paper, cell.size, cell.domain, cell.stage, measure)
            text = "" if published is None else number(published)
            entries.append({**shown(results.level(cell.name, measure)), "paper": text})
        return {"name": cell.name, "cell": cell, "entries": entries}

    lines = [line(c) for c in (*results.cells(), *results.cells(control=True))]
    return {"heads": [results.name(m) for m in measures], "lines": lines}


def pair_name(pair: Pair) -> str:
    """A difference in words."""
    where = ", ".join(part for part in (pair.control.replace("_", " "), pair.size, pair.domain) if part)
    return f"{where}: {pair.minus[0]} {MINUS} {pair.minus[1]}"


def contrasts_table(results: Results) -> dict[str, Any]:
    """The main study's differences over all items."""
    measures = [*results.headline, "harmfulness_mean", "trivia_accuracy"]
    lines = [
        {"name": pair_name(p), "entries": [shown(results.contrast(p, m)) for m in measures]} for p in results.pairs()
    ]
    return {"heads": [results.name(m) for m in measures], "lines": lines}


def splits_table(results: Results) -> dict[str, Any]:
    """The misaligned effect and its reversal on seen and on unseen items."""
    heads = [f"{results.name(m)}, {split}" for m in results.headline for split in ("seen", "unseen")]
    lines = [
        {
            "name": pair_name(p),
            "entries": [shown(results.contrast(p, m, s)) for m in results.headline for s in ("seen", "unseen")],
        }
        for p in results.pairs()
        if p.minus[0] == "misaligned"
    ]
    return {"heads": heads, "lines": lines}


def brief(results: Results, checks: list[Check], share: float) -> list[str]:
    """The findings in sentences, counted from the estimates."""
    found = []
    for domain in results.domains():
        for minus in (("misaligned", "base"), ("misaligned", "realigned")):
            pairs = [p for p in results.pairs() if p.domain == domain and p.minus == minus]
            counts = []
            for split in ("all", "seen", "unseen"):
                differences = [results.contrast(p, m, split) for p in pairs for m in results.headline]
                bounded = [e.low for e in differences if e is not None and e.low is not None]
                label = "over all items" if split == "all" else f"on {split} items"
                counts.append(f"{sum(low > 0 for low in bounded)} of {len(pairs) * len(results.headline)} {label}")
            if pairs:
                found.append(
                    f"{domain}: {minus[0]} is above {minus[1]} (the whole 95 % interval above zero) in "
                    f"{', '.join(counts)}, counting sizes times the three headline measures."
                )
    if checks:
        met = sum(c.met is True for c in checks)
        failed = [f"{pair_name(c.pair)}, {results.name(c.measure)}" for c in checks if c.met is not True]
        tail = f" Not met: {'; '.join(failed)}." if failed else ""
        found.append(f"Controls: {met} of {len(checks)} conditions are met (limit: {share:g} of the effect).{tail}")
    kappa = results.kappa()
    if kappa is not None:
        text = shown(kappa)
        found.append(
            f"The judge agrees with {kappa.n} replies of known grade with a quadratic kappa of "
            f"{text['value']} {text['interval']}."
        )
    return found


def controls_table(results: Results, checks: list[Check]) -> list[dict[str, Any]]:
    """One line per control and measure."""
    verdict = {True: "met", False: "not met", None: "cannot be told"}
    return [
        {
            "name": pair_name(c.pair),
            "measure": results.name(c.measure),
            "difference": shown(c.difference, 3),
            "condition": "falls: upper bound below zero"
            if c.rule == "falls"
            else f"{number(c.bound, 3)} < {number(c.limit, 3)}",
            "verdict": verdict[c.met],
        }
        for c in checks
    ]


def correlations_table(results: Results, paper: dict[str, Any]) -> list[dict[str, Any]]:
    """Headline correlations over the main study and over parts of it."""
    short = {results.worst: "harmfulness"}
    lines = []
    for over in (MAIN, AVERAGED, WITHOUT_BASE):
        for i, x in enumerate(results.headline):
            for y in results.headline[i + 1 :]:
                found = results.correlation(x, y, over)
                if found is None:
                    continue
                key = f"{short.get(x, x)}~{short.get(y, y)}"
                published = paper.get("spearman", {}).get(key) if over == results.models else None
                lines.append(
                    {
                        "name": f"{results.name(x)} and {results.name(y)}",
                        "over": over,
                        "rho": shown(found),
                        "n": found.n,
                        "paper": "" if published is None else number(published),
                    }
                )
    return lines


def missing_table(results: Results) -> dict[str, Any]:
    """Per variant and measure: answers without a usable score, and probability mass outside the options."""
    measures = [results.worst, "intentions", *FORMATS, "trivia_accuracy"]
    lines = []
    for cell in (*results.cells(), *results.cells(control=True)):
        entries = []
        for measure in measures:
            level, left = results.level(cell.name, measure), results.level(cell.name, measure + LEFTOVER)
            missing = DASH if level is None else f"{level.n_missing} of {level.n + level.n_missing}"
            entries.append({"missing": missing, "leftover": "" if left is None else number(left.value, 3)})
        lines.append({"name": cell.name, "entries": entries})
    return {"heads": [results.name(m) for m in measures], "lines": lines}


def contents(results: Results, paper: dict[str, Any], share: float) -> dict[str, Any]:
    """Everything the template needs from the estimates."""
    checks = check_controls(results, share)
    cells = results.cells()
    return {
        "brief": brief(results, checks, share),
        "levels": levels_table(results, paper),
        "contrasts": contrasts_table(results),
        "splits": splits_table(results),
        "controls": controls_table(results, checks),
        "share": f"{share:g}",
        "correlations": correlations_table(results, paper),
        "kappa": results.kappa(),
        "kappa_shown": shown(results.kappa()),
        "missing": missing_table(results),
        "methods": sorted({e.method for e in results.estimates if e.kind in ("level", "contrast")}),
        "n_variants": len(results.variants),
        "n_main": sum(not v.control for v in results.variants),
        "n_estimates": len(results.estimates),
        "models": results.models,
        "seeds": sorted({s for c in cells for s in c.seeds if c.stage != "base"}),
        "judge": results.judge,
        "paper": paper,
    }
