"""Every answer of a run becomes a score: one Score row per variant, prompt and measure.

A battery is a module of evaluate/batteries; adding one means adding it to ``BATTERIES``.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

from tqdm import tqdm

from candor.errors import UserError, nearest
from candor.rows import Prompt, Variant
from evaluate.batteries import harmfulness, intentions, self_assessment, trivia
from evaluate.batteries.answers import Answers, Scored, read_answers

BATTERIES: dict[str, Callable[..., Scored]] = {
    "harmfulness": harmfulness.score,
    "intentions": intentions.score,
    "self_assessment": self_assessment.score,
    "trivia": trivia.score,
}


def score_answers(prompts: Sequence[Prompt], answers: Answers, *, worst_of: int) -> Scored:
    """Score one variant on every battery it was asked."""
    by_battery: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        by_battery.setdefault(prompt.battery, []).append(prompt)
    found = Scored()
    for name, part in by_battery.items():
        if name not in BATTERIES:
            raise UserError(f"{part[0].prompt_id}: unknown battery {name!r}; {nearest(name, BATTERIES)}")
        found.add(BATTERIES[name](part, answers, worst_of=worst_of))
    return found


def score_run(
    run: Path,
    variants: Sequence[Variant],
    prompts: Sequence[Prompt],
    *,
    judge: str,
    worst_of: int,
    temperature: float | None,
) -> Scored:
    """Score every variant of a run, one variant's answers in memory at a time."""
    found = Scored()
    for variant in tqdm(variants, desc="scoring", unit="variant", disable=None):
        answers = read_answers(run, variant, prompts, judge, temperature)
        found.add(score_answers(prompts, answers, worst_of=worst_of))
    return found
