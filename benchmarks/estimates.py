"""How long a study's estimates take and how much memory, and that the cost is linear in rows.

    python -m benchmarks.estimates [output=FILE.csv] [draws=10000]

Made-up scores of the shape of the real study: 15 variants (or one of several seeds), 320 prompts of
harmfulness with the worst of every k up to 10, 150 scenarios in two orders, the four formats in six
dimensions, exact and sampled, the same for another AI and for moral foundations, and trivia. Then
the same study with every item twice and four times. Each row runs in a process of its own, so that
its peak memory is its own.
"""

import csv
import dataclasses
import json
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd

from candor.config import apply_override, build
from candor.errors import run_script
from candor.manifest import commit
from candor.rows import Score, Variant
from evaluate.estimates import all_estimates
from evaluate.stats import generator

WORST = [f"harmfulness_worst_of_{k}" for k in range(1, 11)]
HEADLINE = (WORST[-1], "intentions", "self_assessment")
DIMENSIONS = ("aligned", "good", "harmless", "helpful", "honest", "trusted")
FORMATS = {"decision": (10, 2), "numerical": (10, 2), "likert": (25, 2), "language": (10, 4)}  # items, forms
OTHERS = ("other_", "average_", "moral_")  # what else the formats are asked about


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What the command line may say."""

    output: Path = Path("benchmarks/results/estimates.csv")
    draws: int = 10_000
    times: int = 0  # for a single run in this process: every item so many times
    seeds: int = 1


def prompts(times: int) -> Iterator[tuple[str, str, str, str, str]]:
    """(measure, prompt_id, cluster, group, form) of every score of one variant."""
    for i in range(320 * times):
        for measure in (*WORST, "harmfulness_mean", "harmfulness_single", "harmfulness_expected"):
            yield measure, f"harm-{i}", f"harm-{i}", f"category-{i % 8}", ""
    for dimension in DIMENSIONS:
        for suffix in ("", "_sampled"):
            for i in range(25 * times):
                for form in ("ab", "ba"):
                    item = f"intent-{dimension}-{i}"
                    yield "intentions" + suffix, f"{item}/{form}", item, dimension, form
        for prefix in ("", *OTHERS):
            for name, (items, forms) in FORMATS.items():
                for suffix in ("", "_sampled") if not prefix else ("",):
                    for i in range(items * times):
                        for form in range(forms):
                            item, measure = f"{name}-{i}", prefix + name + suffix
                            yield measure, f"{measure}/{dimension}/{item}/{form}", item, dimension, str(form)
    for i in range(200 * times):
        yield "trivia_accuracy", f"trivia-{i}", f"trivia-{i}", f"topic-{i % 20}", ""


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


def scores(names: list[str], times: int) -> pd.DataFrame:
    """Made-up scores, a few of them missing."""
    columns = list(zip(*prompts(times), strict=True))
    one = pd.DataFrame(dict(zip(("measure", "prompt_id", "cluster", "group", "form"), columns, strict=True)))
    one["split"] = np.where(np.arange(len(one)) % 5 == 4, "unseen", "seen")
    rng, parts = generator(1, "benchmark", str(times)), []
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
    frame = scores([v.name for v in study], options.times)
    started, cpu = time.perf_counter(), time.process_time()
    found, tests = all_estimates(
        frame, study, draws=options.draws, seed=1, headline=HEADLINE, correlated=HEADLINE, margin=0.1
    )
    return {
        "variants": len(study),
        "times": options.times,
        "draws": options.draws,
        "rows": len(frame),
        "estimates": len(found),
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
    rows = []
    for times, seeds in ((1, 1), (2, 1), (4, 1), (1, 3)):
        command = [sys.executable, "-m", "benchmarks.estimates", f"times={times}", f"seeds={seeds}"]
        done = subprocess.run([*command, f"draws={options.draws}"], capture_output=True, text=True, check=True)
        row = json.loads(done.stdout.splitlines()[-1])
        rows.append(row | {"device": device, "commit": commit()})
        print(row, flush=True)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    with options.output.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    run_script(main)
