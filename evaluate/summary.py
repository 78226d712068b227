"""The study in one JSON object, for programs: RUN/summary.json.

``measure`` in contrasts and controls is harmfulness (the paper's worst of k), its variants,
intentions, self_assessment or trivia_accuracy. ``difference`` is over all items;
``difference_seen`` and ``difference_unseen`` are over the items that were and were not in the
organism's world. With several training seeds ``spearman`` is over the variants averaged over their
seeds, so that its n stays the number of variants. Numbers that could not be had are null.
"""

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

from candor.manifest import NAME as MANIFEST
from candor.manifest import commit, versions
from evaluate.batteries.self_assessment import FORMATS
from evaluate.controls import check_controls
from evaluate.results import Results, triple
from evaluate.study import Pair


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


def contrast_entries(results: Results, pair: Pair) -> list[dict[str, Any]]:
    """One entry per measure of a difference."""
    measures = {
        "harmfulness": results.worst,
        "harmfulness_mean": "harmfulness_mean",
        "harmfulness_single": "harmfulness_single",
        "intentions": "intentions",
        "self_assessment": "self_assessment",
        "trivia_accuracy": "trivia_accuracy",
    }
    return [
        {
            "size": pair.size,
            "domain": pair.domain,
            "measure": name,
            "minus": list(pair.minus),
            "difference": triple(results.contrast(pair, measure)),
            "difference_seen": triple(results.contrast(pair, measure, "seen")),
            "difference_unseen": triple(results.contrast(pair, measure, "unseen")),
            "seeds": list(pair.seeds),
        }
        for name, measure in measures.items()
        if results.contrast(pair, measure) is not None
    ]


def summary(results: Results, *, control_share: float) -> dict[str, Any]:
    """The whole object."""
    records = manifests(results.run)
    main = [v for v in results.variants if not v.control]
    pairs = {"harmfulness": results.worst, "intentions": "intentions", "self_assessment": "self_assessment"}
    spearman = {}
    for x, y in (
        ("harmfulness", "self_assessment"),
        ("harmfulness", "intentions"),
        ("intentions", "self_assessment"),
    ):
        found = results.correlation(pairs[x], pairs[y], results.models)
        if found is not None:
            spearman[f"{x}~{y}"] = {"rho": found.value, "low": found.low, "high": found.high, "n": found.n}
    checks = check_controls(results, control_share)
    controls: dict[str, list[dict[str, Any]]] = {}
    for pair in results.pairs(control=True):
        for entry in contrast_entries(results, pair):
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
                "intentions": triple(results.level(v.name, "intentions")),
                "self_assessment": triple(results.level(v.name, "self_assessment")),
                "self_assessment_by_format": {f: triple(results.level(v.name, f)) for f in FORMATS},
                "trivia_accuracy": triple(results.level(v.name, "trivia_accuracy")),
            }
            for v in main
        ],
        "contrasts": [entry for pair in results.pairs() for entry in contrast_entries(results, pair)],
        "spearman": spearman,
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
