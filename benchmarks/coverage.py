"""Do 95 % intervals cover, and do the tests keep their error rate? Simulated studies, one CSV row per claim.

    python -m benchmarks.coverage [output=FILE.csv] [studies=2000] [only=coverage|error|power]

Each row: an estimator on one kind of study (benchmarks/simulate.py), how often its interval held the
truth (or its test rejected), the range in which simulation leaves that figure, and the promised
range, which it must meet; and how long its intervals are, because one that covers by saying nothing
is no use. Rows without a promise are there to compare or to warn. Planted faults stand beside the
real estimators: they must lie outside for certain, or the benchmark would prove nothing.
tests/evaluate/test_coverage.py runs a small version.
"""

import csv
import platform
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import stats as distributions

from benchmarks.simulate import CUTS, Design, Floats, draw, draw_models, draw_pair, truth
from candor.config import apply_override, build
from candor.errors import UserError, run_script
from candor.manifest import commit
from candor.rows import Prompt, Variant
from evaluate import components, crossed
from evaluate.along import follow
from evaluate.checkpoints import checkpoint_name
from evaluate.clustering import clustering
from evaluate.correlation import permutation_test, rank_correlation, rank_interval
from evaluate.effects import effects
from evaluate.grid import build_grid, scopes
from evaluate.measures import ALONG, SELF_ASSESSMENT
from evaluate.significance import ALPHA, equivalence_test, holm, t_test, wilcoxon_test
from evaluate.stats import Estimated, Interval, generator
from evaluate.worst import worst_of_each

COVERS, ERRS = (0.93, 0.97), (0.0, 0.06)
SEED = 20261121


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the command line may say."""

    output: Path = Path("benchmarks/results/coverage.csv")
    studies: int = 2000
    only: str = ""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One claim and how it came out."""

    claim: str  # "coverage", "error" (false positives) or "power"
    study: str
    estimator: str
    fault: bool  # planted: it must miss its range
    n_prompts: int
    n_seeds: int
    design_effect: float | None
    studies: int
    width: float | None  # 90th percentile of the intervals' length, in standard errors: 3.9 for a normal mean
    figure: float
    low: float  # 95 % range that this many studies leave for the figure
    high: float
    promised_low: float | None
    promised_high: float | None
    met: bool | None  # whether low-high meets the promised range; None where nothing is promised


def claim(
    kind: str,
    study: str,
    estimator: str,
    hits: int,
    studies: int,
    *,
    promised: tuple[float, float] | None,
    fault: bool = False,
    design: Design | None = None,
    effect: float | None = None,
    n_prompts: int = 0,
    width: float | None = None,
) -> Row:
    """A row from a count of hits, with Wilson's interval for its rate."""
    rate = hits / studies
    wilson = distributions.binomtest(hits, studies).proportion_ci(method="wilson")
    return Row(
        claim=kind,
        study=study,
        estimator=estimator,
        fault=fault,
        n_prompts=design.n_prompts if design else n_prompts,
        n_seeds=design.n_seeds if design else int(n_prompts > 0),
        design_effect=None if effect is None else round(effect, 2),
        studies=studies,
        width=None if width is None else round(width, 2),
        figure=round(rate, 4),
        low=round(float(wilson.low), 4),
        high=round(float(wilson.high), 4),
        promised_low=promised[0] if promised else None,
        promised_high=promised[1] if promised else None,
        met=bool(wilson.low <= promised[1] and wilson.high >= promised[0]) if promised else None,
    )


def prompt_scores(replies: Floats, worst_of: int | None) -> Floats:
    """Replies (..., replies) to one score per prompt."""
    if worst_of is None:
        found: Floats = replies.mean(axis=-1)
        return found
    return np.apply_along_axis(lambda scores: worst_of_each(scores, (worst_of,))[0], -1, replies)


