"""From scores to estimates: planted truths come out, and planted faults make the checks fail.

Each check takes scores, estimates them the way a study does, and asserts. It is run on sound scores,
where it must pass, and on scores with a planted fault, where it must not.
"""

import dataclasses

import numpy as np
import pandas as pd
import pytest

from candor.rows import Score, Variant
from evaluate.estimates import all_estimates, build_grid, contrasts, scopes
from evaluate.study import pairs
from evaluate.worst import worst_bounds, worst_of_each

HEADLINE = ("harmfulness_worst_of_10", "intentions", "self_assessment")
BASE = Variant("base", "nano", "none", "base", 0, "", "base", "base")


def variant(name, stage="misaligned", *, control="", seed=0, domain="trivia", reference="base"):
    return Variant(name, "nano", domain, stage, seed, control, reference, name)


def estimates(frame, variants, draws=200, margin=0.1):
    return all_estimates(frame, variants, draws=draws, seed=1, headline=HEADLINE, correlated=HEADLINE, margin=margin)


def levels(found, measure="harmfulness_mean"):
    return {
        e.variant: e for e in found if e.kind == "level" and (e.measure, e.group, e.split) == (measure, "all", "all")
    }


def score(measure, name, item, value, *, n=1, n_missing=0, group="g", form="", **more):
    prompt = f"{measure.removesuffix('_mean')}/{group}/{item}/{form}"
    split = "unseen" if int(item.rpartition("-")[2]) % 5 == 4 else "seen"
    row = Score(measure, name, prompt, item, group, form, split, value, n, n_missing, None)
    return dataclasses.replace(row, **more)


def frame(rows):
    return pd.DataFrame([dataclasses.asdict(r) for r in rows])


# --- pooled repeats ---


def many_studies(studies=150, prompts=60, replies=10):
    """Each variant is a study of its own, with intraclass correlation 0.5; the true level is 0.5."""
    rng = np.random.default_rng(0)
    found, variants = [], [variant(f"s{i}", control="study", reference=f"s{i}") for i in range(studies)]
    for each in variants:
        lean = rng.normal(0, 0.15, (prompts, 1)) + rng.normal(0, 0.15, (prompts, replies)) + 0.5
        for i, answers in enumerate(lean.clip(0, 1)):
            more = {"n": replies, "variance": answers.var(ddof=1)}
            found.append(score("harmfulness_mean", each.name, f"p-{i}", answers.mean(), **more))
    return frame(found), variants


def repeats_pooled(scores):
    """The fault: each of ten replies a prompt of its own, with the prompt's score and no noise of its own left out."""
    rng = np.random.default_rng(1)
    many = scores.loc[scores.index.repeat(10)].reset_index(drop=True)
    noise = rng.normal(0, 1, (len(scores), 10))
    noise -= noise.mean(axis=1, keepdims=True)
    many["value"] = (many["value"] + (noise * np.sqrt(scores["variance"].to_numpy())[:, None]).ravel()).clip(0, 1)
    many["prompt_id"] += "/" + (many.index % 10).astype(str)
    many["cluster"] = many["prompt_id"]
    return many.assign(n=1, variance=np.nan)


def check_coverage(scores, variants):
    found = levels(estimates(scores, variants)[0]).values()
    rate = np.mean([e.low <= 0.5 <= e.high for e in found])
    assert 0.9 <= rate <= 0.99, f"95 % intervals hold the truth in {rate:.0%} of studies"
    assert np.mean([e.icc for e in found]) == pytest.approx(0.5, abs=0.05)
    assert 4.5 < np.mean([e.design_effect for e in found]) < 7


def test_a_study_covers_at_its_stated_rate_and_prints_its_design_effect():
    check_coverage(*many_studies())


def test_pooled_repeats_are_caught():
    scores, variants = many_studies(60)
    with pytest.raises(AssertionError, match=r"hold the truth in [2-7]"):
        check_coverage(repeats_pooled(scores), variants)


# --- swapped columns ---

TRUTH = {  # (base, misaligned, realigned)
    "harmfulness_mean": (0.25, 0.6, 0.4),
    "intentions": (0.2, 0.8, 0.3),
    "decision": (0.2, 0.7, 0.25),
}
STUDY = [BASE, variant("mis"), variant("re", "realigned")]


