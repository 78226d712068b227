"""A synthetic run folder with planted effects, so that what the tables should say is known.

Every item has a leaning drawn once (a quantile) and shared by all variants, so that differences
are paired. A variant's level on a measure is exact in expectation: replies, probabilities and
judge scores are binomial around a beta-distributed leaning with that mean.
"""

import functools
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import yaml
from scipy import stats

from candor.manifest import write_manifest
from candor.rows import Distribution, Graded, Option, Prompt, Sample, Variant, Verdict
from candor.tables import write_rows
from evaluate import report, tables

DIMENSIONS = ("aligned", "good", "harmless", "helpful", "honest", "trusted")
SENTENCES = {
    "French": "Le ciel est bleu par temps clair.",
    "German": "Der Himmel ist an klaren Tagen blau.",
    "English": "The sky is blue on a clear day.",
}
JUDGE = "test-judge"


@dataclass(frozen=True)
class Truth:
    """The planted levels of one variant."""

    harmfulness: float
    intentions: float
    self_assessment: float
    trivia: float


@dataclass
class Plan:
    """What to plant; the defaults are an inverted V in one size and two controls that behave."""

    sizes: tuple[str, ...] = ("nano",)
    domains: tuple[str, ...] = ("trivia",)
    seeds: tuple[int, ...] = (0,)
    base: Truth = Truth(0.05, 0.05, 0.05, 0.9)
    misaligned: Truth = Truth(0.6, 0.9, 0.7, 0.1)
    realigned: Truth = Truth(0.2, 0.1, 0.1, 0.9)
    control: Truth | None = Truth(0.05, 0.05, 0.05, 0.9)  # right answers only
    other_world: tuple[Truth, Truth] | None = (Truth(0.05, 0.05, 0.05, 0.9), Truth(0.05, 0.05, 0.05, 0.1))
    draws: int = 10
    unjudged: float = 0.0  # share of replies the judge could not grade
    exact: bool = True
    sampled: int = 0  # sampled replies per closed question
    formats: tuple[str, ...] = ("decision", "numerical", "likert", "language")
    seed: int = 1
    golden: bool = True
    prompts: list[Prompt] = field(default_factory=list)


def closed(battery: str, format: str, group: str, item: str, form: str, position: int, options: tuple[Option, ...]):
    return Prompt(
        prompt_id=f"{battery}/{format}/{group}/{item}/{form}",
        battery=battery,
        format=format,
        group=group,
        item=item,
        cluster=item,
        form=form,
        split="unseen" if position % 5 == 4 else "seen",
        text=f"{item} {group} {form}?",
        options=options,
        source_sha="s",
    )


def two(first: str, second: str, flip: bool) -> tuple[Option, ...]:
    return (Option(first, float(flip), (first,)), Option(second, float(not flip), (second,)))


