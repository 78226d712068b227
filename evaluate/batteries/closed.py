"""Closed questions: the expected value of the answer, exact or from samples.

Exact: the option values averaged under the model's own probabilities, renormalised over the mass
that fell on options; the mass that did not is kept beside the score, never dropped. Sampled: the
mean over the replies that parse as an option, by the same rule the exact scores use
(serve.options.parse). Replies that do not parse are counted as missing, where the paper's
sampled protocol gives some of them 0.5 (docs/divergences.md).

Where a prompt has both, the exact score carries the measure's name and the sampled one
``<measure>_sampled``, so that the two can be compared.
"""

from collections.abc import Sequence

from candor.rows import Prompt
from evaluate.batteries.answers import Answers, Scored, score_row
from serve.options import parse


def score_closed(measure: str, prompts: Sequence[Prompt], answers: Answers) -> Scored:
    """Score every prompt, or none when the variant was not asked any of them."""
    sampled = answers.sampled(prompts)
    asked_exactly = any(p.prompt_id in answers.distributions for p in prompts)
    found = Scored()
    if asked_exactly:
        for prompt in prompts:
            _score_exact(found, measure, prompt, answers)
    if sampled:
        name = f"{measure}_sampled" if asked_exactly else measure
        for prompt in prompts:
            _score_sampled(found, name, prompt, [text for _, _, text in sampled.get(prompt.prompt_id, [])], answers)
    return found


def _score_exact(found: Scored, measure: str, prompt: Prompt, answers: Answers) -> None:
    """Add the exact score of one prompt; missing where no mass at all fell on an option."""
    record = answers.distributions.get(prompt.prompt_id)
    value, leftover = None, None
    if record is not None:
        found.n_in += 1
        leftover = float(record["leftover"])
        mass = float(sum(record["probabilities"]))
        if mass > 0:
            weighted = (o.value * float(p) for o, p in zip(prompt.options, record["probabilities"], strict=True))
            value = sum(weighted) / mass
        else:
            found.left_out["no mass on any option"] += 1
    n = int(value is not None)
    found.scores.append(
        score_row(measure, answers.variant, prompt, value, n=n, n_missing=1 - n, leftover=leftover),
    )


def _score_sampled(found: Scored, measure: str, prompt: Prompt, texts: list[str], answers: Answers) -> None:
    """Add the mean over the replies of one prompt that name an option."""
    picks = [parse(text, prompt.options) for text in texts]
    values = [prompt.options[pick].value for pick in picks if pick is not None]
    unread = len(texts) - len(values)
    found.n_in += len(texts)
    if unread:
        found.left_out["reply names no option"] += unread
    found.scores.append(
        score_row(
            measure,
            answers.variant,
            prompt,
            sum(values) / len(values) if values else None,
            n=len(values),
            n_missing=unread if texts else 1,
            leftover=None,
        )
    )
