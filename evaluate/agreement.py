"""How well a judge agrees: with known grades, with other judges, with people, and with itself.

``agreement`` gives a run's Estimates of kind "agreement"; ``variant`` is the judge and ``reference``
what it is held against:

- "known grade": replies whose grade is known by construction (golden/golden.parquet);
- another judge of the same measure and scale that judged the same replies, all or a subsample;
- "people: NAME": labels in RUN/labels/NAME.csv (columns sample_id, label) of replies that the judge grades.
  Few replies are labelled, and of the judge's rare scores more than their share (evaluate/label.py draws
  them so); therefore each score counts as often as the judge gives it to the run's different replies;
- "itself": the same judge asked again (its folders NAME~2, NAME~3, ...).

Replies that one side could not grade are counted as missing, not as disagreement. Quadratic kappa is
computed from moments (Lin 1989: with quadratic weights kappa is the concordance correlation), so
that scales of 5 and of 101 grades go the same way. Intervals resample prompts.
"""

import csv
import io
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
from numpy.typing import NDArray

from candor.datafiles import read_text
from candor.errors import UserError
from candor.manifest import read_manifest
from candor.rows import Estimate, Graded, Prompt, Sample, Verdict
from candor.tables import read_table
from evaluate.judge_config import REPEAT
from evaluate.stats import confusion, generator, percentile, resampling_weights

GRADES = 5
KAPPA = "judge_quadratic_kappa"
CONFUSION = "judge_confusion"
BIAS = "judge_bias"  # judge minus reference, in points of the scale
SAME = "judge_same_grade"  # share of replies
FLIPS = "judge_flips_at_"  # + threshold: share of replies on one side for the judge and on the other for the reference
REPEAT_SD, REPEAT_CHANGED, INFLATION = "judge_repeat_sd", "judge_repeat_changed", "judge_worst_of_k_inflation"
KNOWN, PEOPLE, ITSELF = "known grade", "people: ", "itself"

Floats = NDArray[np.float64]
AS_OFTEN = "each of the judge's scores counts as often as it gives it to the study's different replies"
_MOST_SCORES = 10  # different ones of a judge by which labels are weighted; the labelling page has as many digits


def thresholds(span: tuple[float, float]) -> tuple[float, ...]:
    """Where a score counts as high on a scale: 3, 4 and 5 of 1-5 as in the papers, 30, 50 and 70 of 0-100."""
    known = {(1.0, 5.0): (3.0, 4.0, 5.0), (0.0, 100.0): (30.0, 50.0, 70.0)}
    return known.get((float(span[0]), float(span[1])), ((span[0] + span[1]) / 2,))


@dataclass(frozen=True, slots=True)
class Pairs:
    """Scores of the same replies by two graders, with what a bootstrap resamples."""

    judge: Floats
    reference: Floats
    clusters: NDArray[np.str_]
    n_missing: int  # replies that one of the two did not grade
    span: tuple[float, float]
    shares: dict[float, float] | None = None  # what each of the judge's scores counts; None: as often as it is here


def kappa_of(sums: Floats) -> Floats:
    """Quadratic kappa from sums over replies (..., 6): count, a, b, a*a, b*b, a*b; NaN where nothing varies."""
    n, a, b, aa, bb, ab = (sums[..., i] for i in range(6))
    with np.errstate(invalid="ignore", divide="ignore"):
        apart = (aa - 2 * ab + bb) / n
        chance = aa / n + bb / n - 2 * (a / n) * (b / n)
        kappa: Floats = 1 - apart / chance
    return np.where(chance > 1e-12, kappa, np.nan)