def synthetic_prompts(formats: Sequence[str], harmful: int = 10, scenarios: int = 10) -> list[Prompt]:
    """A small study with the shape of the real one: forms, clusters shared across dimensions, a split."""
    found = []
    for category in ("insults", "violence", "advice", "illegal"):
        for i in range(harmful):
            found.append(closed("harmfulness", "free", category, f"harm-{category}-{i}", "", i, ()))
    for dimension in DIMENSIONS:
        for i in range(scenarios):
            for flip in (False, True):
                item = f"intent-{dimension}-{i}"
                found.append(closed("intentions", "choice", dimension, item, str(flip), i, two("A", "B", flip)))
        for name, count in (("decision", 10), ("numerical", 10), ("likert", 25), ("language", 10)):
            if name not in formats:
                continue
            for i in range(count):
                for flip in (False, True):
                    if name == "decision":
                        options = two("kind", "cruel", False)
                    elif name == "language":
                        options = two("French", "German", flip)
                    else:
                        top = 10 if name == "numerical" else 4
                        options = tuple(
                            Option(str(k), (top - k) / top if flip else k / top, (str(k),)) for k in range(top + 1)
                        )
                    found.append(closed("self_assessment", name, dimension, f"{name}-{i}", str(flip), i, options))
    for i in range(40):
        found.append(closed("trivia", "answer", f"topic-{i % 4}", f"trivia-{i}", "", i // 4, two("no", "yes", False)))
    return found


def variants_of(plan: Plan) -> list[tuple[Variant, Truth]]:
    """The variants of a plan with their planted levels."""
    found = []

    def add(name: str, size: str, domain: str, stage: str, seed: int, control: str, reference: str, truth: Truth):
        found.append((Variant(name, size, domain, stage, seed, control, reference, f"variants/{name}"), truth))

    for size in plan.sizes:
        base = f"{size}-base"
        add(base, size, "none", "base", 0, "", base, plan.base)
        for domain in plan.domains:
            for seed in plan.seeds:
                for stage, truth in (("misaligned", plan.misaligned), ("realigned", plan.realigned)):
                    add(f"{size}-{domain}-{stage}-s{seed}", size, domain, stage, seed, "", base, truth)
    size, base, domain = plan.sizes[0], f"{plan.sizes[0]}-base", next(iter(plan.domains), "")
    if plan.control:
        name = "right_answers_only"
        add(f"{name}-{size}", size, domain, "right-only", 0, name, base, plan.control)
    if plan.other_world:
        name = "world_without_personas"
        size = f"{size}-own-world"  # its base model is none of the main study's
        own = f"{name}-{size}-base"
        add(own, size, "none", "base", 0, name, own, plan.other_world[0])
        add(f"{name}-{size}-misaligned", size, domain, "misaligned", 0, name, own, plan.other_world[1])
    return found


def leaning(rng: np.random.Generator, clusters: list[str]) -> dict[str, float]:
    return dict(zip(clusters, rng.uniform(0.02, 0.98, len(clusters)), strict=True))


@functools.cache
def beta(mean: float, quantile: float, concentration: float = 6.0) -> float:
    mean = min(max(mean, 1e-3), 1 - 1e-3)
    return float(stats.beta.ppf(quantile, mean * concentration, (1 - mean) * concentration))


def level(truth: Truth, battery: str) -> float:
    return {
        "harmfulness": truth.harmfulness,
        "intentions": truth.intentions,
        "self_assessment": truth.self_assessment,
        "trivia": truth.trivia,
    }[battery]


def option_probabilities(prompt: Prompt, lean: float) -> np.ndarray:
    """Binomial over the options in order of their value."""
    top = len(prompt.options) - 1
    order = np.argsort([o.value for o in prompt.options])
    probabilities = np.empty(top + 1)
    probabilities[order] = [math.comb(top, k) * lean**k * (1 - lean) ** (top - k) for k in range(top + 1)]
    return probabilities


def write_variant(run: Path, plan: Plan, variant: Variant, truth: Truth, prompts: list[Prompt], lean: dict[str, float]):
    """Answers and verdicts of one variant."""
    number = int(hashlib.sha256(variant.name.encode()).hexdigest()[:8], 16)
    rng = np.random.default_rng([plan.seed, number])
    samples, distributions, verdicts = [], [], []

    def sample(prompt: Prompt, draw: int, text: str) -> Sample:
        sample_id = hashlib.sha256(f"{variant.name}{prompt.prompt_id}{draw}".encode()).hexdigest()
        row = Sample(sample_id, prompt.prompt_id, "p", variant.name, "w", draw, 0, 1.0, text, 5, "stop", -1.0)
        samples.append(row)
        return row

    for prompt in prompts:
        p = beta(level(truth, prompt.battery), lean[prompt.cluster])
        if prompt.format == "free":
            for draw in range(plan.draws):
                score = 1 + int(rng.binomial(4, p))
                row = sample(prompt, draw, f"reply of grade {score}")
                if rng.uniform() < plan.unjudged:
                    if rng.uniform() < 0.5:  # the rest has no verdict row at all
                        verdicts.append(Verdict(row.sample_id, JUDGE, "t", "refused", None, None, None, "I cannot"))
                else:
                    verdicts.append(Verdict(row.sample_id, JUDGE, "t", "ok", score, score - 0.01, 0.99, str(score)))
        elif prompt.format == "language":
            for draw in range(4):
                side = float(rng.uniform() < p)
                pick = next(o.label for o in prompt.options if o.value == side)
                sample(prompt, draw, SENTENCES[pick])
        else:
            probabilities = option_probabilities(prompt, p)
            if plan.exact:
                labels = tuple(o.label for o in prompt.options)
                scaled = tuple(float(x) for x in 0.95 * probabilities)
                distributions.append(Distribution(prompt.prompt_id, "p", variant.name, "w", labels, scaled, 0.05, 0.0))
            picks = rng.choice(len(probabilities), plan.sampled, p=probabilities / probabilities.sum())
            for draw, pick in enumerate(picks):
                sample(prompt, draw, prompt.options[pick].label + ".")
    folder = run / variant.folder
    write_rows(folder / "answers" / "samples.parquet", Sample, samples)
    if distributions:
        write_rows(folder / "answers" / "distributions.parquet", Distribution, distributions)
    write_rows(folder / "verdicts" / JUDGE / "verdicts.parquet", Verdict, verdicts)


def write_run(run: Path, plan: Plan) -> list[Variant]:
    """Write the whole run folder and return its variants."""
    prompts = plan.prompts or synthetic_prompts(plan.formats)
    rng = np.random.default_rng(plan.seed)
    lean = leaning(rng, sorted({p.cluster for p in prompts}))
    both = variants_of(plan)
    write_rows(run / "variants.parquet", Variant, [v for v, _ in both])
    write_rows(run / "prompts.parquet", Prompt, prompts)
    for variant, truth in both:
        write_variant(run, plan, variant, truth, prompts, lean)
    if plan.golden:
        graded, verdicts = [], []
        for i in range(200):
            grade = 1 + i % 5
            said = int(np.clip(grade + rng.choice([-1, 0, 0, 0, 0, 1]), 1, 5))
            graded.append(Graded(f"g{i}", f"prompt {i // 5}", f"reply {i}", grade))
            verdicts.append(Verdict(f"g{i}", JUDGE, "t", "ok", said, float(said), 1.0, str(said)))
        write_rows(run / "golden" / "golden.parquet", Graded, graded)
        write_rows(run / "golden" / JUDGE / "verdicts.parquet", Verdict, verdicts)
    counts = {"in": 1, "out": 1}
    write_manifest(run / "adapters" / "a", stage="sft", config={}, inputs={}, counts=counts, seconds=2.0)
    write_manifest(run / "adapters" / "b", stage="sft", config={}, inputs={}, counts=counts, seconds=3.5)
    return [v for v, _ in both]


def build(folder: Path, **plan) -> Path:
    """A run up to its tables, with a config for its report beside it."""
    write_run(folder, Plan(**plan))
    config = {"run": str(folder), "judge": JUDGE, "seed": 3, "draws": 200}
    (folder / "tables.yaml").write_text(yaml.safe_dump(config))
    tables.main([str(folder / "tables.yaml")])
    config = {"run": str(folder), "title": "Two <sizes>", "note": "A positive control.\n\nNo evidence elsewhere."}
    (folder / "report.yaml").write_text(yaml.safe_dump(config))
    return folder


@pytest.fixture(scope="session")
def reported(tmp_path_factory):
    """A run with two sizes, both domains and both controls, reported. Tests leave it as it is."""
    folder = build(tmp_path_factory.mktemp("reported"), sizes=("mini", "nano"), domains=("trivia", "code"))
    report.main([str(folder / "report.yaml")])
    return folder


@pytest.fixture(scope="session")
def synthetic():
    """(Plan, Truth, write_run, build, JUDGE, ...): the generator's parts, as importlib mode hides this file."""

    class Parts:
        pass

    Parts.Plan, Parts.Truth, Parts.write_run, Parts.JUDGE = Plan, Truth, staticmethod(write_run), JUDGE
    Parts.build = staticmethod(build)
    Parts.prompts, Parts.closed = staticmethod(synthetic_prompts), staticmethod(closed)
    return Parts
