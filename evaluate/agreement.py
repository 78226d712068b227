"""How well a judge agrees with known grades: quadratic kappa and the confusion table.

The replies (golden/golden.parquet, Graded rows) have a grade by construction; the judge never
trained on them. Replies the judge could not grade are counted as missing, not as disagreement.
"""

from pathlib import Path

import numpy as np

from candor.errors import UserError
from candor.rows import Estimate, Graded, Verdict
from candor.tables import read_table
from evaluate.stats import confusion, generator, percentile, quadratic_kappa, resampling_weights

GRADES = 5
KAPPA = "judge_quadratic_kappa"
CONFUSION = "judge_confusion"


def golden_files(run: Path, judge: str) -> tuple[Path, Path]:
    """The known grades and the judge's verdicts on them."""
    return run / "golden" / "golden.parquet", run / "golden" / judge / "verdicts.parquet"


def agreement(run: Path, judge: str, *, draws: int, seed: int) -> list[Estimate]:
    """Kappa with an interval that resamples prompts, and one row per cell of the confusion table.

    Empty when the run has no replies of known grade.
    """
    golden, verdicts = golden_files(run, judge)
    if not golden.exists():
        return []
    if not verdicts.exists():
        raise UserError(f"{verdicts} does not exist. Run the judge stage (python -m evaluate.judge) on {golden} first.")
    known = read_table(golden, Graded).select(["sample_id", "prompt", "grade"]).to_pandas()
    said = read_table(verdicts, Verdict).select(["sample_id", "score"]).to_pandas()
    both = known.merge(said, on="sample_id", how="left", validate="one_to_one").dropna(subset=["score"])
    n, n_missing = len(both), len(known) - len(both)
    if n == 0:
        raise UserError(f"{verdicts} grades none of the {len(known)} replies of {golden}. Rerun the judge stage.")
    for column in ("grade", "score"):
        if not both[column].between(1, GRADES).all():
            found_value = both[~both[column].between(1, GRADES)].iloc[0]
            raise UserError(
                f"{found_value['sample_id']}: {column} {found_value[column]:g} in {golden.parent} is not on the scale "
                f"1-{GRADES}. Choose a judge and replies with that scale."
            )
    truth = both["grade"].to_numpy(dtype=np.int64)
    judged = both["score"].to_numpy(dtype=np.int64)
    prompts, clusters = np.unique(both["prompt"].to_numpy(dtype=str), return_inverse=True)
    per_cluster = np.zeros((len(prompts), GRADES * GRADES))
    np.add.at(per_cluster, (clusters, (truth - 1) * GRADES + judged - 1), 1)
    weights = resampling_weights(np.zeros(len(prompts), dtype=np.int64), draws, generator(seed, "golden", judge))
    replicates = quadratic_kappa((weights @ per_cluster).reshape(draws, GRADES, GRADES))
    counts = confusion(truth, judged, GRADES)
    found = percentile(float(quadratic_kappa(counts)), replicates)

    def row(measure: str, group: str, value: float, low: float | None, high: float | None, count: int) -> Estimate:
        method = (
            f"bootstrap over prompts, {draws} draws" if measure == KAPPA else "share of this true grade; n = replies"
        )
        return Estimate(
            measure=measure,
            kind="agreement",
            variant=judge,
            reference="known grade",
            group=group,
            split="all",
            value=None if np.isnan(value) else value,
            low=None if low is None or np.isnan(low) else low,
            high=None if high is None or np.isnan(high) else high,
            n=count,
            n_missing=n_missing if measure == KAPPA else 0,
            n_clusters=len(prompts),
            method=method,
        )

    rows = [row(KAPPA, "all", found.value, found.low, found.high, n)]
    for i in range(GRADES):
        for j in range(GRADES):
            total = int(counts[i].sum())
            share = counts[i, j] / total if total else float("nan")
            rows.append(row(CONFUSION, f"{i + 1} judged {j + 1}", float(share), None, None, int(counts[i, j])))
    return rows
