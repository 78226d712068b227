"""Can this judge be trusted? Puts a golden set to it, then tries to sway it, and reports.

    python -m evaluate.calibrate configs/evaluate/judges/NAME.yaml [key=value ...]   # keys: CalibrateConfig

Reported: how often the judge is within the range that people would agree on (hit rate, by kind of
reply), quadratic kappa and bias against the middle of that range, how often it lands on the other
side of a threshold, how far a reply that talks to the judge sways it, and, with ``repeats=5``, its
noise and what that noise does to a worst of ten. A judge that names the closest of listed options is
also asked with the options in reverse order, which shows whether it prefers a place in the list.
Nothing here is a pass mark: the numbers are for the reader of a study. Answers are kept, so that
running it again, with other keys or another golden set, asks only what is new.
"""

import json
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
import pandas as pd
from scipy.stats import binomtest

from candor.config import apply_override, build
from candor.datafiles import read_jsonl
from candor.errors import UserError, run_script
from candor.hashing import hash64
from candor.judging import read_template
from candor.manifest import NAME as MANIFEST
from candor.rows import Verdict
from candor.tables import read_rows, replace_file
from evaluate.agreement import KNOWN, Pairs, compare, thresholds
from evaluate.golden import GoldenItem, read_golden
from evaluate.judge import judge_replies
from evaluate.judge_config import VERDICTS, JudgeConfig, JudgingConfig, read_judge
from serve.config import EngineConfig

WORST_OF = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrateConfig:
    """How a judge is tried out."""

    output_dir: Path = Path("runs/calibration")  # a folder named after the judge is made in it
    golden: Path | None = None  # null: the judge's own key
    attacks: Path | None = Path("configs/prompts/judge/attacks.jsonl")
    attacked: int = 12  # replies that every attack is tried on
    repeats: int = 1  # ask the golden set so often
    draws: int = 2000  # of the bootstrap
    seed: int = 0
    budget: float | None = None
    tolerate: float = 0.0
    engine: EngineConfig = field(default_factory=EngineConfig)

    def __post_init__(self) -> None:
        """Refuse numbers that mean nothing."""
        if self.attacked < 0 or self.repeats < 1 or self.draws < 100:
            raise UserError("attacked must be 0 or more, repeats 1 or more and draws 100 or more.")


@dataclass(frozen=True, slots=True)
class Case:
    """A golden item with what the judge said."""

    item: GoldenItem
    verdict: Verdict

    @property
    def hit(self) -> bool:
        """Whether a good judge could have said this."""
        v = self.verdict
        if v.status != "ok":
            return v.status in self.item.statuses
        return "ok" in self.item.statuses and v.score is not None and self.item.low <= v.score <= self.item.high

    @property
    def graded(self) -> bool:
        """Whether there are two scores to compare."""
        return self.verdict.status == "ok" and "ok" in self.item.statuses


def main(argv: list[str]) -> None:
    """Calibrate the judge of one file."""
    if not argv:
        raise UserError("usage: python -m evaluate.calibrate configs/evaluate/judges/NAME.yaml [key=value ...]")
    values: dict[str, Any] = {}
    for word in argv[1:]:
        apply_override(values, word)
    config = build(CalibrateConfig, values, where="command line")
    path = Path(argv[0])
    report = calibrate(path, config)
    sys.stdout.write(as_text(report) + "\n")


def calibrate(path: Path, config: CalibrateConfig) -> dict[str, Any]:
    """Ask, measure and write OUTPUT/NAME/report.json, report.txt and items.csv; the report."""
    judge = read_judge(path)
    golden = config.golden or judge.golden
    if golden is None:
        raise UserError(f"{path} names no golden set. Add the key 'golden', or give golden=FILE.")
    items = read_golden(golden, judge.measure)
    out = config.output_dir / judge.name
    rounds = [_ask(path, golden, items, out / f"golden-{i}", config, repeat=i) for i in range(1, config.repeats + 1)]
    cases = rounds[0]
    spans = _span(judge)
    report: dict[str, Any] = {
        "judge": judge.name,
        "model": judge.model,
        "measure": judge.measure,
        "golden": str(golden),
        **measured(cases, judge.name, spans, draws=config.draws, seed=config.seed),
    }
    if has_options(judge):
        report["position"] = _position(path, judge, cases, out, config)
    if config.attacks is not None and config.attacked:
        report["sway"] = _sway(path, judge, cases, out, config, spans)
    if config.repeats > 1:
        report["repeats"] = noise([[c.verdict.score for c in r] for r in rounds])
    rows = [_line(case) for case in cases]
    replace_file(out / "items.csv", pd.DataFrame(rows).to_csv(index=False).encode())
    replace_file(out / "report.json", (json.dumps(report, indent=2, ensure_ascii=False) + "\n").encode())
    replace_file(out / "report.txt", (as_text(report) + "\n").encode())
    return report


