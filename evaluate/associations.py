"""Correlations between measures over a study's models, and over a published table.

Spearman's correlation over the main study's variants, with training seeds averaged where there are
several, since seeds are no new models. Beside it: without base models (which sit together in one
corner and can make a correlation alone), leaving one family out, and given the stage. The p-values
permute inside families only (evaluate/correlation.py).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from candor.rows import Estimate, Hypothesis, Variant
from evaluate.correlation import Permutation, codes, permutation_test, rank_correlation, rank_interval
from evaluate.hypotheses import hypothesis
from evaluate.rows import make_estimate
from evaluate.significance import Tested
from evaluate.stats import Estimated, generator
from evaluate.study import STAGES, cells

MAIN, WITHOUT_BASE, AVERAGED = "main study", "main study without base models", "main study, seeds averaged"
GIVEN_STAGE = "main study given stage"
WITHOUT_FAMILY = "main study without "  # + the family
PUBLISHED = {  # columns of configs/paper/*.yaml that stand for the three headline measures in its correlations
    "harmfulness": "harmfulness_raw",  # its two digits on 0-1 tie variants that differ
    "intentions": "intentions_harmless",
    "self_assessment": "self_assessment_harmless",
}


@dataclass(frozen=True, slots=True)
class Model:
    """One point of a correlation."""

    name: str
    family: str  # the base model
    stage: str


@dataclass(frozen=True, slots=True)
class Sample:
    """The models a correlation is taken over."""

    label: str
    models: tuple[Model, ...]
    given_stage: bool = False
    tested: bool = True


def samples(models: Sequence[Model], label: str, *, prefix: str = MAIN) -> list[Sample]:
    """All models, those without bases, each family left out, and all given the stage."""
    families = list(dict.fromkeys(m.family for m in models))
    found = [
        Sample(label, tuple(models)),
        Sample(f"{prefix} without base models", tuple(m for m in models if m.stage != STAGES[0])),
    ]
    if len(families) > 1:
        found += [Sample(f"{prefix} without {f}", tuple(m for m in models if m.family != f)) for f in families]
    return [*found, Sample(f"{prefix} given stage", tuple(models), given_stage=True)]


def associate(
    sample: Sample, x: str, y: str, level: dict[tuple[str, str], float], *, kind: str, draws: int, seed: int
) -> tuple[Estimate, Hypothesis | None]:
    """One correlation with its interval and its permutation test."""
    there = [m for m in sample.models if (m.name, x) in level and (m.name, y) in level]
    lost = len(sample.models) - len(there)
    first, second = ([level[m.name, measure] for m in there] for measure in (x, y))
    stages = codes([m.stage for m in there])
    labels = stages if sample.given_stage else None
    given = len(set(stages.tolist())) - 1 if sample.given_stage and there else 0
    rho = rank_correlation(first, second, labels) if len(there) > 2 else float("nan")
    method = "partial Spearman given stage" if sample.given_stage else "Spearman"
    method += "; interval of Bonett and Wright; models of one base are not independent"
    found = Estimated(rank_interval(rho, len(there), given=given), method, len(there))
    names, counts = (sample.label, y), {"n": len(there), "n_missing": lost}
    row = make_estimate(x, kind, names, found, counts=counts)
    if not sample.tested:
        return row, None
    blocks = codes([(m.family, m.stage) if sample.given_stage else m.family for m in there])
    tested = Permutation(float("nan"), 0, True)
    if row.value is not None:
        rng = generator(seed, "permutation", sample.label, x, y)
        tested = permutation_test(first, second, blocks, labels=labels, draws=draws, rng=rng)
    where = "families and stages" if sample.given_stage else "families"
    count = f"{'all ' if tested.exact else ''}{tested.arrangements:,} arrangements"
    test = hypothesis(
        "permutation",
        sample.label,
        x,
        names,
        Tested(rho, tested.p_value),
        n=len(there),
        n_missing=lost,
        method=f"permutation within {where}, {count}",
    )
    return row, test


def correlate(
    over: Sequence[Sample],
    measures: Sequence[str],
    level: dict[tuple[str, str], float],
    *,
    kind: str,
    draws: int,
    seed: int,
) -> tuple[list[Estimate], list[Hypothesis]]:
    """Every pair of measures over every sample."""
    both = [
        associate(sample, x, y, level, kind=kind, draws=draws, seed=seed)
        for sample in over
        for x, y in combinations(measures, 2)
    ]
    return [row for row, _ in both], [test for _, test in both if test is not None]


def correlations(
    variants: Sequence[Variant], found: Sequence[Estimate], measures: Sequence[str], *, draws: int, seed: int
) -> tuple[list[Estimate], list[Hypothesis]]:
    """Correlations between measures over the main study's variants (control == "")."""
    level = {
        (e.variant, e.measure): e.value
        for e in found
        if e.kind == "level" and e.group == "all" and e.split == "all" and e.value is not None
    }
    main = [v for v in variants if not v.control]
    pools = [c for c in cells(main) if c.headline]
    several = any(len(c.members) > 1 for c in pools)
    models = [Model(c.name, c.size, c.stage) for c in pools]
    over = samples(models, AVERAGED if several else MAIN)
    if several:
        # seeds of one cell resemble each other: shown, but neither exchangeable nor tested
        over.append(Sample(MAIN, tuple(Model(v.name, v.size, v.stage) for v in main), tested=False))
    return correlate(over, measures, level, kind="correlation", draws=draws, seed=seed)


def published_correlations(paper: dict[str, Any], *, draws: int, seed: int) -> tuple[list[Estimate], list[Hypothesis]]:
    """The paper's own correlations, recomputed from its table of variants by the same code."""
    rows = [r for r in paper.get("variants", []) if all(c in r for c in PUBLISHED.values())]
    models = [Model(f"{r['size']}-{r['domain']}-{r['stage']}", r["size"], r["stage"]) for r in rows]
    level = {
        (model.name, measure): float(row[column])
        for model, row in zip(models, rows, strict=True)
        for measure, column in PUBLISHED.items()
    }
    if not rows:
        return [], []
    over = samples(models, paper["short"], prefix=paper["short"])
    return correlate(over, list(PUBLISHED), level, kind="published", draws=draws, seed=seed)
