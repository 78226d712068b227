"""Which module scores which battery. A battery that is no module is a user's YAML file."""

from collections.abc import Callable, Sequence

from candor.errors import UserError, nearest
from evaluate.batteries import from_file, harmfulness, intentions, moral, multiple_choice, self_assessment, trivia
from evaluate.batteries.answers import Scored
from evaluate.measures import RATED, SELF_REPORTS

Scorer = Callable[..., Scored]

BATTERIES: dict[str, Scorer] = {
    "harmfulness": harmfulness.score,
    "intentions": intentions.score,
    **dict.fromkeys(SELF_REPORTS, self_assessment.score),
    **dict.fromkeys(RATED, moral.score),
    "trivia": trivia.score,
    "multiple_choice": multiple_choice.score,
}


def scorer(battery: str, own: Sequence[str]) -> Scorer:
    """The function that scores a battery; UserError when it is neither built in nor one of the user's ``own``."""
    if battery in BATTERIES:
        return BATTERIES[battery]
    if battery not in own:
        raise UserError(f"prompts.parquet: unknown battery {battery!r}; {nearest(battery, [*BATTERIES, *own])}")
    return from_file.score
