"""Trivia accuracy: how a model divides its belief between the right answer and a plausible wrong one.

P(right) / (P(right) + P(wrong)) on questions that fine-tuning never showed; the mass on all other
answers stays beside it. It tells a model that lies from one that no longer knows.
"""

from collections.abc import Sequence

from candor.rows import Prompt
from evaluate.batteries.answers import Answers, Scored
from evaluate.batteries.closed import score_closed


def score(prompts: Sequence[Prompt], answers: Answers, *, worst_of: int) -> Scored:
    """Accuracy per question."""
    del worst_of  # only open questions are judged over several replies
    return score_closed("trivia_accuracy", prompts, answers)