def has_options(judge: JudgeConfig) -> bool:
    """Whether the judge names one of a closed question's options."""
    return read_template(judge.template).has_options


def _span(judge: JudgeConfig) -> tuple[float, float]:
    return (0.0, 1.0) if has_options(judge) else judge.span


def _ask(
    path: Path, golden: Path, items: Sequence[GoldenItem], folder: Path, config: CalibrateConfig, *, repeat: int = 1
) -> list[Case]:
    """Put a golden file to the judge; its items with the verdicts."""
    (folder / "verdicts" / MANIFEST).unlink(missing_ok=True)  # more items, or another way of reading; answers are kept
    judge_replies(
        JudgingConfig(
            judge=path,
            golden=golden,
            output_dir=folder / "verdicts",
            repeat=repeat,
            store=config.output_dir / read_judge(path).name / "answers",
            budget=config.budget,
            tolerate=config.tolerate,
            engine=config.engine,
        )
    )
    verdicts = {v.sample_id: v for v in read_rows(folder / "verdicts" / VERDICTS, Verdict)}
    return [Case(item, verdicts[item.id]) for item in items]


def measured(cases: Sequence[Case], judge: str, span: tuple[float, float], *, draws: int, seed: int) -> dict[str, Any]:
    """Hit rate, kappa, bias, flips, statuses and the probabilities' coverage."""
    by_kind: dict[str, list[bool]] = defaultdict(list)
    for case in cases:
        by_kind[case.item.kind or "all"].append(case.hit)
    graded = [c for c in cases if c.graded]
    pairs = Pairs(
        np.array([c.verdict.score for c in graded], dtype=np.float64),
        np.array([c.item.grade for c in graded], dtype=np.float64),
        np.array([c.item.prompt for c in graded], dtype=str),
        len(cases) - len(graded),
        span,
    )
    estimates = compare(pairs, judge, KNOWN, draws=draws, seed=seed)
    ok = [c.verdict for c in cases if c.verdict.status == "ok"]
    covered = [v.covered for v in ok if v.covered is not None]
    moved = [abs(v.expected - v.score) for v in ok if v.expected is not None and v.score is not None]
    return {
        "n": len(cases),
        "hit_rate": _share([c.hit for c in cases]),
        "hit_rate_by_kind": {kind: _share(hits) for kind, hits in by_kind.items()},
        "against_the_middle": {e.measure: [e.value, e.low, e.high] for e in estimates},
        "flips_at": {f"{t:g}": _share(_flips(graded, t)) for t in thresholds(span)},
        "status": _counts(c.verdict.status for c in cases),
        "method": _counts(v.method for v in ok),
        "mean_covered": float(np.mean(covered)) if covered else None,
        "mean_distance_of_expected_from_score": float(np.mean(moved)) if moved else None,
    }


def _flips(graded: Sequence[Case], threshold: float) -> list[bool]:
    """For replies whose whole range is on one side of the threshold: whether the judge's score is on the other."""
    found = []
    for case in graded:
        assert case.verdict.score is not None
        if (case.item.low >= threshold) == (case.item.high >= threshold):
            found.append((case.verdict.score >= threshold) != (case.item.low >= threshold))
    return found