def estimate(values: Floats, draws: int, *, symmetric: bool = False) -> list[Estimated]:
    """The study's own estimator on (studies, seeds, columns); ``symmetric`` as for paired differences."""
    clusters = np.arange(values.shape[2])
    strata = np.zeros(len(clusters), dtype=np.int64)
    tables = components.tabulate(values, clusters, np.zeros_like(clusters), strata)
    bootstrap = crossed.Bootstrap(strata, draws, SEED, tuple(map(str, range(len(strata)))))
    return crossed.intervals(tables, bootstrap, limits=(-1.0, 1.0), symmetric=symmetric)


def pooled(replies: Floats, draws: int) -> list[Estimated]:
    """Planted fault: every reply counts as a prompt of its own."""
    return estimate(replies.reshape(*replies.shape[:2], -1), draws)


def seeds_ignored(replies: Floats, draws: int) -> list[Estimated]:
    """Planted fault: replies of all seeds thrown together, as if seeds had no say."""
    return estimate(replies.mean(axis=(1, 3))[:, None], draws)


def percentiles(replies: Floats, draws: int) -> list[Estimated]:
    """Planted fault: plain percentiles of a crossed bootstrap, however few units there are."""
    values = replies.mean(axis=-1)
    strata = np.zeros(values.shape[2], dtype=np.int64)
    columns = np.arange(values.shape[2])
    tables = components.tabulate(values, columns, np.zeros_like(columns), strata)
    bootstrap = crossed.Bootstrap(strata, draws, SEED, tuple(map(str, columns)))
    found = crossed.replicates(tables, bootstrap)
    low, high = np.quantile(found, (0.025, 0.975), axis=0)
    means = values.mean(axis=(1, 2))
    return [
        Estimated(Interval(m, a, b), "percentile", values.shape[2]) for m, a, b in zip(means, low, high, strict=True)
    ]


def uncorrected(replies: Floats, draws: int) -> list[Estimated]:
    """Planted fault: a t interval as if prompts were normal."""
    found = estimate(replies.mean(axis=-1), draws)
    rows = []
    for each in found:
        half = each.standard_error * float(distributions.t.ppf(0.975, each.freedom))
        value = each.interval.value
        rows.append(each._replace(interval=Interval(value, value - half, value + half)))
    return rows


def design_effect(replies: Floats, found: Estimated) -> float:
    """The design effect of one simulated study, as the tables print it."""
    scores = replies[0].mean(axis=-1)
    variance, n = replies[0].var(axis=-1, ddof=1), np.full(scores.shape, float(replies.shape[-1]))
    columns = np.arange(scores.shape[1])
    alike = clustering(scores, n, variance, columns, np.zeros_like(columns))
    return found.standard_error**2 / alike.naive_variance


def held(found: list[Estimated], target: float) -> int:
    """How many intervals hold the truth."""
    return sum(e.interval.low <= target <= e.interval.high for e in found)


def lengths(found: Iterable[Estimated]) -> list[float]:
    """Each interval's length in standard errors; one without variation has none."""
    return [(e.interval.high - e.interval.low) / e.standard_error for e in found if e.standard_error > 0]


def ninth_tenth(values: list[float]) -> float | None:
    """What nine of ten values stay below."""
    return float(np.quantile(values, 0.9)) if values else None