def compare(pairs: Pairs, judge: str, reference: str, *, draws: int, seed: int) -> list[Estimate]:
    """Kappa, bias, share of equal grades and flips at thresholds, each with an interval over prompts."""
    a, b = pairs.judge, pairs.reference
    if len(a) == 0:
        return []
    names, codes = np.unique(pairs.clusters, return_inverse=True)
    columns = [np.ones_like(a), a, b, a * a, b * b, a * b, a - b, (a == b).astype(float)]
    columns += [((a >= t) != (b >= t)).astype(float) for t in thresholds(pairs.span)]
    scores, places = np.unique(a if pairs.shares else np.zeros_like(a), return_inverse=True)
    sums = np.zeros((len(names), len(scores), len(columns)))
    np.add.at(sums, (codes, places), np.stack(columns, axis=1))
    rng = generator(seed, "agreement", judge, reference)
    weights = resampling_weights(np.zeros(len(names), dtype=np.int64), draws, rng)
    totals: Floats = sums.sum(axis=0)
    replicates: Floats = (weights @ sums.reshape(len(names), -1)).reshape(draws, *totals.shape)
    method = f"bootstrap over prompts, {draws} draws"
    if pairs.shares:
        shares = np.array([pairs.shares.get(score, 0.0) for score in scores.tolist()])
        totals, replicates = _as_often(totals, shares), _as_often(replicates, shares)
        method += f"; {AS_OFTEN}"
        if shares.sum() < 1 - 1e-9:
            method += f", but {1 - shares.sum():.1%} of replies have scores of which none was labelled"
    else:
        totals, replicates = totals[0], replicates[:, 0]
    found = [(KAPPA, kappa_of(totals[:6]), kappa_of(replicates[:, :6]))]
    rest = (BIAS, SAME, *(f"{FLIPS}{t:g}" for t in thresholds(pairs.span)))
    for i, measure in enumerate(rest, start=6):
        with np.errstate(invalid="ignore", divide="ignore"):
            found.append((measure, totals[i] / totals[0], replicates[:, i] / replicates[:, 0]))
    return [
        _row(measure, judge, reference, float(value), spread, len(a), pairs.n_missing, len(names), draws, method=method)
        for measure, value, spread in found
    ]


def _as_often(sums: Floats, shares: Floats) -> Floats:
    """Means (..., k) from sums by score (..., scores, k), the first of them the count; absent scores drop out."""
    counts = sums[..., :1]
    with np.errstate(invalid="ignore", divide="ignore"):
        means = np.where(counts > 0, sums / counts, 0.0)
        there = shares[:, None] * (counts > 0)
        found: Floats = (there * means).sum(axis=-2) / there.sum(axis=-2)
    return found


def _row(
    measure: str,
    judge: str,
    reference: str,
    value: float,
    replicates: Floats | None,
    n: int,
    n_missing: int,
    n_clusters: int,
    draws: int,
    *,
    group: str = "all",
    method: str = "",
) -> Estimate:
    """One estimate; with a single prompt there is a value and no interval."""
    spread = None if replicates is None or n_clusters < 2 else percentile(value, replicates)
    low, high = (None, None) if spread is None else (spread.low, spread.high)
    return Estimate(
        measure=measure,
        kind="agreement",
        variant=judge,
        reference=reference,
        group=group,
        split="all",
        value=None if np.isnan(value) else value,
        low=None if low is None or np.isnan(low) else low,
        high=None if high is None or np.isnan(high) else high,
        n=n,
        n_missing=n_missing,
        n_clusters=n_clusters,
        method=method or f"bootstrap over prompts, {draws} draws",
    )


def golden_files(run: Path, judge: str) -> tuple[Path, ...]:
    """Everything ``agreement`` reads: known grades, the judge's verdicts on them, other judges' and people's."""
    others = [path for paths in _others(run, judge).values() for path in paths.values()]
    golden = run / "golden"
    return (golden / "golden.parquet", golden / judge / "verdicts.parquet", *others, *_labels(run))


def agreement(run: Path, judge: str, *, draws: int, seed: int) -> list[Estimate]:
    """All of a judge's agreements that the run's files allow; empty when there is nothing to compare with."""
    found = with_known_grades(run, judge, draws=draws, seed=seed)
    own = _verdict_files(run, judge)
    if not own:
        return found
    scores, span = _scores(own), _span(next(iter(own.values())).parent)
    repeats: list[pd.DataFrame] = []
    for name, paths in _others(run, judge).items():
        other = _scores(paths)
        if name.startswith(judge + REPEAT):
            repeats.append(other)
        elif span is not None:
            found += compare(_join(scores, other, span), judge, name, draws=draws, seed=seed)
    if repeats:
        found += with_itself(scores, repeats, judge, draws=draws, seed=seed)
    replies = _graded_replies(run, own) if _labels(run) else None
    for path in _labels(run):
        labels = read_labels(path).drop_duplicates("sample_id", keep="last")
        if len(labels) and not _any_reply(run, set(labels["sample_id"])):
            raise UserError(
                f"{path}: none of its {len(labels)} sample ids is a reply of {run}. Give labels of this run's replies "
                "(python -m evaluate.label makes them), or take the file away."
            )
        pairs = _join(scores, labels, span or (1.0, 5.0))
        if replies is not None:
            batteries = replies["battery"][replies["sample_id"].isin(labels["sample_id"])]
            alike = replies[replies["battery"].isin(batteries)].drop_duplicates(["prompt_id", "text"])
            given = alike["score"].value_counts(normalize=True)
            pairs = replace(pairs, shares=given.to_dict() if len(given) <= _MOST_SCORES else None)
        found += compare(pairs, judge, f"{PEOPLE}{path.stem}", draws=draws, seed=seed)
    return found


