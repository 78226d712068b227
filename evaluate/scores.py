"""Every answer of a run becomes a score: one Score row per variant, prompt and measure.

A battery is a module of evaluate/batteries (see its registry), or a user's YAML file.
"""

from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from candor.rows import Prompt, Variant
from evaluate.batteries.answers import Answers, Scored, read_answers
from evaluate.batteries.registry import scorer


def score_answers(prompts: Sequence[Prompt], answers: Answers, *, worst_of: int) -> Scored:
    """Score one variant on every battery it was asked."""
    by_battery: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        by_battery.setdefault(prompt.battery, []).append(prompt)
    found = Scored()
    for name, part in by_battery.items():
        found.add(scorer(name, list(answers.design.own))(part, answers, worst_of=worst_of))
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
