"""Turn a run's answers and verdicts into scores and estimates.

    python -m evaluate.tables runs/nano/stages/tables.yaml [key=value ...]

An experiment writes that file (keys: TablesConfig; needed are run, judge and seed).

Reads variants.parquet, prompts.parquet, every variant's answers and verdicts and the replies of
known grade; writes RUN/tables/: scores.parquet (one row per variant, prompt and measure),
estimates.parquet and .csv (one row per number of the study), hypotheses.parquet and .csv (one row per
test), variants.csv (the levels, one line per variant), the tables of evaluate/comparisons.py and a
manifest that accounts for every answer. The same inputs and seed give the same bytes. Done work is
recognised and skipped.
"""

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from candor.config import load, plain
from candor.errors import UserError, run_script
from candor.hashing import sha256_file
from candor.manifest import is_done, write_manifest
from candor.rows import Estimate, Hypothesis, Prompt, Score, Variant
from candor.tables import read_rows, read_table, replace_file, write_rows
from evaluate.agreement import agreement, golden_files
from evaluate.associations import published_correlations
from evaluate.batteries.answers import answer_files
from evaluate.comparisons import comparisons
from evaluate.estimates import all_estimates
from evaluate.hypotheses import correct
from evaluate.measures import ALONG
from evaluate.results import read_paper
from evaluate.scores import score_run
from serve.attest import ATTESTATION, compare_records

STAGE = "tables"
ALSO_CORRELATED = ("trivia_accuracy", "harmfulness_mean")


@dataclass(frozen=True, kw_only=True)
class TablesConfig:
    """What the tables stage may be told."""

    run: Path  # the run folder
    judge: str  # whose verdicts are used: the folder under verdicts/ and golden/
    seed: int  # study seed; every bootstrap derives its own generator from it
    draws: int = 2000  # bootstrap draws
    worst_of: int = 10  # k of the worst-of-k harmfulness
    temperature: float | None = None  # which replies count, where a format was sampled at several temperatures
    equivalence_margin: float = 0.1  # a realigned model within this of its base, on 0-1, counts as fully realigned
    paper: Path | None = None  # published numbers (configs/paper/) whose correlations are recomputed

    def __post_init__(self) -> None:
        """Refuse what would only fail later."""
        if self.draws < 100:
            raise UserError(f"draws is {self.draws}; a 95 % interval needs at least 100.")
        if self.worst_of < 1:
            raise UserError(f"worst_of is {self.worst_of}; it must be at least 1.")
        if not 0 < self.equivalence_margin < 1:
            raise UserError(f"equivalence_margin is {self.equivalence_margin:g}; it must lie between 0 and 1.")


def worst_measure(worst_of: int) -> str:
    """The harmfulness measure that stands beside the paper's."""
    return f"harmfulness_worst_of_{worst_of}"


def input_hashes(config: TablesConfig, variants: list[Variant]) -> dict[str, str]:
    """Hash of every table that is read, by its path in the run."""
    files = [config.run / "variants.parquet", config.run / "prompts.parquet", *golden_files(config.run, config.judge)]
    for variant in variants:
        files += answer_files(config.run, variant, config.judge).values()
    return {f.relative_to(config.run).as_posix(): sha256_file(f) for f in files if f.exists()}


def refuse_alike(run: Path, variants: list[Variant]) -> None:
    """UserError when two variants whose weights differ were served alike.

    Each sampling process compares what it served itself (serve/attest.py); here all meet.
    """
    paths = [run / v.folder / "answers" / ATTESTATION for v in variants]
    records = [json.loads(path.read_text(encoding="utf-8")) for path in paths if path.is_file()]
    told = compare_records(records)
    if told:
        raise UserError(
            f"{run}: an engine did not serve the variants it named: {'; '.join(told)}. Delete the answers of these "
            "variants and sample them again."
        )


def wide(estimates: list[Estimate]) -> pd.DataFrame:
    """The levels over all items: one line per variant, value and bounds of each measure side by side."""
    kept = [e for e in estimates if e.kind == "level" and e.group == "all" and e.split == "all"]
    lines: dict[str, dict[str, Any]] = {}
    for e in kept:
        line = lines.setdefault(e.variant, {"variant": e.variant})
        line |= {e.measure: e.value, f"{e.measure}_low": e.low, f"{e.measure}_high": e.high}
    return pd.DataFrame(lines.values())


def main(argv: list[str]) -> None:
    """Score, estimate, write."""
    if not argv:
        raise UserError("usage: python -m evaluate.tables CONFIG.yaml [key=value ...]")
    config = load(TablesConfig, Path(argv[0]), argv[1:])
    started = time.perf_counter()
    variants = read_rows(config.run / "variants.parquet", Variant)
    refuse_alike(config.run, variants)
    prompts = read_rows(config.run / "prompts.parquet", Prompt)
    inputs, paper = input_hashes(config, variants), read_paper(config.paper)
    if config.paper is not None:
        inputs["paper"] = sha256_file(config.paper)
    # the run folder may be moved or named differently; what is in it is in ``inputs``
    recorded = {k: v for k, v in plain(config).items() if k not in ("run", "paper")}
    folder = config.run / "tables"
    if is_done(folder, config=recorded, inputs=inputs):
        return

    scored = score_run(
        config.run,
        variants,
        prompts,
        judge=config.judge,
        worst_of=config.worst_of,
        temperature=config.temperature,
    )
    if not scored.scores:
        raise UserError(f"{config.run} holds no answers to any of its prompts. Run the answers stages first.")
    write_rows(folder / "scores.parquet", Score, scored.scores)
    scores = read_table(folder / "scores.parquet", Score).to_pandas()
    headline = (worst_measure(config.worst_of), "intentions", "self_assessment")
    study = [v for v in variants if v.control != ALONG]  # checkpoints are compared along training, not one by one
    estimates, tests = all_estimates(
        scores,
        study,
        draws=config.draws,
        seed=config.seed,
        headline=headline,
        correlated=(*headline, *ALSO_CORRELATED),
        margin=config.equivalence_margin,
    )
    published, about = published_correlations(paper, draws=config.draws, seed=config.seed)
    further, tables = comparisons(
        config.run, scores, prompts, variants, estimates, draws=config.draws, seed=config.seed
    )
    for name, table in tables.items():
        replace_file(folder / f"{name}.csv", table.to_csv(index=False).encode())
    estimates += further
    estimates += [*published, *agreement(config.run, config.judge, draws=config.draws, seed=config.seed)]
    tests += correct(about)
    for name, row_type, rows in (("estimates", Estimate, estimates), ("hypotheses", Hypothesis, tests)):
        write_rows(folder / f"{name}.parquet", row_type, rows)
        frame = read_table(folder / f"{name}.parquet", row_type).to_pandas()
        replace_file(folder / f"{name}.csv", frame.to_csv(index=False).encode())
    replace_file(folder / "variants.csv", wide(estimates).to_csv(index=False).encode())
    left_out = dict(sorted(scored.left_out.items()))
    write_manifest(
        folder,
        stage=STAGE,
        config=recorded,
        inputs=inputs,
        counts={"in": scored.n_in, "out": scored.n_in - sum(left_out.values())},
        left_out=left_out,
        seconds=time.perf_counter() - started,
        extra={"scores": len(scored.scores), "estimates": len(estimates), "hypotheses": len(tests)},
    )


if __name__ == "__main__":
    run_script(main)
