"""The figure along training: what models do and say at checkpoints of both stages, and which moves first.

evaluate/along.py says what a course is and when a measure has moved; its estimates are drawn here.
"""

from typing import Any

from candor.rows import Estimate
from evaluate.along import CHANGE, FOLLOWED, HALF, Course, courses, final_steps
from evaluate.figures import Drawn, Style, bars, grid, legend, nothing, points
from evaluate.results import Results, number

NAME, TITLE = "along_training", "The change of behaviour, intentions and self-report along training"


def changes(results: Results, course: Course, measure: str) -> list[tuple[int, Estimate]]:
    """A measure's change since the start of a course at each later step."""
    keys = [(CHANGE, measure, variant, course.variants[0], "all", "all") for variant in course.variants[1:]]
    found = [(step, results.index.get(key)) for step, key in zip(course.steps[1:], keys, strict=True)]
    return [(step, e) for step, e in found if e is not None and e.value is not None]


def half_way(results: Results, course: Course, measure: str) -> Estimate | None:
    """The step at which half of a measure's final change was done; None where it did not move."""
    found = results.index.get((HALF, measure, course.name, course.variants[0], "all", "all"))
    return None if found is None or found.value is None else found


def along_training(results: Results, style: Style) -> Drawn:
    """One panel per stage of training: the change since its start, and the step by which half of it was done."""
    stages = courses(results.variants, final_steps(results.run, results.variants))
    if not stages:
        return nothing(NAME, TITLE)
    columns = min(2, len(stages))
    rows = -(-len(stages) // columns)
    figure, axes = grid(rows, columns, 1.0 + 4.0 * columns, 1.0 + 2.7 * rows, sharex=False, sharey=False)
    shown: list[Estimate] = []
    words, handles = [], {}
    for k, panel in enumerate(axes.flat):
        panel.set_visible(k < len(stages))
    for panel, course in zip(axes.flat, stages, strict=False):
        for i, measure in enumerate(FOLLOWED):
            found = changes(results, course, measure)
            if not found:
                continue
            estimates, look = [e for _, e in found], style.series(i)
            handles[results.name(measure)] = points(panel, [s for s, _ in found], estimates, look, across=False)
            shown += estimates
            path = ", ".join(f"step {step} {number(e.value)}" for step, e in found)
            half = half_way(results, course, measure)
            if half is not None and half.value is not None:
                _mark_half(panel, half, (estimates[-1].value or 0.0) / 2, look)
                shown.append(half)
                path += f", half of it by step {number(half.value, 0)}"
            words.append(f"{course.name}, {results.name(measure)}: {path}")
        panel.axhline(0, color=style.dark, linewidth=0.6)
        panel.set_xlim(left=0)
        panel.set_title(course.name, loc="left")
        panel.set_xlabel("optimizer steps of this stage")
        panel.set_ylabel(f"change since {course.variants[0]}")
    legend(figure, handles, len(handles))
    return Drawn(NAME, TITLE, "; ".join(words), figure, shown)


def _mark_half(panel: Any, half: Estimate, height: float, look: dict[str, Any]) -> None:
    """An open marker where half of the change was done, with the interval of that step across."""
    open_look = {**look, "linestyle": "none", "fillstyle": "none", "markersize": 9, "capsize": 3, "elinewidth": 0.8}
    panel.errorbar([half.value], [height], xerr=bars([half]), **open_look)
