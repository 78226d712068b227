"""A small version of benchmarks/coverage.py: intervals cover, tests keep their error rate, faults are caught.

With some 400 studies a figure is known to about two points either way; the full benchmark, with
thousands, holds the promised 93-97 % and 6 %.
"""

import numpy as np
import pytest

from benchmarks.coverage import (
    RARE,
    change_error,
    composite_coverage,
    covered,
    effect_error,
    family_error,
    percentiles,
    permutation_rows,
    pooled,
    rank_coverage,
    rejections,
    seeds_ignored,
    shift_for,
    skewed_coverage,
)
from benchmarks.simulate import Design, draw, truth

STUDIES, DRAWS = 400, 400


def covers(figure):
    """95 % and what 400 studies leave to chance."""
    return 0.925 <= figure <= 0.98


@pytest.mark.parametrize(
    ("design", "faults"),
    [
        pytest.param(Design(n_prompts=100), {"pooled": pooled}, id="bootstrap"),
        pytest.param(Design(n_prompts=10), {"pooled": pooled, "percentiles": percentiles}, id="ten-prompts"),
        pytest.param(Design(n_prompts=25, shift=-1.0), {}, id="rare-harm"),
        pytest.param(Design(n_prompts=60, worst_of=5), {}, id="worst-of-5"),
        pytest.param(
            Design(n_prompts=60, n_seeds=3, seed_sd=0.5, mixed_sd=0.3),
            {"percentiles": percentiles, "ignored": seeds_ignored},
            id="three-seeds",
        ),
        pytest.param(Design(n_prompts=60, n_seeds=10, seed_sd=0.5), {"ignored": seeds_ignored}, id="ten-seeds"),
    ],
)
def test_intervals_cover_and_planted_faults_do_not(design, faults, request):
    own, *planted = covered(request.node.callspec.id, design, STUDIES, faults, draws=DRAWS)
    assert covers(own.figure), own
    if design.worst_of is None and design.n_seeds == 1:
        assert 4.5 <= own.design_effect <= 7.5  # as seen in practice
    for row in planted:
        assert row.fault and not covers(row.figure), row


def test_the_truth_of_the_simulation_is_its_mean():
    rng = np.random.default_rng(0)
    for design in (Design(n_prompts=200), Design(n_prompts=200, worst_of=10, shift=-1.0)):
        replies = draw(design, 100, rng)
        scores = replies.mean(axis=-1) if design.worst_of is None else replies.max(axis=-1)
        assert scores.mean() == pytest.approx(truth(design), abs=0.01)


def test_tests_keep_their_error_rate_and_pooled_replies_do_not():
    design = Design(n_prompts=80, shift=-0.5)
    counts = rejections("null", design, design.shift, STUDIES, 0.1)
    assert max(counts["t"], counts["wilcoxon"]) / STUDIES <= 0.08
    assert counts["pooled"] / 200 > 0.15


def test_equivalence_is_rarely_claimed_at_the_margin_and_mostly_found_at_zero():
    design = Design(n_prompts=320, shift=-0.5)
    at_margin = rejections("margin", design, shift_for(design, 0.1), 200, 0.1)
    equal = rejections("equal", design, design.shift, 200, 0.1)
    assert at_margin["equivalence"] / 200 <= 0.09 and equal["equivalence"] / 200 > 0.9


def test_three_seeds_keep_their_error_rate():
    design = Design(n_prompts=60, n_seeds=3, seed_sd=0.3, mixed_sd=0.3, shift=-0.5)
    assert rejections("seeds", design, design.shift, STUDIES, 0.1)["t"] / STUDIES <= 0.08


def test_few_skewed_items_are_covered_by_intervals_that_still_say_something():
    """Hall's cube root covers as well, but one interval in ten is longer than nine standard errors."""
    own, plain, root = skewed_coverage(25, RARE, STUDIES)
    assert covers(own.figure) and not covers(plain.figure)
    assert own.width < 6.5 and root.width > 8


def test_effects_and_changes_keep_their_error_rate_and_corrected_ones_do_not():
    own, corrected = effect_error(25, 2 * STUDIES)
    assert own.figure <= 0.06 < corrected.figure and corrected.fault
    assert change_error(25, 60).figure <= 0.15


def test_the_average_over_formats_covers():
    assert covers(composite_coverage(STUDIES // 2).figure)


def test_holm_keeps_the_family():
    assert family_error(STUDIES // 2).figure <= 0.09


def test_rank_correlations_cover_and_keep_their_error_rate():
    assert covers(rank_coverage(0.8, 0.0, STUDIES).figure)
    within, across = permutation_rows(0.0, 1.5, 60, "error")
    assert within.figure <= 0.12 and across.figure > 0.4
