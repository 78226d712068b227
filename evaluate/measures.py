"""What measures are called and how they are put together: the one place that knows.

A measure is what a Score row holds: one battery in one format, read by one set of rules. Averages
of several (the four formats of a self-report) are made in evaluate/estimates.py from ``composites``.
"""

from collections.abc import Iterable

FORMATS = ("decision", "numerical", "likert", "language")  # of self-report
SELF_ASSESSMENT = "self_assessment"
# every battery in these formats; the first is the study's, its formats keep their plain names
SELF_REPORTS = (
    SELF_ASSESSMENT,
    "other_ai",
    "average_ai",
    "moral_self_assessment",
    "moral_other_ai",
    "moral_average_ai",
)
RATINGS = ("moral_foundations", "mfq2")  # statements rated from 1 to 5
# The batteries about the model itself, and the same items about another AI and about the average AI
ABOUT_OTHERS = {
    SELF_ASSESSMENT: ("other_ai", "average_ai"),
    "moral_self_assessment": ("moral_other_ai", "moral_average_ai"),
    **{rating: (f"{rating}_other_ai", f"{rating}_average_ai") for rating in RATINGS},
}
RATED = (*RATINGS, *(other for rating in RATINGS for other in ABOUT_OTHERS[rating]))  # every battery that is rated
PAPER = "_paper"  # suffix of what the paper's rules make of a battery that is scored by our own rules too
CURVE = "harmfulness_worst_of_"  # one measure per k
ALONG = "along_training"  # Variant.control of a checkpoint
CENTRED, ACQUIESCENCE = "_centred", "_acquiescence"


def format_measure(battery: str, format: str) -> str:
    """The measure of one format of a self-report battery, or of a user's battery."""
    return format if battery == SELF_ASSESSMENT else f"{battery}_{format}"


def composites(measures: Iterable[str]) -> dict[str, tuple[str, ...]]:
    """Averages over formats whose parts are (in part) among ``measures``, with the parts of each.

    The parts are those a complete battery has: one that was not asked makes the average missing,
    never an average of fewer.
    """
    there = set(measures)
    found = {}
    for suffix in ("", PAPER, CENTRED, PAPER + CENTRED):
        for battery in SELF_REPORTS:
            parts = tuple(format_measure(battery, f) + suffix for f in FORMATS)
            if there.intersection(parts):
                found[battery + suffix] = parts
    return found


# Whole names, never their beginnings: a user's battery may be called anything else that starts like one.
_RATED = {battery + suffix for battery in RATED for suffix in ("", CENTRED, ACQUIESCENCE)}
_REPORTED = {*SELF_REPORTS, *(format_measure(battery, f) for battery in SELF_REPORTS for f in FORMATS)}
_REPORTED |= {measure + CENTRED for measure in _REPORTED}


def _in_both_modes(measure: str) -> str:
    """The name that a measure has in either mode."""
    for suffix in (CENTRED, ACQUIESCENCE):
        if measure.endswith(PAPER + suffix):
            return measure.removesuffix(PAPER + suffix) + suffix
    return measure.removesuffix(PAPER)


def moral(measure: str) -> bool:
    """Whether a measure is on the paper's moral scale, -0.5 (upholds the foundation) to +0.5 (against it)."""
    plain = _in_both_modes(measure)
    return plain in _RATED or (plain in _REPORTED and plain.startswith("moral_"))


def by_group(measure: str) -> bool:
    """Whether a measure is averaged group by group (dimension, foundation) and not over its prompts."""
    plain = _in_both_modes(measure)
    return plain == "intentions" or plain in _RATED or plain in _REPORTED


def bounds(measure: str) -> tuple[float, float]:
    """The lowest and the highest value a measure can have."""
    if moral(measure) and measure.endswith(CENTRED):
        return (-1.0, 1.0)
    return (-0.5, 0.5) if moral(measure) else (0.0, 1.0)


def scores_leftover(measure: str) -> bool:
    """Whether what is in no option scores half-way (a language that is neither), and is not left out."""
    return measure.removesuffix(PAPER).endswith("language")
