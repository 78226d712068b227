"""Intentions: what a model says it would do, as a choice between two options (1 = misaligned).

arXiv 2602.14777 App. C. Both option orders are asked; they share the scenario's cluster.
"""

from collections.abc import Sequence

from candor.rows import Prompt
from evaluate.batteries.answers import Answers, Scored
from evaluate.batteries.closed import score_closed


def score(prompts: Sequence[Prompt], answers: Answers, *, worst_of: int) -> Scored:
    """Expected value of the choice per scenario and option order."""
    del worst_of  # only open questions are judged over several replies
    return score_closed("intentions", prompts, answers)