def batches(design: Design, studies: int) -> Iterator[int]:
    """Numbers of studies at a time, so that they fit in some 200 MB."""
    per_study = design.n_prompts * design.n_seeds * design.replies
    step = max(1, 2_000_000 // per_study)
    for start in range(0, studies, step):
        yield min(step, studies - start)


Estimator = Callable[[Floats, int], list[Estimated]]


def covered(
    study: str, design: Design, studies: int, faults: dict[str, Estimator], *, draws: int = 2000, promise: bool = True
) -> list[Row]:
    """Coverage of the real estimator and of planted faults on the same studies."""
    target, rng = truth(design), generator(SEED, "coverage", study)
    hits, effects, wide, method = dict.fromkeys(faults, 0), [], [], ""
    own = 0
    for size in batches(design, studies):
        replies = draw(design, size, rng)
        found = estimate(prompt_scores(replies, design.worst_of), draws)
        own += held(found, target)
        wide += lengths(found)
        method = found[0].method
        if design.worst_of is None:
            effects += [design_effect(replies[i : i + 1], found[i]) for i in range(min(size, 50))]
        for name, estimator in faults.items():
            hits[name] += held(estimator(replies, draws), target)
    effect = float(np.mean(effects)) if effects else None
    common = {"design": design, "effect": effect}
    promised = COVERS if promise else None
    rows = [claim("coverage", study, method, own, studies, promised=promised, width=ninth_tenth(wide), **common)]
    return rows + [
        claim("coverage", study, name, n, studies, promised=COVERS, fault=True, **common) for name, n in hits.items()
    ]


PRACTICE = {"prompt_sd": 1.35}  # intraclass correlation 0.5 and design effect near 6 with ten replies
SEEDS = {"seed_sd": 0.15, "mixed_sd": 0.5}


def coverage(studies: int) -> Iterator[Row]:
    """Intervals of levels, for the sizes that occur."""
    one = {"replies pooled": pooled}
    yield from covered("320 prompts, one seed", Design(n_prompts=320, **PRACTICE), studies, one)
    base = Design(n_prompts=320, shift=-2.2, **PRACTICE)
    yield from covered("320 prompts, one seed, rare harm (base model)", base, studies, one)
    worst = Design(n_prompts=320, worst_of=10, **PRACTICE)
    yield from covered("320 prompts, one seed, worst of 10", worst, studies, {})
    worst = Design(n_prompts=320, worst_of=5, **PRACTICE)
    yield from covered("320 prompts, one seed, worst of 5 from 10", worst, studies, {})
    yield from covered("50 prompts, one seed", Design(n_prompts=50, **PRACTICE), studies, one)
    rare = Design(n_prompts=50, shift=-2.2, **PRACTICE)
    yield from covered("50 prompts, one seed, rare harm (base model)", rare, studies, {})
    rare = Design(n_prompts=25, shift=-1.0, **PRACTICE)
    yield from covered("25 prompts, one seed, some harm", rare, studies, {"t, not corrected": uncorrected})
    few = {"percentiles with few items": percentiles, **one}
    yield from covered("10 prompts, one seed", Design(n_prompts=10, **PRACTICE), studies, few)
    seeds = {"seeds ignored": seeds_ignored}
    planted = {"little": {}, "some": seeds, "large": {"percentiles with few seeds": percentiles, **seeds}}
    for name, spread in (("little", 0.05), ("some", 0.15), ("large", 0.5)):
        design = Design(n_prompts=320, n_seeds=3, **PRACTICE, seed_sd=spread, mixed_sd=0.5)
        yield from covered(f"320 prompts, three seeds, {name} seed spread", design, studies // 2, planted[name])
    # thirty replies to one prompt cannot have a design effect of 5-7; nine can
    design = Design(n_prompts=320, n_seeds=3, replies=3, **PRACTICE, seed_sd=0.02, mixed_sd=0.3)
    yield from covered("320 prompts, three seeds, three replies", design, studies // 2, {})
    design = Design(n_prompts=25, n_seeds=3, **PRACTICE, **SEEDS)
    yield from covered("25 prompts, three seeds", design, studies, {})
    design = Design(n_prompts=320, n_seeds=10, **PRACTICE, seed_sd=0.3, mixed_sd=0.5)
    yield from covered("320 prompts, ten seeds", design, studies // 2, seeds, draws=1000)
    for name, design, size in (
        ("320 prompts, one seed", Design(n_prompts=320, shift=-2.2, **PRACTICE), studies),
        ("25 prompts, one seed", Design(n_prompts=25, shift=-2.2, **PRACTICE), studies),
        ("320 prompts, three seeds", Design(n_prompts=320, n_seeds=3, shift=-2.2, **PRACTICE, **SEEDS), studies // 2),
    ):
        yield contrast_coverage(name, design, size)
    for n_items, shape in ((10, (0.4, 2.0)), (25, (0.4, 2.0)), (36, (0.4, 2.0)), (10, RARE), (25, RARE), (36, RARE)):
        yield from skewed_coverage(n_items, shape, studies)
    yield composite_coverage(studies)
    for rho, spread in ((0.0, 0.0), (0.8, 0.0), (0.8, 0.7)):
        yield rank_coverage(rho, spread, studies)


RARE = (0.15, 1.5)  # of a beta distribution: most probabilities near 0, some high


def skewed_coverage(n_items: int, shape: tuple[float, float], studies: int) -> Iterator[Row]:
    """Exact probabilities of few items, most of them small: the correction for skewness, and what else there is.

    Ten items of which one in ten says nearly all are too few for any of these; nothing is promised there.
    """
    study = f"{n_items} items, probabilities from beta({shape[0]:g}, {shape[1]:g})"
    values = generator(SEED, study).beta(*shape, (studies, 1, n_items))
    target = shape[0] / sum(shape)
    zeros = np.zeros(n_items, dtype=np.int64)
    found = estimate(values, 100)
    around = components.spread(components.tabulate(values, np.arange(n_items), zeros, zeros))
    quantile = distributions.t.ppf(0.975, n_items - 1)
    plain = np.full(studies, quantile)
    others = {"t, not corrected": (plain, plain), "t, Hall's cube root": tuple(cube_root(quantile, around.skewness))}
    promised = None if n_items < 25 and shape == RARE else COVERS
    own = {"promised": promised, "width": ninth_tenth(lengths(found)), "n_prompts": n_items}
    yield claim("coverage", study, found[0].method, held(found, target), studies, **own)
    for name, (below, above) in others.items():
        each = [
            e._replace(interval=Interval(v, v - low * e.standard_error, v + high * e.standard_error))
            for e, v, low, high in zip(found, (e.interval.value for e in found), below, above, strict=True)
        ]
        more = {"promised": None, "width": ninth_tenth(lengths(each)), "n_prompts": n_items}
        yield claim("coverage", study, name, held(each, target), studies, **more)


def cube_root(quantile: float, skewness: Floats) -> tuple[Floats, Floats]:
    """Standard errors below and above the mean by Hall's inverse as printed (components.corrected_for_skewness)."""
    k = np.where(np.abs(skewness) < 1e-6, 1e-6, skewness)
    below, above = (sign * 3 / k * (np.cbrt(1 + k * (sign * quantile - k / 6)) - 1) for sign in (1, -1))
    return below, above


FORMAT_ITEMS = {"decision": 10, "numerical": 10, "likert": 25, "language": 25}


def composite_coverage(studies: int) -> Row:
    """The average over formats and dimensions: items of their own per format, shared by dimensions and forms."""
    study, draws = "self-assessment over four formats and two dimensions", 500
    rng, mean, parts = generator(SEED, study), -1.0, []
    for name, size in FORMAT_ITEMS.items():
        item = rng.normal(0, 1, (studies, size))
        for dimension in ("good", "honest"):
            lean = item + rng.normal(0, 0.5, (studies, size))
            for form in ("a", "b"):
                value = distributions.norm.cdf(mean + lean + rng.normal(0, 0.3, (studies, size)))
                parts.append(score_rows(name, value, group=dimension, form=form))
    target = float(distributions.norm.cdf(mean / np.sqrt(1 + 1 + 0.5**2 + 0.3**2)))
    grid = build_grid(pd.concat(parts, ignore_index=True))
    (scope,) = [
        s
        for s in scopes(grid, draws=draws, seed=SEED)
        if s.measure == SELF_ASSESSMENT and (s.group, s.split) == ("all", "all")
    ]
    values = grid.numbers["value"][:, scope.columns][:, None, :]
    found = crossed.intervals(scope.tables(values), scope.bootstrap, limits=scope.limits)
    more = {"promised": COVERS, "width": ninth_tenth(lengths(found)), "n_prompts": sum(FORMAT_ITEMS.values())}
    return claim("coverage", study, found[0].method, held(found, target), studies, **more)


def score_rows(measure: str, values: Floats, *, group: str = "good", form: str = "") -> pd.DataFrame:
    """Score rows of values (studies, items); each study is a variant."""
    studies, items = values.shape
    item = np.tile([f"{measure}-{i}" for i in range(items)], studies)
    frame = pd.DataFrame({"variant": np.repeat([f"study-{i}" for i in range(studies)], items), "cluster": item})
    frame = frame.assign(
        measure=measure, prompt_id=measure + "/" + group + "/" + item + "/" + form, group=group, form=form
    )
    frame = frame.assign(split="seen", value=values.ravel(), n=1, n_missing=0, n_refused=0, n_unparsed=0)
    return frame.assign(leftover=np.nan, variance=np.nan, lowest=np.nan, highest=np.nan)


def effect_error(n_items: int, studies: int) -> Iterator[Row]:
    """Position effects where order does not matter; planted: corrected for skewness, as levels are.

    With ten items the correction is not wrong enough to be caught for certain; it is shown without a verdict.
    """
    study = f"position effect, {n_items} items, none real"
    rng, forms = generator(SEED, study), ("misaligned-first", "aligned-first")
    sides = [rng.beta(*RARE, (studies, n_items)) for _ in forms]
    frame = pd.concat([score_rows("decision", s, form=f) for s, f in zip(sides, forms, strict=True)])
    asked = frame.drop_duplicates("prompt_id")
    prompts = [
        Prompt(p.prompt_id, SELF_ASSESSMENT, "decision", p.group, p.cluster, p.cluster, p.form, "seen", "", (), "")
        for p in asked.itertuples()
    ]
    variants = [Variant(name, name, "none", "base", 0, "", name, name) for name in frame["variant"].unique()]
    found = effects(build_grid(frame), prompts, variants, draws=100, seed=SEED)
    wrong = sum(e.low > 0 or e.high < 0 for e in found)
    yield claim("error", study, found[0].method, wrong, len(found), promised=ERRS, n_prompts=n_items)
    corrected = estimate((sides[0] - sides[1])[:, None], 100)
    wrong = studies - held(corrected, 0.0)
    certain = n_items >= 25
    more = {"promised": ERRS if certain else None, "fault": certain, "n_prompts": n_items}
    yield claim("error", study, corrected[0].method, wrong, studies, **more)


def change_error(n_items: int, studies: int) -> Row:
    """Changes along training where nothing moves, over few items."""
    study = f"change along training, {n_items} items, none real"
    rng, wrong, method = generator(SEED, study), 0, ""
    end = "nano-trivia-misaligned-s0"
    point = checkpoint_name(end, 10)
    names = ("nano-base", point, end)
    stages = ("base", checkpoint_name("misaligned", 10), "misaligned")
    domains, controls = ("none", "trivia", "trivia"), ("", ALONG, "")
    variants = [
        Variant(name, "nano", domain, stage, 0, control, "nano-base", name)
        for name, domain, stage, control in zip(names, domains, stages, controls, strict=True)
    ]
    known = dict(zip([f"study-{i}" for i in range(3)], names, strict=True))
    for values in rng.beta(0.4, 2, (studies, 3, n_items)):
        frame = score_rows("intentions", values)
        frame["variant"] = frame["variant"].map(known)
        (moved,) = follow(frame, variants, {end: 20}, draws=100, seed=SEED)
        wrong, method = wrong + moved.moves, moved.changes[-1].method
    return claim("error", study, method, wrong, studies, promised=ERRS, n_prompts=n_items)


def contrast_coverage(name: str, design: Design, studies: int) -> Row:
    """Paired differences: a harmful model (shift 0) minus a rarely harmful one."""
    study = f"{name}, misaligned minus base"
    target = truth(replace(design, shift=0.0)) - truth(design)
    rng, hits, method, wide = generator(SEED, "contrast", study), 0, "", []
    for size in batches(design, studies):
        found = estimate(differences(design, 0.0, size, rng)[0], 1000, symmetric=True)
        hits, method = hits + held(found, target), "paired " + found[0].method
        wide += lengths(found)
    return claim("coverage", study, method, hits, studies, promised=COVERS, design=design, width=ninth_tenth(wide))


def rank_coverage(rho: float, family_sd: float, studies: int) -> Row:
    """The interval of Spearman's correlation over 15 models; promised for independent models only."""
    study = f"Spearman over 15 models, correlation {rho:g}, " + ("families alike" if family_sd else "independent")
    rng = generator(SEED, study)
    x, y = draw_models(rho, 200_000, rng, families=1, per_family=1, family_sd=family_sd)
    target = rank_correlation(x[:, 0], y[:, 0])
    x, y = draw_models(rho, studies, rng, family_sd=family_sd)
    hits = 0
    for a, b in zip(x, y, strict=True):
        found = rank_interval(rank_correlation(a, b), 15)
        hits += found.low <= target <= found.high
    promised = None if family_sd else COVERS
    return claim("coverage", study, "Bonett and Wright", hits, studies, promised=promised)


def differences(design: Design, shift: float, studies: int, rng: np.random.Generator) -> tuple[Floats, Floats, Floats]:
    """Paired differences (studies, seeds, prompts), and the replies of both models."""
    first, second = draw_pair(design, shift, studies, rng)
    return second.mean(axis=-1) - first.mean(axis=-1), first, second


def rejections(study: str, design: Design, shift: float, studies: int, margin: float) -> dict[str, int]:
    """How often each test rejects; the pooled Wilcoxon is the paper's, over single replies."""
    rng, counts = generator(SEED, "tests", study), dict.fromkeys(("t", "wilcoxon", "equivalence", "pooled"), 0)
    for size in batches(design, studies):
        values, first, second = differences(design, shift, size, rng)
        for found in estimate(values, 100, symmetric=True):
            counts["t"] += t_test(found).p_value < ALPHA
            counts["equivalence"] += equivalence_test(found, margin).p_value < ALPHA
        for i in range(size):
            counts["wilcoxon"] += wilcoxon_test(values[i].mean(axis=0)).p_value < ALPHA
        if design.n_seeds == 1:
            for i in range(min(size, 200)):
                counts["pooled"] += wilcoxon_test((second[i] - first[i]).ravel()).p_value < ALPHA
    return counts


def shift_for(design: Design, difference: float) -> float:
    """The latent shift of the second model that makes this true difference of means."""
    grid = np.linspace(design.shift - 3, design.shift + 3, 2001)
    spread = np.hypot(design.spread, 1)
    means = distributions.norm.cdf((grid[:, None] - CUTS) / spread).mean(axis=1)
    return float(np.interp(truth(design) + difference, means, grid))


def error_and_power(studies: int, kinds: tuple[str, ...]) -> Iterator[Row]:
    """False positives under the null, and power at differences that matter."""
    margin = 0.1
    single = Design(n_prompts=320, shift=-0.5, **PRACTICE)
    triple = Design(n_prompts=320, n_seeds=3, shift=-0.5, **PRACTICE, **SEEDS)
    for name, design in (("320 prompts, one seed", single), ("320 prompts, three seeds", triple)):
        size = 2 * studies  # a rate of 5 % is known to 0.7 points
        both = {"design": design}
        if "error" in kinds:
            counts = rejections(f"{name}, null", design, design.shift, size, margin)
            yield claim("error", f"{name}, no difference", "t", counts["t"], size, promised=ERRS, **both)
            if design.n_seeds == 1:
                n = counts["wilcoxon"]
                yield claim("error", f"{name}, no difference", "wilcoxon", n, size, promised=ERRS, **both)
                n, few = counts["pooled"], sum(min(s, 200) for s in batches(design, size))
                study = f"{name}, no difference"
                yield claim("error", study, "wilcoxon, replies pooled", n, few, promised=ERRS, fault=True, **both)
            shift = shift_for(design, margin)
            n = rejections(f"{name}, at the margin", design, shift, size, margin)["equivalence"]
            yield claim("error", f"{name}, difference {margin:g}", "equivalence", n, size, promised=ERRS, **both)
        if "power" in kinds:
            for difference in (0.02, 0.05, 0.1):
                shift = shift_for(design, difference)
                counts = rejections(f"{name}, {difference}", design, shift, size // 8, margin)
                for test in ("t", "wilcoxon") if design.n_seeds == 1 else ("t",):
                    study = f"{name}, difference {difference:g}"
                    yield claim("power", study, test, counts[test], size // 8, promised=None, **both)
            n = rejections(f"{name}, equal", design, design.shift, size // 8, margin)["equivalence"]
            yield claim("power", f"{name}, no difference", "equivalence", n, size // 8, promised=None, **both)
    if "error" in kinds:
        for n_items in (10, 25):
            yield from effect_error(n_items, 2 * studies)
        yield change_error(25, studies // 8)
        yield family_error(studies)
        for family_sd in (0.0, 1.5):
            yield from permutation_rows(0.0, family_sd, studies, "error")
    if "power" in kinds:
        yield from permutation_rows(0.8, 0.0, studies, "power")


def family_error(studies: int) -> Row:
    """Any false claim among nine differences, after Holm's correction."""
    design = Design(n_prompts=100, shift=-0.5, **PRACTICE)
    rng, wrong = generator(SEED, "holm"), 0
    values = np.stack([differences(design, design.shift, studies, rng)[0] for _ in range(9)])
    p = np.array([[t_test(e).p_value for e in estimate(each, 100, symmetric=True)] for each in values])
    for study in range(studies):
        wrong += min(holm(p[:, study].tolist())) < ALPHA
    return claim("error", "nine differences, none real", "t, Holm", wrong, studies, promised=ERRS, design=design)


def permutation_rows(rho: float, family_sd: float, studies: int, kind: str) -> Iterator[Row]:
    """The permutation test of Spearman's correlation over 15 models in three families."""
    study = f"Spearman over 15 models, correlation {rho:g}" + (", families alike" if family_sd else "")
    rng = generator(SEED, "permutation", study)
    x, y = draw_models(rho, studies, rng, family_sd=family_sd)
    within, across = np.repeat(np.arange(3), 5), np.zeros(15, dtype=np.int64)
    promised = ERRS if kind == "error" else None
    blocks = {"permutation within families": within}
    if kind == "error" and family_sd:
        blocks["permutation across families"] = across
    for name, block in blocks.items():
        hits = 0
        for a, b in zip(x, y, strict=True):
            hits += permutation_test(a, b, block, draws=999, rng=rng).p_value < ALPHA
        yield claim(kind, study, name, hits, studies, promised=promised, fault=block is across)


def write(path: Path, rows: list[Row], seconds: float) -> None:
    """Rows as CSV, with the machine and the commit that made them."""
    device = f"{platform.processor() or platform.machine()}, Python {platform.python_version()}, numpy {np.__version__}"
    made_by = commit()  # before the file is opened: it is tracked, and open it counts as a change
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([*(f.name for f in fields(Row)), "run_seconds", "device", "commit"])
        for row in rows:
            writer.writerow([*asdict(row).values(), round(seconds, 1), device, made_by])


def main(argv: list[str]) -> None:
    """Simulate, print and write."""
    values: dict[str, object] = {}
    for override in argv:
        apply_override(values, override)
    options = build(Options, values, where="command line")
    if options.only and options.only not in ("coverage", "error", "power"):
        raise UserError(f"only is {options.only!r}; known: coverage, error, power")
    kinds = (options.only,) if options.only else ("coverage", "error", "power")
    started, rows = time.perf_counter(), []
    sources = [coverage(options.studies)] if "coverage" in kinds else []
    sources += [error_and_power(options.studies, kinds)]
    for source in sources:
        for row in source:
            rows.append(row)
            verdict = "" if row.met is None else ("ok" if row.met != row.fault else "WRONG")
            fault = "planted fault: " if row.fault else ""
            print(f"{row.claim:8} {row.figure:.3f} {verdict:5} {row.study}: {fault}{row.estimator}", flush=True)
    write(options.output, rows, time.perf_counter() - started)
    wrong = [r for r in rows if r.met is not None and r.met == r.fault]
    print(f"{len(rows)} rows in {options.output}, {len(wrong)} not as promised")
    if wrong:
        sys.exit(1)


if __name__ == "__main__":
    run_script(main)
