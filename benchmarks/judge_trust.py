"""How far a shipped judge can be trusted: what evaluate.calibrate finds, as rows of a CSV.

    python -m benchmarks.judge_trust JUDGE.yaml [key=value ...]      # keys: evaluate.calibrate's, and out=FILE

Rows are appended to benchmarks/results/judge_trust.csv with machine and commit: hit rate, agreement with
the golden set, flips, what the order of options changes, how far each attack sways the judge, and the
noise of asking again. Answers are asked for afresh, in a folder that is deleted afterwards.
"""

import csv
import os
import platform
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from candor.config import apply_override, build
from candor.manifest import commit
from evaluate.calibrate import CalibrateConfig, as_text, calibrate

TABLE = Path("benchmarks/results/judge_trust.csv")
FIELDS = ("measure", "group", "value", "low", "high", "n")


def main(argv: list[str]) -> None:
    """Calibrate one judge and append the rows."""
    values: dict[str, Any] = {}
    for word in argv[1:]:
        apply_override(values, word)
    out = Path(values.pop("out", TABLE))
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        config = build(CalibrateConfig, {**values, "output_dir": folder}, where="command line")
        report = calibrate(Path(argv[0]), config)
        seconds = time.perf_counter() - started
    sys.stdout.write(as_text(report) + "\n")
    about = {
        "benchmark": "judge_trust",
        "judge": report["judge"],
        "golden": report["golden"],
        "device": f"{platform.machine()} {os.cpu_count()} cores",
        "load": round(os.getloadavg()[0], 1),
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
    }
    lines = [{**about, **dict(zip(FIELDS, row, strict=True))} for row in (*rows_of(report), _row("seconds", seconds))]
    out.parent.mkdir(parents=True, exist_ok=True)
    new = not out.exists()
    with out.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(lines[0]))
        if new:
            writer.writeheader()
        writer.writerows(lines)


def rows_of(report: dict[str, Any]) -> list[tuple[Any, ...]]:
    """A report as rows (measure, group, value, low, high, n)."""
    rows = [_share("hit_rate", "all", report["hit_rate"])]
    kinds = report["hit_rate_by_kind"].items()
    rows += [_share("hit_rate", kind, share) for kind, share in kinds if kind != "all"]
    rows += [_row(name, *found) for name, found in report["against_the_middle"].items()]
    rows += [_share("flips_at", threshold, share) for threshold, share in report["flips_at"].items()]
    if "position" in report:
        rows.append(_share("other_choice_when_reversed", "all", report["position"]["other_choice"]))
    for name, sway in report.get("sway", {}).get("attacks", {}).items():
        rows += [(key, name, _rounded(sway[key]), None, None, sway["n"]) for key in ("mean_sway", "largest_sway")]
        rows += [(f"attacks_{key}", name, sway[key], None, None, sway["n"]) for key in ("crossed", "no_score")]
    again = report.get("repeats", {})
    rows += [
        (f"repeat_{key}", f"{again['rounds']} rounds", _rounded(value), None, None, again["replies"])
        for key, value in again.items()
        if key not in ("rounds", "replies")
    ]
    return rows


def _row(measure: str, value: float, low: float | None = None, high: float | None = None) -> tuple[Any, ...]:
    return measure, "all", _rounded(value), _rounded(low), _rounded(high), None


def _share(measure: str, group: str, share: list[Any]) -> tuple[Any, ...]:
    return measure, group, *(_rounded(value) for value in share[:3]), share[3]


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


if __name__ == "__main__":
    main(sys.argv[1:])