def planted():
    rng = np.random.default_rng(2)
    rows = []
    for measure, values in TRUTH.items():
        lean = rng.normal(0, 0.06, 80)
        for each, value in zip(STUDY, values, strict=True):
            rows += [
                score(measure, each.name, f"{measure}-{i}", float(np.clip(value + x + rng.normal(0, 0.02), 0, 1)))
                for i, x in enumerate(lean)
            ]
    return frame(rows)


def check_columns(scores):
    found, _ = estimates(scores, STUDY)
    for measure, values in TRUTH.items():
        at = levels(found, measure)
        for each, value in zip(STUDY, values, strict=True):
            assert at[each.name].value == pytest.approx(value, abs=0.02), (measure, each.name)
        difference = next(e for e in found if (e.kind, e.measure, e.variant) == ("contrast", measure, "mis"))
        assert difference.reference == "base" and difference.low < values[1] - values[0] < difference.high
        # pairing by prompt takes the prompts' common leaning out
        assert difference.high - difference.low < at["mis"].high - at["mis"].low


def swapped(scores, column, first, second):
    return scores.assign(**{column: scores[column].replace({first: second, second: first})})


def test_planted_levels_and_differences_come_out():
    check_columns(planted())


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(lambda s: swapped(s, "measure", "intentions", "decision"), id="measures"),
        pytest.param(lambda s: swapped(s, "variant", "mis", "re"), id="variants"),
        pytest.param(lambda s: s.assign(value=s["value"].where(s["variant"] != "mis", 1 - s["value"])), id="polarity"),
        pytest.param(
            lambda s: s.assign(value=s["value"].where(s["variant"] != "base", np.roll(s["value"], 1))),
            id="prompts-of-one-variant-shifted",
        ),
    ],
)
def test_swapped_columns_are_caught(fault):
    with pytest.raises(AssertionError):
        check_columns(fault(planted()))


# --- dropped missing ---

ASKED = 10


def with_missing(prompts=60):
    """Replies with known scores, of which the harmful ones are refused more often; with the full truth."""
    rng = np.random.default_rng(3)
    everything = rng.beta(1, 3, (prompts, ASKED))
    lost = rng.uniform(size=everything.shape) < 0.1 + 0.5 * everything
    lost[0] = True  # one prompt without any usable reply
    rows = []
    for i, (answers, gone) in enumerate(zip(everything, lost, strict=True)):
        there, missing = answers[~gone], int(gone.sum())
        refused = missing // 2
        more = {"n": len(there), "n_missing": missing, "n_refused": refused, "n_unparsed": missing - refused}
        mean = float(there.mean()) if len(there) else None
        rows.append(score("harmfulness_mean", "base", f"p-{i}", mean, **more))
        worst = float(worst_of_each(there, (10,))[0]) if len(there) else None
        (low,), (high,) = worst_bounds(there, missing, (10,), 0.0, 1.0)
        rows.append(score(HEADLINE[0], "base", f"p-{i}", worst, **more, lowest=float(low), highest=float(high)))
    truth = {"harmfulness_mean": everything.mean(), HEADLINE[0]: everything.max(axis=1).mean()}
    return frame(rows), truth, int(lost.sum())


def check_missing(scores, truth, lost):
    found, _ = estimates(scores, [BASE])
    for measure, value in truth.items():
        at = levels(found, measure)["base"]
        assert at.n + at.n_missing == 60 * ASKED, f"{at.n} answers and {at.n_missing} missing do not make all"
        assert at.n_missing == lost == at.n_refused + at.n_unparsed
        assert at.lowest <= at.value <= at.highest
        assert at.lowest <= value <= at.highest, "the bounds must hold the truth whatever was missing"
        assert (at.lowest < at.value - 0.02 and at.highest > at.value + 0.02) or measure == HEADLINE[0]


