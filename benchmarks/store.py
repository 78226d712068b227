"""What storing replies costs: processor time and peak memory of the sample store from 3,200 to 320,000 draws.

    python -m benchmarks.store [sizes=[3200,32000,320000]] [repeats=3] [output=FILE.csv]

Made-up replies of about 240 characters take the way that ``serve.sample`` gives real ones: units are planned,
what is missing is looked up before each, rows are added as shards, the table is written from them, and all is
compacted. The study grows in two ways, by prompts (10 draws each) and by draws (of the 320 questions of the
harmfulness battery). Each run is a process of its own, so that its peak memory is its own, and has a nano model
open and attested on the torch engine, as serve.sample has while it stores; runs take turns. Rows hold medians with
the smallest and largest. Rows with a ``target`` answer whether cost is linear in the draws and memory flat: the
largest size against each smaller one in cost per draw, against the smallest in peak memory. ``rss_before_mb`` is
what the process held before anything was stored, so that the store's own growth can be told from the engine.
Seconds are the processor's; what the disk takes stands beside them as wall seconds.

``through_store`` is what benchmarks/throughput.py times with real replies.
"""

import json
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from candor.config import apply_override, build
from candor.errors import UserError, run_script
from candor.questions import load_harmfulness
from candor.rows import Prompt
from serve.config import Ask, EngineConfig, SampleConfig
from serve.engine import Reply, Request
from serve.plan import Identity, Unit, engine_identity, plan_units, row_ids
from serve.sample import kind_of, requests_of, sample_rows, write_answers
from serve.store import EXACT, SAMPLED, open_store

QUESTIONS = Path("configs/prompts/harmfulness.jsonl")
NANO = Path("train/organism/weights/nano")
GROWN = ("prompts", "draws")
DRAWS = 10  # per prompt, where prompts grow
LINEAR, FLAT = 1.1, 1.1  # at most: cost per draw, and peak memory, against a smaller size
WORDS = ("the", "model", "says", "what", "it", "would", "do", "and", "then", "does", "another", "thing", "in", "words")


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the command line may say."""

    sizes: tuple[int, ...] = (3_200, 32_000, 320_000)
    repeats: int = 3
    output: Path = Path("benchmarks/results/store.csv")
    one: int | None = None  # a single size, in this process; its figures are printed as JSON
    grown: str = "prompts"  # for that


@dataclass(slots=True)
class Spent:
    """Seconds, summed over many stretches."""

    wall: float = 0.0
    cpu: float = 0.0
    _since: tuple[float, float] = field(default=(0.0, 0.0))

    def __enter__(self) -> "Spent":
        self._since = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        self.wall += time.perf_counter() - self._since[0]
        self.cpu += time.process_time() - self._since[1]


def through_store(
    folder: Path, units: Sequence[Unit], identity: Identity, draw: Callable[[Unit, list[Request]], list[list[Reply]]]
) -> tuple[Spent, Spent]:
    """What ``draw`` took, and what everything else took that serve.sample does with replies."""
    drawing, storing = Spent(), Spent()
    with storing:
        store = open_store(folder, identity)
        missing = [u for u in units if store.missing(SAMPLED, row_ids(u, identity))]
        random.Random(0).shuffle(missing)
    for unit in missing:
        with storing:
            ids = row_ids(unit, identity)
            asked = requests_of(unit, ids, set(store.missing(SAMPLED, ids)))
        with drawing:
            replies = draw(unit, [request for _, request in asked])
        with storing:
            store.add(SAMPLED, sample_rows(unit, ids, asked, replies, identity))
    with storing:
        write_answers(folder, units, identity, store)
        for kind in (SAMPLED, EXACT):
            store.compact(kind, lambda: (row_ids(u, identity) for u in units if kind_of(u) is kind))  # noqa: B023
        store.clear()
    return drawing, storing


def planned(n: int, grown: str, folder: Path) -> tuple[list[Unit], Identity]:
    """Units of ``n`` draws in all, and whose they are."""
    questions = load_harmfulness(QUESTIONS)
    draws = DRAWS if grown == "prompts" else max(1, n // len(questions))
    prompts = [numbered(questions[i % len(questions)], i) for i in range(n // draws)]
    config = SampleConfig(
        base=folder, variant="v", prompts=QUESTIONS, ask=(Ask(format="free", mode="sampled", n=draws),),
        output_dir=folder, study_seed=1,
    )  # fmt: skip
    identity = Identity(
        weights_sha="w", text_sha="t", engine=engine_identity(config), variant=config.variant, study_seed=1
    )
    return plan_units(prompts, config), identity


def numbered(prompt: Prompt, i: int) -> Prompt:
    """A question of its own: two prompts that ask the same are refused."""
    return replace(prompt, prompt_id=f"{prompt.prompt_id}/{i}", text=f"{prompt.text} ({i})")


def made_up(unit: Unit, requests: list[Request]) -> list[list[Reply]]:
    """Replies of 52 words."""
    del unit
    rng = random.Random(requests[0].stream)
    return [[Reply(" ".join(rng.choices(WORDS, k=52)), 60, "stop", -60.0) for _ in range(r.n)] for r in requests]


def attested() -> Any:
    """The engine that a process which samples has open."""
    from serve.attest import attest
    from serve.registry import open_engine

    config = SampleConfig(
        base=NANO, variant="v", prompts=QUESTIONS, ask=(Ask(format="free", mode="sampled"),), output_dir=NANO,
        study_seed=1, engine=EngineConfig(threads=1),
    )  # fmt: skip
    engine = open_engine(config.engine, NANO, None)
    attest(engine, config)
    return engine


def run(n: int, grown: str) -> dict[str, float]:
    """Store ``n`` replies in this process."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        engine = attested()
        units, identity = planned(n, grown, folder)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        _, storing = through_store(folder, units, identity, made_up)
        size = (folder / "samples.parquet").stat().st_size
    del engine
    n_draws = sum(u.n_rows for u in units)
    return {
        "us_per_draw": storing.cpu / n_draws * 1e6,
        "wall_us_per_draw": storing.wall / n_draws * 1e6,
        "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "rss_before_mb": before / 1024,
        "table_mb": size / 1e6,
    }