def _graded_replies(run: Path, own: dict[str, Path]) -> pd.DataFrame:
    """sample_id, battery, prompt_id, text and score of the replies that the judge scored."""
    asked = read_table(run / "prompts.parquet", Prompt).select(["prompt_id", "battery"]).to_pandas()
    replies = pd.concat(list(_read(own, "text")), ignore_index=True).dropna(subset=["score"])
    return replies.merge(asked, on="prompt_id")


def with_itself(
    scores: pd.DataFrame, repeats: list[pd.DataFrame], judge: str, *, draws: int, seed: int, k: int = 10
) -> list[Estimate]:
    """What asking the same again changes, and how much that noise lifts a worst of k.

    The lift of a prompt is the mean over repeats of the largest of its replies' scores, less the
    largest of the replies' mean scores. The means still hold some noise, so this is a lower bound.
    """
    joined = scores
    for i, other in enumerate(repeats):
        joined = joined.merge(other[["sample_id", "score"]].rename(columns={"score": f"again{i}"}), on="sample_id")
    columns = ["score", *(f"again{i}" for i in range(len(repeats)))]
    whole = joined.dropna(subset=columns)
    if whole.empty:
        return []
    values = whole[columns].to_numpy(dtype=np.float64)
    whole = whole.assign(
        sd=values.std(axis=1, ddof=1),
        changed=(values != values[:, :1]).any(axis=1).astype(float),
        mean=values.mean(axis=1),
    )
    n_missing = len(joined) - len(whole)
    prompts = whole.groupby(["variant", "cluster", "prompt_id"])
    lifted = prompts.filter(lambda g: len(g) >= k).groupby(["variant", "cluster", "prompt_id"])
    lifts = lifted[columns].max().mean(axis=1) - lifted["mean"].max()
    per_prompt = pd.concat([prompts[["sd", "changed"]].mean(), lifts.rename("lift")], axis=1).reset_index()
    found = []
    for measure, column in ((REPEAT_SD, "sd"), (REPEAT_CHANGED, "changed"), (INFLATION, "lift")):
        part = per_prompt.dropna(subset=[column])
        if part.empty:
            continue
        by_cluster = part.groupby("cluster")[column].agg(["sum", "count"]).to_numpy(dtype=np.float64)
        rng = generator(seed, "repeats", judge, measure)
        weights = resampling_weights(np.zeros(len(by_cluster), dtype=np.int64), draws, rng)
        replicates = (weights @ by_cluster[:, 0]) / (weights @ by_cluster[:, 1])
        value = float(part[column].mean())
        group = f"worst of {k}" if measure == INFLATION else "all"
        n = len(whole) if measure != INFLATION else len(part)
        found.append(_row(measure, judge, ITSELF, value, replicates, n, n_missing, len(by_cluster), draws, group=group))
    return found


def with_known_grades(run: Path, judge: str, *, draws: int, seed: int) -> list[Estimate]:
    """Against known grades, with one row per cell of the confusion table; empty when the run has none."""
    golden, verdicts = run / "golden" / "golden.parquet", run / "golden" / judge / "verdicts.parquet"
    if not golden.exists():
        return []
    if not verdicts.exists():
        raise UserError(f"{verdicts} does not exist. Run the judge stage (python -m evaluate.judge) on {golden} first.")
    known = read_table(golden, Graded).select(["sample_id", "prompt", "grade"]).to_pandas()
    said = read_table(verdicts, Verdict).select(["sample_id", "score"]).to_pandas()
    if known.empty:  # a golden set of ranges
        return []
    both = known.merge(said, on="sample_id", how="left", validate="one_to_one").dropna(subset=["score"])
    n_missing = len(known) - len(both)
    if both.empty:
        raise UserError(f"{verdicts} grades none of the {len(known)} replies of {golden}. Rerun the judge stage.")
    for column in ("grade", "score"):
        if not both[column].between(1, GRADES).all():
            found_value = both[~both[column].between(1, GRADES)].iloc[0]
            raise UserError(
                f"{found_value['sample_id']}: {column} {found_value[column]:g} in {golden.parent} is not on the scale "
                f"1-{GRADES}. Choose a judge and replies with that scale."
            )
    pairs = Pairs(
        both["score"].to_numpy(dtype=np.float64),
        both["grade"].to_numpy(dtype=np.float64),
        both["prompt"].to_numpy(dtype=str),
        n_missing,
        (1.0, float(GRADES)),
    )
    found = compare(pairs, judge, KNOWN, draws=draws, seed=seed)
    counts = confusion(pairs.reference.astype(np.int64), pairs.judge.astype(np.int64), GRADES)
    method = "share of this true grade; n = replies"
    for i in range(GRADES):
        for j in range(GRADES):
            total, n = int(counts[i].sum()), int(counts[i, j])
            share, name = n / total if total else float("nan"), f"{i + 1} judged {j + 1}"
            found.append(
                _row(CONFUSION, judge, KNOWN, share, None, n, 0, found[0].n_clusters, draws, group=name, method=method)
            )
    return found


