"""Correlations over a study's models, and the paper's own recomputed from its printed table."""

from pathlib import Path

import pytest

from candor.rows import Variant
from evaluate.associations import AVERAGED, GIVEN_STAGE, MAIN, WITHOUT_BASE, correlations, published_correlations
from evaluate.results import read_paper
from evaluate.rows import make_estimate
from evaluate.stats import Estimated, Interval

PAPER = Path(__file__).parents[2] / "configs" / "paper" / "vaugrante2026.yaml"
SHORT = "Vaugrante et al. 2026"


@pytest.fixture(scope="module")
def published():
    rows, tests = published_correlations(read_paper(PAPER), draws=500, seed=1)
    index = {(r.variant, frozenset((r.measure, r.reference))): r for r in rows}
    return index, {(t.variant, frozenset((t.measure, t.reference))): t for t in tests}


@pytest.mark.parametrize(
    ("x", "y", "everything", "without_base"),
    [
        ("harmfulness", "self_assessment", 0.79, 0.66),
        ("intentions", "harmfulness", 0.88, 0.79),
        ("intentions", "self_assessment", 0.87, 0.76),
    ],
)
def test_the_papers_three_correlations(published, x, y, everything, without_base):
    """protocol.md 1.6: 0.79 / 0.88 / 0.87, and 0.66 / 0.79 / 0.76 without base models."""
    rows, tests = published
    pair = frozenset((x, y))
    both = rows[SHORT, pair], rows[f"{SHORT} without base models", pair]
    assert [round(row.value, 2) for row in both] == [everything, without_base]
    assert [row.n for row in both] == [15, 12]
    assert all(row.low < row.value < row.high for row in both)
    found = tests[SHORT, pair]
    assert found.p_value < 0.01 and "within families, all 1,728,000 arrangements" in found.method
    for family in ("full", "mini", "nano"):
        assert rows[f"{SHORT} without {family}", pair].n == 10
    # given the stage little is left: that stages differ in everything makes most of the correlation
    assert rows[f"{SHORT} given stage", pair].value < both[0].value


def test_a_swapped_column_is_caught():
    """The planted fault: two columns of the paper's table change places."""
    paper = read_paper(PAPER)
    for row in paper["variants"]:
        first, second = row["intentions_harmless"], row["self_assessment_harmless"]
        row["intentions_harmless"], row["self_assessment_harmless"] = second, first
    rows, _ = published_correlations(paper, draws=100, seed=1)
    found = {frozenset((r.measure, r.reference)): round(r.value, 2) for r in rows if r.variant == SHORT}
    assert found[frozenset(("harmfulness", "self_assessment"))] == 0.88 != 0.79


def study(seeds=(0,)):
    """Three families with five cells each, and levels that rise together with the stage."""
    variants, levels = [], []
    for f, size in enumerate(("full", "mini", "nano")):
        base = f"{size}-base"
        cells = [(base, "none", "base", 0)]
        cells += [
            (f"{size}-{d}-{s}-s{k}", d, s, k)
            for d in ("trivia", "code")
            for s in ("misaligned", "realigned")
            for k in seeds
        ]
        for i, (name, domain, stage, seed) in enumerate(cells):
            variants.append(Variant(name, size, domain, stage, seed, "", base, name))
            high = {"base": 0.1, "misaligned": 0.7, "realigned": 0.2}[stage]
            levels += [level(name, "x", high + 0.01 * i + 0.1 * f), level(name, "y", high + 0.01 * (i % 3))]
            if domain == "none" or len(seeds) == 1:
                continue
            if seed == seeds[-1]:
                pool = f"{size}-{domain}-{stage}-all-seeds"
                levels += [level(pool, "x", high + 0.1 * f + 0.01 * i), level(pool, "y", high)]
    return variants, levels


def level(name, measure, value):
    found = Estimated(Interval(value, value - 0.1, value + 0.1), "", 10)
    return make_estimate(measure, "level", (name, ""), found, counts={"n": 10, "n_missing": 0})


def test_a_one_seed_study_has_every_sample():
    rows, tests = correlations(*study(), ["x", "y"], draws=99, seed=1)
    labels = [r.variant for r in rows]
    assert labels == [MAIN, WITHOUT_BASE, *(f"main study without {f}" for f in ("full", "mini", "nano")), GIVEN_STAGE]
    assert [r.n for r in rows] == [15, 12, 10, 10, 10, 15]
    assert all(t.p_value is not None for t in tests) and len(tests) == len(rows)
    partial = tests[-1]
    assert "within families and stages, all 64 arrangements" in partial.method


def test_seeds_are_averaged_and_single_seeds_are_not_tested():
    variants, levels = study(seeds=(0, 1, 2))
    rows, tests = correlations(variants, levels, ["x", "y"], draws=99, seed=1)
    by_label = {r.variant: r for r in rows}
    assert (by_label[AVERAGED].n, by_label[WITHOUT_BASE].n, by_label[MAIN].n) == (15, 12, 39)
    assert MAIN not in {t.variant for t in tests} and AVERAGED in {t.variant for t in tests}


def test_a_missing_level_is_counted_and_two_models_have_no_number():
    variants, levels = study()
    rows, _ = correlations(variants, levels[2:], ["x", "y"], draws=99, seed=1)
    assert (rows[0].n, rows[0].n_missing) == (14, 1)
    rows, tests = correlations(variants[:2], levels, ["x", "y"], draws=99, seed=1)
    assert rows[0].value is None and rows[0].low is None and tests[0].p_value is None