def in_a_process(n: int, grown: str) -> dict[str, float]:
    """The figures of one run."""
    command = [sys.executable, "-m", "benchmarks.store", f"one={n}", f"grown={grown}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"{n} draws: {done.stderr[-2000:]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def rows_of(options: Options, grown: str, found: dict[int, list[dict[str, float]]]) -> list[dict[str, Any]]:
    """A row per size, and rows that answer."""
    rows = []
    for n, runs in found.items():
        middle = {k: round(statistics.median(run[k] for run in runs), 1) for k in runs[0]}
        us = [run["us_per_draw"] for run in runs]
        rows.append({"grown_by": grown, "draws": n, "runs": len(runs), **middle, **spread(us, "us_per_draw", 1)})
    *smaller, large = sorted(options.sizes)
    for other, what, limit in [(n, "us_per_draw", LINEAR) for n in smaller] + [(smaller[0], "peak_rss_mb", FLAT)]:
        ratios = [a[what] / b[what] for a, b in zip(found[large], found[other], strict=True)]
        value = statistics.median(ratios)
        rows.append(
            {
                "grown_by": grown,
                "draws": large,
                "runs": len(ratios),
                "target": f"{what} at most {limit} times that at {other} draws",
                "value": round(value, 3),
                **spread(ratios, "value", 3),
                "met": "yes" if value <= limit else "no",
            }
        )
    return rows


def spread(values: list[float], name: str, digits: int) -> dict[str, float]:
    """The smallest and the largest."""
    return {f"{name}_low": round(min(values), digits), f"{name}_high": round(max(values), digits)}


def main(argv: list[str]) -> None:
    """Run every size in turns and append the rows."""
    values: dict[str, Any] = {}
    for word in argv:
        apply_override(values, word)
    options = build(Options, values, where="command line")
    if len(options.sizes) < 2:
        raise UserError("sizes must be two or more; they are compared.")
    if options.grown not in GROWN:
        raise UserError(f"grown is {options.grown!r}; known: {', '.join(GROWN)}.")
    if options.one is not None:
        print(json.dumps(run(options.one, options.grown)))
        return
    found: dict[str, dict[int, list[dict[str, float]]]] = {g: {n: [] for n in options.sizes} for g in GROWN}
    for turn in range(options.repeats):
        for grown in GROWN:
            for n in options.sizes:
                found[grown][n].append(in_a_process(n, grown))
                sys.stderr.write(f"{turn + 1}/{options.repeats} {n} by {grown}: {found[grown][n][-1]}\n")
    # not before: it loads torch, and a process starts with its parent's peak memory in its own books
    from benchmarks.timing import append, machine

    rows = [row for grown in GROWN for row in rows_of(options, grown, found[grown])]
    columns = dict.fromkeys(key for row in rows for key in row)
    append(options.output, [{**dict.fromkeys(columns, ""), **row, **machine("cpu"), "threads": 1} for row in rows])


if __name__ == "__main__":
    run_script(main)