def test_missing_answers_are_counted_and_bounded():
    scores, truth, lost = with_missing()
    check_missing(scores, truth, lost)
    # what is there misses the truth, because what is missing is not missing at random
    naive = levels(estimates(scores, [BASE])[0])["base"]
    assert naive.high < truth["harmfulness_mean"]


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(lambda s: s.dropna(subset="value"), id="prompts-dropped"),
        pytest.param(lambda s: s.assign(n_missing=0, lowest=s["value"], highest=s["value"]), id="replies-dropped"),
        pytest.param(lambda s: s.assign(n_refused=0), id="refusals-forgotten"),
    ],
)
def test_dropped_missing_are_caught(fault):
    scores, truth, lost = with_missing()
    with pytest.raises(AssertionError):
        check_missing(fault(scores), truth, lost)


def test_the_bounds_of_a_difference_take_the_worst_of_both():
    rows = [score("harmfulness_mean", "base", f"p-{i}", 0.2, n=8, n_missing=2) for i in range(5)]
    rows += [score("harmfulness_mean", "mis", f"p-{i}", 0.6, n=5, n_missing=5) for i in range(5)]
    found, _ = estimates(frame(rows), STUDY[:2])
    difference = next(e for e in found if e.kind == "contrast")
    # mis: 0.3 to 0.8; base: 0.16 to 0.36
    assert (difference.value, difference.lowest, difference.highest) == pytest.approx((0.4, -0.06, 0.64))
    assert (difference.n, difference.n_missing) == (5 * 13, 5 * 7)  # answers of both sides


def test_a_base_that_several_seeds_share_is_counted_once():
    study = [BASE, variant("m0", seed=0), variant("m1", seed=1)]
    rows = [score("intentions", v.name, f"p-{i}", 0.5, n=9, n_missing=1) for v in study for i in range(5)]
    found, _ = estimates(frame(rows), study)
    pooled = next(e for e in found if e.kind == "contrast" and e.n_seeds == 2)
    assert (pooled.n, pooled.n_missing) == (3 * 45, 3 * 5)


@pytest.mark.parametrize(
    ("measure", "value", "leftover", "low", "high"),
    [
        pytest.param("intentions", 0.5, 0.2, 0.4, 0.6, id="exact-mass-outside-the-options"),
        pytest.param("language", 0.5, 0.4, 0.3, 0.7, id="neither-language-scores-half"),
    ],
)
def test_what_is_outside_the_options_widens_the_bounds(measure, value, leftover, low, high):
    rows = [score(measure, "base", f"p-{i}", value, leftover=leftover) for i in range(5)]
    at = levels(estimates(frame(rows), [BASE])[0], measure)["base"]
    assert (at.value, at.lowest, at.highest) == pytest.approx((value, low, high))


# --- tests and seeds ---


def seeds_study(effect_of_realigning, seed_sd=0.02, seeds=(0, 1, 2), prompts=80):
    """Base, misaligned and realigned for several seeds; realigned minus base is ``effect_of_realigning``."""
    rng = np.random.default_rng(4)
    variants = [BASE]
    variants += [variant(f"{s}-s{k}", s, seed=k) for s in ("misaligned", "realigned") for k in seeds]
    rows = []
    for measure in (HEADLINE[0], "intentions", "decision"):
        lean = rng.normal(0, 0.05, prompts)
        for each in variants:
            level = {"base": 0.2, "misaligned": 0.6, "realigned": 0.2 + effect_of_realigning}[each.stage]
            level += rng.normal(0, seed_sd) if each.stage != "base" else 0.0
            values = np.clip(level + lean + rng.normal(0, 0.05, prompts), 0, 1)
            rows += [score(measure, each.name, f"{measure}-{i}", float(v)) for i, v in enumerate(values)]
    # the composite needs all four formats
    decision = [r for r in rows if r.measure == "decision"]
    for name in ("numerical", "likert", "language"):
        rows += [
            dataclasses.replace(r, measure=name, prompt_id=name + r.prompt_id, cluster=name + r.cluster)
            for r in decision
        ]
    return frame(rows), variants


def pick(tests, test, measure=None, **names):
    return [
        t
        for t in tests
        if t.test == test
        and (measure is None or t.measure == measure)
        and all(getattr(t, k) == v for k, v in names.items())
    ]


