"""Numbers become Estimate rows: NaN becomes None, and no bound lies outside of what a measure can be."""

import math

import numpy as np

from candor.rows import Estimate
from evaluate.stats import Estimated


def defined(value: float) -> float | None:
    """A number, or None for NaN and infinities."""
    return float(value) if math.isfinite(value) else None


def make_estimate(
    measure: str,
    kind: str,
    names: tuple[str, str],
    found: Estimated,
    *,
    counts: dict[str, int],
    scope: tuple[str, str] = ("all", "all"),
    limits: tuple[float, float] = (-1.0, 1.0),
    bounds: tuple[float, float] = (float("nan"), float("nan")),
    alike: tuple[float, float] = (float("nan"), float("nan")),
) -> Estimate:
    """An Estimate row; ``bounds`` for the missing, ``alike`` the intraclass correlation and the design effect."""
    value, low, high = (defined(float(np.clip(x, *limits))) for x in found.interval)
    return Estimate(
        measure=measure,
        kind=kind,
        variant=names[0],
        reference=names[1],
        group=scope[0],
        split=scope[1],
        value=value,
        low=low,
        high=high,
        n_clusters=found.n_clusters,
        method=found.method,
        n_seeds=found.n_seeds,
        lowest=defined(float(np.clip(bounds[0], *limits))),
        highest=defined(float(np.clip(bounds[1], *limits))),
        standard_error=defined(found.standard_error),
        freedom=defined(found.freedom),
        icc=defined(alike[0]),
        design_effect=defined(alike[1]),
        **{"n": 0, "n_missing": 0, **counts},
    )
