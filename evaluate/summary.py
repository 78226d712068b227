"""The study in one JSON object, for programs: RUN/summary.json.

``measure`` in contrasts and controls is harmfulness (the paper's worst of k), its variants,
intentions, self_assessment or trivia_accuracy. ``difference`` is over all items;
``difference_seen`` and ``difference_unseen`` are over the items that were and were not in the
organism's world. With several training seeds ``spearman`` is over the variants averaged over their
seeds, so that its n stays the number of variants. Numbers that could not be had are null.

``bounds`` are what a number would be if every missing answer had been as low, or as high, as can
be. ``p_holm`` is corrected for the family of tests (evaluate/hypotheses.py says which).
"""

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from candor.manifest import NAME as MANIFEST
from candor.manifest import commit, versions
from candor.rows import Estimate, Hypothesis
from candor.tables import read_rows
from evaluate.associations import GIVEN_STAGE, WITHOUT_BASE, WITHOUT_FAMILY
from evaluate.batteries.self_assessment import FORMATS
from evaluate.controls import check_controls
from evaluate.hypotheses import ALL_HEADLINE
from evaluate.results import WORST, Results, triple
from evaluate.study import Pair, domain_pairs


def manifests(run: Path) -> list[dict[str, Any]]:
    """Every finished stage's manifest in the run folder."""
    found = []
    for path in sorted(run.rglob(MANIFEST)):
        record = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(record, dict) and "stage" in record and "seconds" in record:
            found.append(record)
    return found


def seconds_by_stage(records: list[dict[str, Any]]) -> dict[str, float]:
    """Seconds of each kind of stage, summed over its runs (stages may have run at the same time)."""
    total: dict[str, float] = defaultdict(float)
    for record in records:
        total[record["stage"]] += record["seconds"]
    return {stage: round(seconds, 3) for stage, seconds in sorted(total.items())}


def versions_of(records: list[dict[str, Any]]) -> dict[str, str]:
    """Library versions that the stages ran with; where machines differed, each version."""
    found: dict[str, list[str]] = {}
    for record in (*records, {"versions": versions()}):
        for name, version in record.get("versions", {}).items():
            if version not in found.setdefault(name, []):
                found[name].append(version)
    return {name: " / ".join(each) for name, each in found.items()}


class Tests:
    """The tests of a run, looked up by kind and by what they are about."""

    def __init__(self, run: Path) -> None:
        """Read RUN/tables/hypotheses.parquet."""
        rows = read_rows(run / "tables" / "hypotheses.parquet", Hypothesis)
        self.index = {(t.test, t.measure, t.variant, t.reference): t for t in rows}

    def p_values(self, test: str, measure: str, variant: str, reference: str) -> dict[str, Any] | None:
        """p, p_holm and the size of the family; None where there is no such test."""
        found = self.index.get((test, measure, variant, reference))
        return None if found is None else {"p": found.p_value, "p_holm": found.p_holm, "n_tests": found.n_tests}

    def fully_realigned(self, results: Results) -> list[dict[str, Any]]:
        """Each realigned model with the verdict of the equivalence tests."""
        pairs = [p for p in results.pairs() if p.minus == ("realigned", "base")]
        entries = []
        for pair in pairs:
            found = self.index.get(("equivalence", ALL_HEADLINE, pair.variant, pair.reference))
            if found is not None:
                entries.append(
                    {
                        "size": pair.size,
                        "domain": pair.domain,
                        "margin": found.margin,
                        "p": found.p_value,
                        "p_holm": found.p_holm,
                        "equivalent": found.significant,
                    }
                )
        return entries


def bounds(found: Estimate | None) -> list[float | None]:
    """[lowest, highest] that missing answers could have made of a number."""
    return [None, None] if found is None else [found.lowest, found.highest]


def contrast_entries(results: Results, pair: Pair, tests: Tests) -> list[dict[str, Any]]:
    """One entry per measure of a difference."""
    measures = {
        "harmfulness": results.worst,
        "harmfulness_mean": "harmfulness_mean",
        "harmfulness_single": "harmfulness_single",
        "intentions": "intentions",
        "self_assessment": "self_assessment",
        "trivia_accuracy": "trivia_accuracy",
    }
    entries = []
    for name, measure in measures.items():
        found = results.contrast(pair, measure)
        if found is None:
            continue
        entries.append(
            {
                "size": pair.size,
                "domain": pair.domain,
                "measure": name,
                "minus": list(pair.minus),
                "difference": triple(found),
                "difference_seen": triple(results.contrast(pair, measure, "seen")),
                "difference_unseen": triple(results.contrast(pair, measure, "unseen")),
                "seeds": list(pair.seeds),
                "bounds": bounds(found),
                "n_missing": found.n_missing,
                **{
                    test: tests.p_values(test, measure, pair.variant, pair.reference)
                    for test in ("t", "wilcoxon", "equivalence")
                },
            }
        )
    return entries


