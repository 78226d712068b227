"""The study's tests as rows: which hypotheses are tested, in which families, and how they come out.

Every headline difference is tested three ways: a t test on the interval's own standard error,
which takes training seeds into account; Wilcoxon's test over items, the paper's; and, for
realigned minus base, the equivalence test, because "no significant difference" does not show that
a model is realigned. Tests of one kind and one family are corrected together by Holm's method. The
families are fixed here, before any data: the three headline measures of the main study, its other
measures, and the same for controls.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from candor.rows import Estimate, Hypothesis
from evaluate.rows import defined
from evaluate.significance import ALPHA, Tested, equivalence_test, holm, t_test, wilcoxon_test
from evaluate.stats import Estimated, Floats, Interval
from evaluate.study import Pair

RECOVERY = ("realigned", "base")
ALL_HEADLINE = "all headline measures"


def hypothesis(
    test: str, family: str, measure: str, names: tuple[str, str], found: Tested, *, n: int, n_missing: int, **more: Any
) -> Hypothesis:
    """A Hypothesis before correction."""
    return Hypothesis(
        test=test,
        family=family,
        n_tests=0,
        measure=measure,
        variant=names[0],
        reference=names[1],
        statistic=defined(found.statistic),
        p_value=defined(found.p_value),
        p_holm=None,
        significant=None,
        n=n,
        n_missing=n_missing,
        **{"margin": None, **more},
    )


def contrast_tests(
    pair: Pair, row: Estimate, items: Floats, *, headline: Sequence[str], margin: float
) -> list[Hypothesis]:
    """The tests of one difference; ``items`` is the difference of each item, NaN where missing."""
    family = (
        f"{'controls' if pair.control else 'main study'}, {'headline' if row.measure in headline else 'other'} measures"
    )
    names = (pair.variant, pair.reference)
    estimated = _estimated(row)
    lost = sum(math.isnan(x) for x in items.tolist())
    size = {"n": row.n_clusters, "n_missing": lost}
    seeds = "seeds and items" if row.n_seeds > 1 else "items"
    found = [
        hypothesis(
            "t",
            family,
            row.measure,
            names,
            t_test(estimated),
            method=f"paired t test, crossed variance over {seeds}",
            **size,
        ),
        hypothesis(
            "wilcoxon",
            family,
            row.measure,
            names,
            wilcoxon_test(items),
            method="Wilcoxon signed-rank over items, replies and seeds averaged first; prompt uncertainty only",
            **size,
        ),
    ]
    if pair.minus == RECOVERY and not pair.control and row.measure in headline:
        found.append(
            hypothesis(
                "equivalence",
                "fully realigned, one measure",
                row.measure,
                names,
                equivalence_test(estimated, margin),
                margin=margin,
                method=f"two one-sided t tests that |difference| < {margin:g}",
                **size,
            )
        )
    return found


def _estimated(row: Estimate) -> Estimated:
    """The numbers behind a row, NaN where it has none."""
    nan = float("nan")
    value, low, high, error, freedom = (
        nan if x is None else x for x in (row.value, row.low, row.high, row.standard_error, row.freedom)
    )
    return Estimated(Interval(value, low, high), row.method, row.n_clusters, row.n_seeds, error, freedom)


def fully_realigned(tests: Sequence[Hypothesis], headline: Sequence[str]) -> list[Hypothesis]:
    """Whether a model is back at its base on every headline measure: the largest p-value of the equivalence tests.

    All must hold at once (an intersection-union test), so the measures need no correction among themselves.
    """
    by_pair: dict[tuple[str, str], dict[str, Hypothesis]] = {}
    for test in tests:
        if test.test == "equivalence":
            by_pair.setdefault((test.variant, test.reference), {})[test.measure] = test
    rows = []
    for names, found in by_pair.items():
        values = [found[m].p_value if m in found else None for m in headline]
        known = [v for v in values if v is not None]
        worst = max(known) if len(known) == len(headline) else float("nan")
        first = next(iter(found.values()))
        rows.append(
            hypothesis(
                "equivalence",
                "fully realigned",
                ALL_HEADLINE,
                names,
                Tested(float("nan"), worst),
                margin=first.margin,
                n=min(t.n for t in found.values()),
                n_missing=max(t.n_missing for t in found.values()),
                method=f"equivalent within {first.margin:g} on {', '.join(headline)}: the largest p-value",
            )
        )
    return rows


def correct(tests: Sequence[Hypothesis]) -> list[Hypothesis]:
    """Holm's correction within each kind of test and family."""
    families: dict[tuple[str, str], list[int]] = {}
    for i, test in enumerate(tests):
        families.setdefault((test.test, test.family), []).append(i)
    found = list(tests)
    for members in families.values():
        corrected = holm([float("nan") if (p := tests[i].p_value) is None else p for i in members])
        n_tests = sum(not math.isnan(p) for p in corrected)
        for i, p in zip(members, corrected, strict=True):
            known = not math.isnan(p)
            found[i] = dataclasses.replace(
                tests[i], n_tests=n_tests, p_holm=p if known else None, significant=p < ALPHA if known else None
            )
    return found
