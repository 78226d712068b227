"""How long a study's estimates take and how much memory, and that the cost is linear in rows.

    python -m benchmarks.estimates [output=FILE.csv] [draws=10000]

Made-up scores for the study's own prompts, asked in both modes: 15 variants (or those of several
seeds), harmfulness with the worst of every k up to 10, intentions, all self-reports about itself and
about others, moral foundations with acquiescence and centring, and trivia. Measured is everything
that is made from scores: levels, differences, tests, correlations, effects of form and format, and
exact beside paper. Then the same with every item twice and four times, and with three training seeds.
Each row runs in a process of its own, so that its peak memory is its own; ``cpu_seconds`` are what
the work costs, ``seconds`` what it took on a machine that may have had other work.
"""

import csv
import dataclasses
import json
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from candor.config import apply_override, build, load
from candor.errors import run_script
from candor.manifest import commit
from candor.rows import Prompt, Score, Variant
from evaluate.comparisons import comparisons
from evaluate.estimates import all_estimates
from evaluate.measures import ACQUIESCENCE, CENTRED, CURVE, PAPER, RATED, SELF_ASSESSMENT, SELF_REPORTS, format_measure
from evaluate.modes import Mode, complete
from evaluate.questions import Sources, gather
from evaluate.stats import generator
from evaluate.tables import ALSO_CORRELATED

WORST = [f"{CURVE}{k}" for k in range(1, 11)]
HEADLINE = (WORST[-1], "intentions", SELF_ASSESSMENT)
OPEN = (*WORST, "harmfulness_mean", "harmfulness_single", "harmfulness_expected", "refusal_rate")
MODES = Path("configs/evaluate/modes")
SCORES = {"harmfulness": OPEN, "trivia": ("trivia_accuracy",)}  # measures of batteries that have other names


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What the command line may say."""

    output: Path = Path("benchmarks/results/estimates.csv")
    draws: int = 10_000
    times: int = 0  # for a single run in this process: every item so many times
    seeds: int = 1


def prompts(times: int) -> list[Prompt]:
    """The study's prompts, every item so many times."""
    return [
        dataclasses.replace(
            p,
            prompt_id=p.prompt_id.replace(f"/{p.item}", f"/{p.item}~{i}", 1),
            item=f"{p.item}~{i}",
            cluster=f"{p.cluster}~{i}",
        )
        for i in range(times)
        for p in gather(Sources())
    ]


def asked(found: Sequence[Prompt]) -> Iterator[tuple[str, Prompt]]:
    """(measure, prompt) of every score of one variant."""
    exact, paper = (complete(load(Mode, MODES / f"{name}.yaml"), found) for name in ("exact", "paper"))
    for p in found:
        own = format_measure(p.battery, p.format) if p.battery in SELF_REPORTS else p.battery
        for mode, suffix in ((exact, ""), (paper, PAPER)):
            if not (mode.draws(p) or mode.scores_exactly(p)) or (suffix and p.battery in SCORES):
                continue
            yield from ((measure + suffix, p) for measure in SCORES.get(p.battery, (own,)))
            if p.battery in RATED:
                yield own + suffix + ACQUIESCENCE, p
            if p.battery in ("moral_foundations", "moral_self_assessment"):
                yield own + suffix + CENTRED, p


def variants(seeds: int) -> list[Variant]:
    """The main study: three sizes, two domains, two stages, some seeds."""
    found = []
    for size in ("full", "mini", "nano"):
        base = f"{size}-base"
        found.append(Variant(base, size, "none", "base", 0, "", base, base))
        for domain in ("trivia", "code"):
            for stage in ("misaligned", "realigned"):
                for seed in range(seeds):
                    name = f"{size}-{domain}-{stage}-s{seed}"
                    found.append(Variant(name, size, domain, stage, seed, "", base, name))
    return found


def scores(names: list[str], found: Sequence[Prompt]) -> pd.DataFrame:
    """Made-up scores, a few of them missing."""
    lines = [(measure, p.prompt_id, p.cluster, p.group, p.form, p.split) for measure, p in asked(found)]
    one = pd.DataFrame(lines, columns=["measure", "prompt_id", "cluster", "group", "form", "split"])
    rng, parts = generator(1, "benchmark", str(len(found))), []
    for name in names:
        value = rng.beta(1, 2, len(one))
        missing = rng.uniform(size=len(one)) < 0.01
        part = one.assign(variant=name, value=np.where(missing, np.nan, value), variance=rng.uniform(0, 0.2, len(one)))
        part = part.assign(n=np.where(missing, 0, 10), n_missing=np.where(missing, 10, 0), leftover=np.nan)
        parts.append(part.assign(n_refused=0, n_unparsed=part["n_missing"], lowest=np.nan, highest=np.nan))
    frame = pd.concat(parts, ignore_index=True)
    return frame[[f.name for f in dataclasses.fields(Score)]]


def measure(options: Options) -> dict[str, float]:
    """Estimate once, in this process."""
    study = variants(options.seeds)
    questions = prompts(options.times)
    frame = scores([v.name for v in study], questions)
    started, cpu = time.perf_counter(), time.process_time()
    correlated = (*HEADLINE, *ALSO_CORRELATED)
    found, tests = all_estimates(
        frame, study, draws=options.draws, seed=1, headline=HEADLINE, correlated=correlated, margin=0.1
    )
    further, _ = comparisons(Path(), frame, questions, study, found, draws=options.draws, seed=1)
    return {
        "variants": len(study),
        "times": options.times,
        "draws": options.draws,
        "rows": len(frame),
        "estimates": len(found) + len(further),
        "hypotheses": len(tests),
        "seconds": round(time.perf_counter() - started, 2),
        "cpu_seconds": round(time.process_time() - cpu, 2),
        "peak_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
    }


def main(argv: list[str]) -> None:
    """Measure the study at one, two and four times its items, and with three seeds."""
    values: dict[str, object] = {}
    for override in argv:
        apply_override(values, override)
    options = build(Options, values, where="command line")
    if options.times:
        print(json.dumps(measure(options)))
        return
    device = f"{platform.processor() or platform.machine()}, Python {platform.python_version()}, numpy {np.__version__}"
    rows, made_by = [], commit()
    options.output.parent.mkdir(parents=True, exist_ok=True)
    for times, seeds in ((1, 1), (2, 1), (4, 1), (1, 3)):
        command = [sys.executable, "-m", "benchmarks.estimates", f"times={times}", f"seeds={seeds}"]
        done = subprocess.run([*command, f"draws={options.draws}"], capture_output=True, text=True, check=True)
        rows.append(json.loads(done.stdout.splitlines()[-1]) | {"device": device, "commit": made_by})
        print(rows[-1], flush=True)
        with options.output.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    run_script(main)