def spearman_parts(results: Results, x: str, y: str, tests: Tests) -> dict[str, Any]:
    """One correlation with its permutation test, and what is left of it in parts of the study."""

    def part(over: str) -> dict[str, Any] | None:
        found = results.correlation(x, y, over)
        if found is None:
            return None
        tested = tests.p_values("permutation", found.measure, over, found.reference)
        p = None if tested is None else tested["p"]
        return {"rho": found.value, "low": found.low, "high": found.high, "n": found.n, "p": p}

    return {
        "all": part(results.models),
        "without_base": part(WITHOUT_BASE),
        "given_stage": part(GIVEN_STAGE),
        "without_family": {size: part(WITHOUT_FAMILY + size) for size in results.sizes()},
    }


def summary(results: Results, *, control_share: float) -> dict[str, Any]:
    """The whole object."""
    records = manifests(results.run)
    tests = Tests(results.run)
    main = [v for v in results.variants if not v.control]
    names = {"harmfulness": results.worst, "intentions": "intentions", "self_assessment": "self_assessment"}
    spearman, parts = {}, {}
    for x, y in (
        ("harmfulness", "self_assessment"),
        ("harmfulness", "intentions"),
        ("intentions", "self_assessment"),
    ):
        found = results.correlation(names[x], names[y], results.models)
        if found is not None:
            spearman[f"{x}~{y}"] = {"rho": found.value, "low": found.low, "high": found.high, "n": found.n}
            parts[f"{x}~{y}"] = spearman_parts(results, names[x], names[y], tests)
    checks = check_controls(results, control_share)
    controls: dict[str, list[dict[str, Any]]] = {}
    for pair in results.pairs(control=True):
        for entry in contrast_entries(results, pair, tests):
            measure = results.worst if entry["measure"] == "harmfulness" else entry["measure"]
            check = next((c for c in checks if c.pair == pair and c.measure == measure), None)
            if check is not None:
                entry |= {"rule": check.rule, "bound": check.bound, "limit": check.limit, "met": check.met}
            controls.setdefault(pair.control, []).append(entry)
    kappa = results.kappa()
    return {
        "seconds": seconds_by_stage(records),
        "variants": [
            {
                "name": v.name,
                "size": v.size,
                "domain": v.domain,
                "stage": v.stage,
                "seed": v.seed,
                "harmfulness": {
                    "mean": triple(results.level(v.name, "harmfulness_mean")),
                    "single": triple(results.level(v.name, "harmfulness_single")),
                    f"worst_of_{results.worst_of}": triple(results.level(v.name, results.worst)),
                },
                "harmfulness_by_k": {
                    str(k): triple(results.level(v.name, f"{WORST}{k}")) for k in range(1, results.worst_of + 1)
                },
                "intentions": triple(results.level(v.name, "intentions")),
                "self_assessment": triple(results.level(v.name, "self_assessment")),
                "self_assessment_by_format": {f: triple(results.level(v.name, f)) for f in FORMATS},
                "trivia_accuracy": triple(results.level(v.name, "trivia_accuracy")),
            }
            for v in main
        ],
        "contrasts": [entry for pair in results.pairs() for entry in contrast_entries(results, pair, tests)],
        "domains": [
            entry
            for pair in domain_pairs(results.variants)
            if pair.headline
            for entry in contrast_entries(results, pair, tests)
        ],
        "fully_realigned": tests.fully_realigned(results),
        "spearman": spearman,
        "spearman_parts": parts,
        "judge": {
            "quadratic_kappa": None if kappa is None else kappa.value,
            "low": None if kappa is None else kappa.low,
            "high": None if kappa is None else kappa.high,
            "n": 0 if kappa is None else kappa.n,
        },
        "controls": controls,
        "versions": versions_of(records),
        "commit": commit(),
    }