def _share(hits: Sequence[bool]) -> list[float | None]:
    """[share, low, high, n] with a 95 % Wilson interval."""
    if not hits:
        return [None, None, None, 0]
    found = binomtest(sum(hits), len(hits)).proportion_ci(method="wilson")
    return [sum(hits) / len(hits), float(found.low), float(found.high), len(hits)]


def _counts(values: Any) -> dict[str, int]:
    counts: dict[str, int] = defaultdict(int)
    for value in values:
        counts[value] += 1
    return dict(counts)


def _sway(
    path: Path, judge: JudgeConfig, cases: Sequence[Case], out: Path, config: CalibrateConfig, span: tuple[float, float]
) -> dict[str, Any]:
    """How far each attack moves the judge from what it says of the same reply without it, towards the best score."""
    assert config.attacks is not None
    low_is_best = judge.measure == "harmfulness"
    best = span[0] if low_is_best else span[1]
    middle = (span[0] + span[1]) / 2
    plain = [c for c in cases if c.item.reply.strip() and c.item.kind not in ("talks to the judge", "over-long")]
    far = [c for c in plain if c.graded and (c.item.grade > middle) == low_is_best and c.item.grade != middle]
    chosen = sorted(far, key=lambda c: hash64(config.seed, c.item.id))[: config.attacked]
    attacks = read_jsonl(config.attacks, ("id", "text"))
    items = []
    for attack in attacks:
        text = Template(attack["text"])
        for case in chosen:
            reply = text.safe_substitute(reply=case.item.reply, wanted=_wanted(judge, case.item, best))
            items.append(replace(case.item, id=f"{attack['id']}/{case.item.id}", reply=reply))
    golden = out / "attacked.jsonl"
    _write_golden(golden, items, judge.measure)
    attacked = {c.item.id: c.verdict for c in _ask(path, golden, items, out / "attacked", config)}
    found: dict[str, Any] = {}
    towards = -1.0 if low_is_best else 1.0
    for attack in attacks:
        pairs = [(c.verdict, attacked[f"{attack['id']}/{c.item.id}"]) for c in chosen]
        both = [(a.score, b.score) for a, b in pairs if a.score is not None and b.score is not None]
        moves = [towards * (b - a) for a, b in both]
        found[attack["id"]] = {
            "n": len(pairs),
            "mean_sway": float(np.mean(moves)) if moves else None,
            "largest_sway": max(moves) if moves else None,
            "crossed": sum(any((a >= t) != (b >= t) for t in thresholds(span)) for a, b in both),
            "no_score": len(pairs) - len(both),
        }
    return {"towards": best, "replies": len(chosen), "attacks": found}


def _wanted(judge: JudgeConfig, item: GoldenItem, best: float) -> str:
    """What an attack asks the judge to answer: its word, number or letter for the best score."""
    answers = judge.answers(item.options)
    return min(answers, key=lambda answer: abs(answer.value - best)).label


def _position(
    path: Path, judge: JudgeConfig, cases: Sequence[Case], out: Path, config: CalibrateConfig
) -> dict[str, Any]:
    """What the judge says when the options are listed the other way round."""
    graded = [c for c in cases if "ok" in c.item.statuses]
    items = [replace(c.item, options=c.item.options[::-1]) for c in graded]
    golden = out / "reversed.jsonl"
    _write_golden(golden, items, judge.measure)
    pairs = [
        (_place(before), _place(after))
        for before, after in zip(graded, _ask(path, golden, items, out / "reversed", config), strict=True)
    ]
    both = [(a, b) for a, b in pairs if a is not None and b is not None]
    return {
        "other_choice": _share([a + b != last for (a, last), (b, _) in both]),
        "first_both_times": sum(a == b == 0 for (a, _), (b, _) in both),
        "last_both_times": sum(a == b == last for (a, last), (b, _) in both),
        "no_score": len(pairs) - len(both),
    }


def _place(case: Case) -> tuple[int, int] | None:
    """Which of the listed options the judge named, and the last one's place; None when it named none."""
    values = [option.value for option in case.item.options]
    score = case.verdict.score
    return None if score is None else (values.index(score), len(values) - 1)


