"""Batteries that are YAML files (candor/battery_files.py): one measure per format, named after the battery.

``NAME_choice`` and ``NAME_scale`` are expected values of the answer; ``NAME_free`` is the mean over
the draws of the judge's grades, put on 0-1 by the judge's own scale. All run from 0 to 1 in the
sense that the file gives its answers.
"""

from collections import Counter
from collections.abc import Sequence

from candor.errors import UserError
from candor.rows import Prompt
from evaluate.batteries.answers import Answers, Scored, score_row, variance_of
from evaluate.batteries.closed import score_closed
from evaluate.measures import format_measure


def score(prompts: Sequence[Prompt], answers: Answers, *, worst_of: int) -> Scored:
    """Every format of one battery."""
    del worst_of  # a user's battery is scored by its mean
    found = Scored()
    for name in dict.fromkeys(p.format for p in prompts):
        part = [p for p in prompts if p.format == name]
        measure = format_measure(part[0].battery, name)
        found.add(_score_free(measure, part, answers) if name == "free" else score_closed(measure, part, answers))
    return found


def _score_free(measure: str, prompts: Sequence[Prompt], answers: Answers) -> Scored:
    """The mean grade of each open question; a reply without a grade is missing, never a number."""
    sampled = answers.sampled(prompts)
    found = Scored()
    if not sampled:
        return found
    battery = prompts[0].battery
    grader = answers.design.graders.get(battery)
    if grader is None:
        raise UserError(
            f"no judge is known for the open questions of battery {battery!r}. Run the study from its experiment "
            "file (python -m evaluate.experiment), which notes the battery's judge in design.json."
        )
    verdicts = answers.others[grader.judge]
    scores = dict(zip(verdicts["sample_id"], verdicts["score"], strict=True))
    status = dict(zip(verdicts["sample_id"], verdicts["status"], strict=True))
    for prompt in prompts:
        asked = max(mode.draws(prompt) for mode in answers.design.modes)
        if asked == 0:
            continue
        ids = [sample_id for draw, sample_id, _ in sampled.get(prompt.prompt_id, []) if draw < asked]
        values = [grader.normalise(float(scores[i])) for i in ids if status.get(i) == "ok"]
        found.n_in += len(ids)
        lost = Counter(status.get(i, "no verdict") for i in ids if status.get(i) != "ok")
        found.left_out += lost
        found.scores.append(
            score_row(
                measure,
                answers.variant,
                prompt,
                sum(values) / len(values) if values else None,
                n=len(values),
                n_missing=max(len(ids), 1) - len(values),
                leftover=None,
                variance=variance_of(values),
                n_refused=lost["refused"],
                n_unparsed=lost["unparsed"],
            )
        )
    return found
