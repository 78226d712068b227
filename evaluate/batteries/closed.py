"""Closed questions: the expected value of the answer, exact or from samples.

Exact: the option values averaged under the model's own probabilities, renormalised over the mass
that fell on options; the mass that did not is kept beside the score, never dropped. A question whose
options have hardly any mass is missing: shares of a millionth tell nothing. Sampled: the mean over
the replies, read either strictly (by the very rule the exact scores use, serve.options.parse; a
reply that names no option is missing) or by the paper's rules (evaluate/batteries/paper_rules.py),
where the share of replies that score 0.5 for want of a better reading stands beside the score.

Questions with a right answer (trivia, multiple choice) are read strictly in every mode: the paper has
no rule for them, and half a point for an unreadable reply would pass for knowledge.

What strict rules make carries the measure's name. What the paper's rules make of the same battery
carries the suffix ``_paper``, unless they are the only ones: then they are the measure.
"""

from collections.abc import Callable, Sequence
from typing import Any

from candor.rows import Prompt
from evaluate.batteries.answers import Answers, Scored, score_row, variance_of
from evaluate.batteries.paper_rules import read_reply
from evaluate.measures import PAPER
from evaluate.modes import Mode
from serve.options import parse

# Scoring stops where the rest of the options' mass cannot matter (serve/scoring.py); a score's options must have this
# many times what was left unexplored, or its shares would be those of what happened to be explored.
WELL_EXPLORED = 10
UNRESOLVED = "next to no mass on any option"
WITH_RIGHT_ANSWERS = ("trivia", "multiple_choice")  # batteries

Draw = tuple[int, str, str]  # draw, sample_id, text
Ruled = Callable[[str, Sequence[Prompt], Answers, Mode], Scored]  # measure, prompts the mode asks, answers, mode


def in_modes(measure: str, prompts: Sequence[Prompt], answers: Answers, score: Ruled) -> Scored:
    """Score the prompts in every mode that asked any of them and was answered, each under its own name."""
    sampled = {p.prompt_id for p in prompts} & set(answers.samples["prompt_id"])
    asked: list[tuple[Mode, list[Prompt]]] = []
    for mode in answers.design.modes:
        part = [p for p in prompts if mode.draws(p) or mode.scores_exactly(p)]
        if any(
            (mode.draws(p) and p.prompt_id in sampled)
            or (mode.scores_exactly(p) and p.prompt_id in answers.distributions)
            for p in part
        ):
            asked.append((mode, part))
    found = Scored()
    for mode, part in asked:
        name = measure + PAPER if mode.rules == "paper" and len(asked) > 1 else measure
        found.add(score(name, part, answers, mode))
    return found


def score_closed(measure: str, prompts: Sequence[Prompt], answers: Answers) -> Scored:
    """Score every prompt in every mode; nothing where the variant was not asked any of them."""
    return in_modes(measure, prompts, answers, score_mode)


def score_mode(measure: str, prompts: Sequence[Prompt], answers: Answers, mode: Mode) -> Scored:
    """The scores one mode makes: exact ones where it asks for them, else those of its draws."""
    found = Scored()
    sampled = answers.sampled(prompts)
    for prompt in prompts:
        if mode.scores_exactly(prompt):
            _score_exact(found, measure, prompt, answers)
            continue
        replies = [r for r in sampled.get(prompt.prompt_id, []) if r[0] < mode.draws(prompt)]
        by_the_paper = mode.rules == "paper" and prompt.battery not in WITH_RIGHT_ANSWERS
        (_score_paper if by_the_paper else _score_strict)(found, measure, prompt, replies, answers)
    return found


def _score_exact(found: Scored, measure: str, prompt: Prompt, answers: Answers) -> None:
    """Add the exact score of one prompt; missing where next to no mass fell on an option."""
    record = answers.distributions.get(prompt.prompt_id)
    value, leftover = None, None
    if record is not None:
        found.n_in += 1
        leftover = float(record["leftover"])
        mass = float(sum(record["probabilities"]))
        if mass > WELL_EXPLORED * float(record["unexplored"]):
            weighted = (o.value * float(p) for o, p in zip(prompt.options, record["probabilities"], strict=True))
            value = sum(weighted) / mass
        else:
            found.left_out[UNRESOLVED] += 1
    n = int(value is not None)
    found.scores.append(
        score_row(measure, answers.variant, prompt, value, n=n, n_missing=1 - n, leftover=leftover),
    )


def _score_strict(found: Scored, measure: str, prompt: Prompt, replies: Sequence[Draw], answers: Answers) -> None:
    """Add the mean over the replies of one prompt that name an option."""
    picks = [parse(text, prompt.options) for _, _, text in replies]
    values = [prompt.options[pick].value for pick in picks if pick is not None]
    unread = [text for (_, _, text), pick in zip(replies, picks, strict=True) if pick is None]
    if unread:
        found.left_out["reply names no option"] += len(unread)
    _add_mean(found, measure, prompt, values, unread, len(replies), answers)


def _score_paper(found: Scored, measure: str, prompt: Prompt, replies: Sequence[Draw], answers: Answers) -> None:
    """Add the mean over the replies of one prompt as the paper reads them."""
    readings = [read_reply(text, prompt.options, closest=answers.closest.get(sample)) for _, sample, text in replies]
    values = [r.value for r in readings if r.value is not None]
    excluded = [text for (_, _, text), reading in zip(replies, readings, strict=True) if reading.value is None]
    if excluded:
        found.left_out["reply without one number"] += len(excluded)
    known = [r.value for r in readings if r.value is not None and r.how != "ambiguous"]
    unknown = len(replies) - len(known)  # excluded, or scored 0.5 for want of a better reading
    worth = [option.value for option in prompt.options]
    bounds = {}
    if replies:
        bounds = {
            "leftover": (len(values) - len(known)) / len(values) if values else None,
            "lowest": (sum(known) + unknown * min(worth)) / len(replies),
            "highest": (sum(known) + unknown * max(worth)) / len(replies),
        }
    _add_mean(found, measure, prompt, values, excluded, len(replies), answers, **bounds)


def _add_mean(
    found: Scored,
    measure: str,
    prompt: Prompt,
    values: Sequence[float],
    unread: Sequence[str],
    asked: int,
    answers: Answers,
    **more: Any,
) -> None:
    """Add the mean of some values as the score of one prompt; ``unread`` are the replies that have none."""
    found.n_in += asked
    refused = sum(map(answers.design.refuses, unread))
    lost = {"n_refused": refused, "n_unparsed": len(unread) - refused}
    more = {"leftover": None, "variance": variance_of(values), **lost, **more}
    mean = sum(values) / len(values) if values else None
    n_missing = len(unread) if asked else 1
    found.scores.append(score_row(measure, answers.variant, prompt, mean, n=len(values), n_missing=n_missing, **more))