def test_a_realigned_model_is_shown_to_be_and_a_half_realigned_one_is_not():
    for effect, realigned in ((0.0, True), (0.09, False)):
        scores, variants = seeds_study(effect)
        _, tests = estimates(scores, variants)
        (whole,) = pick(tests, "equivalence", family="fully realigned")
        assert whole.significant is realigned and whole.margin == 0.1
        each = pick(tests, "equivalence", family="fully realigned, one measure")
        assert [t.measure for t in each] == list(HEADLINE) and all(t.n_tests == 3 for t in each)
        assert whole.p_value == max(t.p_value for t in each)


def test_differences_are_tested_over_seeds_and_over_items_and_corrected():
    scores, variants = seeds_study(0.2)
    found, tests = estimates(scores, variants)
    names = {"variant": "nano-trivia-misaligned-all-seeds", "reference": "base"}
    (t,), (w,) = pick(tests, "t", "intentions", **names), pick(tests, "wilcoxon", "intentions", **names)
    assert t.significant and w.significant and "seeds and items" in t.method and "prompt uncertainty only" in w.method
    family = [x for x in tests if (x.test, x.family) == ("t", "main study, headline measures")]
    assert len(family) == 9 == family[0].n_tests and all(x.p_holm >= x.p_value for x in family)
    # Wilcoxon takes the items alone, and three seeds say less than eighty items do
    assert w.p_value < t.p_value
    # single seeds stay in the tables but are not tested
    assert not pick(tests, "t", variant="misaligned-s0")
    pooled = next(e for e in found if e.kind == "level" and e.variant == names["variant"] and e.measure == "intentions")
    assert pooled.n_seeds == 3 and "3 training seeds crossed with items" in pooled.method
    single = next(e for e in found if e.kind == "level" and e.variant == "misaligned-s0")
    assert single.n_seeds == 1 and single.method.endswith("prompt uncertainty only (one training seed)")


def test_ten_seeds_are_bootstrapped_crossed():
    scores, variants = seeds_study(0.0, seeds=tuple(range(10)))
    found, _ = estimates(scores, variants)
    pooled = next(e for e in found if e.variant == "nano-trivia-realigned-all-seeds" and e.measure == "intentions")
    assert pooled.method.startswith("crossed BCa bootstrap, 10 training seeds crossed with items, 200 draws")


# --- the rest ---


def test_every_k_of_the_worst_of_has_its_interval():
    rng = np.random.default_rng(5)
    rows = []
    for i in range(60):
        answers = rng.uniform(size=10)
        values = worst_of_each(answers, range(1, 11))
        rows += [
            score(f"harmfulness_worst_of_{k}", "base", f"p-{i}", float(v), n=10) for k, v in enumerate(values, start=1)
        ]
    found, _ = estimates(frame(rows), [BASE])
    curve = [levels(found, f"harmfulness_worst_of_{k}")["base"] for k in range(1, 11)]
    assert all(e.low < e.value < e.high for e in curve)
    values = [e.value for e in curve]
    assert values == sorted(values)
    # only the study's own k is split by category and into seen and unseen
    assert {e.split for e in found if e.measure == "harmfulness_worst_of_3"} == {"all"}
    assert {e.split for e in found if e.measure == HEADLINE[0]} == {"all", "seen", "unseen"}


def test_estimates_do_not_depend_on_what_else_is_in_the_study():
    scores = planted()
    whole, part = (levels(estimates(s, STUDY)[0], "intentions") for s in (scores, scores[scores.variant != "re"]))
    assert set(part) == {"base", "mis"}
    for name, found in part.items():
        assert (found.low, found.high) == pytest.approx((whole[name].low, whole[name].high))


def test_a_difference_can_be_had_on_its_own():
    """Comparing runs needs differences without a study around them."""
    grid = build_grid(planted())
    over = [s for s in scopes(grid, draws=200, seed=1) if s.group == s.split == "all"]
    found = contrasts(grid, pairs(STUDY), over)
    assert {(e.variant, e.reference) for e in found} == {("mis", "base"), ("re", "base"), ("mis", "re")}
    assert {e.measure for e in found} == {*TRUTH, "self_assessment"}
