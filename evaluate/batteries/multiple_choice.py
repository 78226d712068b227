"""Multiple choice with a right answer: a model's capability, so that losing it is not read as misalignment.

``multiple_choice_accuracy`` is what leaderboards print: the share of questions whose right letter is
the most probable one (of a sampled reply: is named). ``multiple_choice`` is softer and finer: the
probability of the right letter among the letters. Every question is asked in all rotations of its
choices, which share its cluster, so that a model that always says "C" gets a quarter of four.
"""

import dataclasses
from collections.abc import Sequence

from candor.rows import Prompt
from evaluate.batteries.answers import Answers, Scored
from evaluate.batteries.closed import in_modes, score_mode
from evaluate.modes import Mode

SHARE = "multiple_choice"
ACCURACY = "multiple_choice_accuracy"


def score(prompts: Sequence[Prompt], answers: Answers, *, worst_of: int) -> Scored:
    """The probability of the right letter, and whether it is the most probable one."""
    del worst_of  # only open questions are judged over several replies
    return in_modes(SHARE, prompts, answers, _both)


def _both(measure: str, prompts: Sequence[Prompt], answers: Answers, mode: Mode) -> Scored:
    """The two measures in one mode; of sampled replies they are the same number."""
    found = score_mode(measure, prompts, answers, mode)
    by_id = {p.prompt_id: p for p in prompts}
    hits = []
    for row in found.scores:
        prompt, hit = by_id[row.prompt_id], row.value
        if mode.scores_exactly(prompt) and row.value is not None:
            right = next(i for i, o in enumerate(prompt.options) if o.value == 1)
            shares = [float(p) for p in answers.distributions[row.prompt_id]["probabilities"]]
            hit = float(all(shares[right] > share for i, share in enumerate(shares) if i != right))
        hits.append(dataclasses.replace(row, measure=ACCURACY + measure.removeprefix(SHARE), value=hit))
    found.scores += hits
    return found