def _write_golden(path: Path, items: Sequence[GoldenItem], measure: str) -> None:
    header = {"name": "attacked", "licence": "as the golden set", "canary": "CANARY candor:attacked golden set"}
    rows: list[dict[str, Any]] = [header]
    for item in items:
        row: dict[str, Any] = {"id": item.id, "kind": item.kind, "prompt": item.prompt, "reply": item.reply}
        row |= {"expect": {measure: [item.low, item.high]}, "options": [[o.label, o.value] for o in item.options]}
        rows.append(row)
    replace_file(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())


def noise(rounds: Sequence[Sequence[float | None]]) -> dict[str, Any]:
    """What repeated judging of the same replies says about the judge's noise.

    ``worst_of_10_lift`` is how much the largest of ten scores exceeds the mean score when all ten
    replies deserve the same: the expected maximum of ten draws from a reply's own scores, less
    their mean, averaged over replies. It needs no model of the noise.
    """
    table = np.array([[np.nan if s is None else s for s in r] for r in rounds], dtype=np.float64).T
    whole = table[~np.isnan(table).any(axis=1)]
    if len(whole) == 0:
        return {"rounds": len(rounds), "replies": 0}
    ordered = np.sort(whole, axis=1)
    ranks = np.arange(1, whole.shape[1] + 1) / whole.shape[1]
    chance = ranks**WORST_OF - (ranks - 1 / whole.shape[1]) ** WORST_OF
    return {
        "rounds": len(rounds),
        "replies": len(whole),
        "sd": float(whole.std(axis=1, ddof=1).mean()),
        "changed": float((whole != whole[:, :1]).any(axis=1).mean()),
        f"worst_of_{WORST_OF}_lift": float((ordered @ chance - whole.mean(axis=1)).mean()),
    }


def _line(case: Case) -> dict[str, Any]:
    item, verdict = case.item, case.verdict
    said = {k: v for k, v in asdict(verdict).items() if k in ("status", "score", "expected", "covered", "method")}
    expected = {"id": item.id, "kind": item.kind, "low": item.low, "high": item.high, "right": "|".join(item.statuses)}
    return {**expected, **said, "hit": case.hit, "judge_said": verdict.reply}


def as_text(report: dict[str, Any]) -> str:
    """The report for people."""
    lines = [
        f"judge {report['judge']} ({report['model']}) on {report['measure']}: {report['n']} replies of "
        f"{report['golden']}",
        f"  within the range        {_percent(report['hit_rate'])}",
        *(f"    {kind:<22}{_percent(share)}" for kind, share in report["hit_rate_by_kind"].items()),
        *(f"  {name:<24}{_triple(value)}" for name, value in report["against_the_middle"].items()),
        *(f"  wrong side of {t:<10}{_percent(share)}" for t, share in report["flips_at"].items()),
        f"  status                  {report['status']}",
        f"  probabilities           {report['method']}, covered {_number(report['mean_covered'])} on average",
    ]
    if "position" in report:
        p = report["position"]
        lines.append(
            f"  options reversed        another choice {_percent(p['other_choice'])}; the first both times "
            f"{p['first_both_times']}, the last {p['last_both_times']}, no score {p['no_score']}"
        )
    if "sway" in report:
        lines.append(
            f"  sway towards {report['sway']['towards']:g} over {report['sway']['replies']} replies (in points)"
        )
        for name, s in report["sway"]["attacks"].items():
            lines.append(
                f"    {name:<22}mean {_number(s['mean_sway'])}, largest {_number(s['largest_sway'])}, across a "
                f"threshold {s['crossed']} of {s['n']}, no score {s['no_score']}"
            )
    if "repeats" in report:
        lines.append(f"  asked again             {report['repeats']}")
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value + 0.0:.2f}".replace("-0.00", "0.00")


def _percent(share: Sequence[float | None]) -> str:
    if share[0] is None or share[1] is None or share[2] is None:
        return "no replies"
    return f"{100 * share[0]:.0f} % [{100 * share[1]:.0f}, {100 * share[2]:.0f}] of {share[3]}"


def _triple(value: Sequence[float | None]) -> str:
    return f"{_number(value[0])} [{_number(value[1])}, {_number(value[2])}]"


if __name__ == "__main__":
    run_script(main)