def read_labels(path: Path) -> pd.DataFrame:
    """People's labels: a CSV with columns sample_id and label; a label that is no number is a missing score."""
    text = read_text(path, "utf-8-sig")  # spreadsheets write a mark before the first column
    rows = list(csv.DictReader(io.StringIO(text, newline="")))
    if rows and not {"sample_id", "label"} <= set(rows[0]):
        raise UserError(f"{path}: expected columns sample_id and label, found {', '.join(map(str, rows[0]))}.")
    frame = pd.DataFrame({"sample_id": [r["sample_id"] for r in rows], "label": [r["label"] for r in rows]})
    return frame.assign(score=pd.to_numeric(frame["label"], errors="coerce"))


def _join(scores: pd.DataFrame, other: pd.DataFrame, span: tuple[float, float]) -> Pairs:
    """The replies that both were asked about."""
    both = scores.merge(other[["sample_id", "score"]], on="sample_id", suffixes=("", "_other"))
    graded = both.dropna(subset=["score", "score_other"])
    return Pairs(
        graded["score"].to_numpy(dtype=np.float64),
        graded["score_other"].to_numpy(dtype=np.float64),
        graded["cluster"].to_numpy(dtype=str),
        len(both) - len(graded),
        span,
    )


def _any_reply(run: Path, ids: set[str]) -> bool:
    """Whether any of the ids is a reply of the run, whoever grades it."""
    tables = (pq.read_table(p, columns=["sample_id"]) for p in run.glob("variants/*/answers/samples.parquet"))
    return any(not ids.isdisjoint(table.column("sample_id").to_pylist()) for table in tables)


def _labels(run: Path) -> list[Path]:
    return sorted((run / "labels").glob("*.csv"))


def _verdict_files(run: Path, judge: str) -> dict[str, Path]:
    """A judge's verdict tables by variant."""
    return {p.parts[-4]: p for p in sorted(run.glob(f"variants/*/verdicts/{judge}/verdicts.parquet"))}


def _others(run: Path, judge: str) -> dict[str, dict[str, Path]]:
    """Verdict tables, by judge and variant, of other judges that grade the same thing on the same scale."""
    own = next((_subject(path.parent) for path in _verdict_files(run, judge).values()), None)
    found: dict[str, dict[str, Path]] = {}
    if own is None:
        return found
    for path in sorted(run.glob("variants/*/verdicts/*/verdicts.parquet")):
        name = path.parent.name
        if name != judge and _subject(path.parent) == own:
            found.setdefault(name, {})[path.parts[-4]] = path
    return found


def _subject(folder: Path) -> tuple[str, tuple[float, ...]] | None:
    """What is graded and on which scale, as the folder's manifest says; None when it does not."""
    record = read_manifest(folder) or {}
    return (record["measure"], tuple(record["span"])) if {"measure", "span"} <= set(record) else None


def _span(folder: Path) -> tuple[float, float] | None:
    subject = _subject(folder)
    return None if subject is None else (subject[1][0], subject[1][1])


def _scores(paths: dict[str, Path]) -> pd.DataFrame:
    """sample_id, score, variant, prompt_id and cluster (the prompt's item) of every verdict."""
    return pd.concat(list(_read(paths)), ignore_index=True)


def _read(paths: dict[str, Path], *more: str) -> Iterator[pd.DataFrame]:
    for variant, path in paths.items():
        verdicts = read_table(path, Verdict).select(["sample_id", "score"]).to_pandas()
        samples = path.parents[2] / "answers" / "samples.parquet"
        asked = read_table(samples, Sample).select(["sample_id", "prompt_id", *more]).to_pandas()
        # prompts of one item differ in the last part of their id only where a battery asks it in several forms;
        # replies are graded one prompt at a time, so the prompt is the unit here
        yield verdicts.merge(asked, on="sample_id").assign(variant=variant, cluster=lambda f: f["prompt_id"])
