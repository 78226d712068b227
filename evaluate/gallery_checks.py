"""Figures that ask how far the study's numbers can be trusted; each draws estimates only.

Seen and unseen items, words about oneself and about others, the paper's way of asking beside ours,
how a worst of k grows with k, and the judge against known grades.
"""

from collections.abc import Sequence

import numpy as np

from evaluate.agreement import GRADES
from evaluate.batteries.self_assessment import FORMATS
from evaluate.effects import EFFECT
from evaluate.figures import (
    MORAL_ENDS,
    UNIT_ENDS,
    Drawn,
    Style,
    bars,
    grid,
    heat_map,
    label_below,
    legend,
    limits,
    nothing,
    points,
    stage_panels,
    there,
)
from evaluate.measures import ABOUT_OTHERS, PAPER, SELF_ASSESSMENT, bounds, moral
from evaluate.results import MINUS, WORST, Results, number
from evaluate.study import STAGES


def seen_unseen(results: Results, style: Style) -> Drawn:
    """The misaligned effect and its reversal on seen and on unseen items."""
    pairs = [p for p in results.pairs() if p.minus[0] == "misaligned"]
    title = "Misaligned minus base and minus realigned, seen and unseen items"
    if not pairs:
        return nothing("seen_unseen", title)
    figure, axes = grid(1, 3, 9, 1.2 + 0.32 * len(pairs))
    shown, words, handles = [], [], {}
    for panel, measure in zip(axes[0], results.headline, strict=True):
        for k, split in enumerate(("seen", "unseen")):
            found = there([results.contrast(p, measure, split) for p in pairs])
            if not found:
                continue
            look = {"color": style.dark, "marker": "o", "linestyle": "none"} | (
                {"markerfacecolor": "white"} if k else {}
            )
            at = [i + 0.2 * (k - 0.5) for i, _ in found]
            handles[f"{split} items"] = points(panel, at, [e for _, e in found], look, across=True)
            shown += [e for _, e in found]
            path = ", ".join(f"{pairs[i].size} {pairs[i].domain} {number(e.value)}" for i, e in found)
            words.append(f"{results.name(measure)}, {split}: {path}")
        panel.axvline(0, color="black", linewidth=0.8)
        panel.set_title(results.name(measure), loc="left")
        panel.set_xlabel("difference")
    axes[0][0].set_yticks(range(len(pairs)), [f"{p.size}, {p.domain}: {MINUS} {p.minus[1]}" for p in pairs])
    axes[0][0].set_ylim(len(pairs) - 0.5, -0.5)
    legend(figure, handles, 2)
    return Drawn("seen_unseen", title, "; ".join(words), figure, shown)


def judge_confusion(results: Results, style: Style) -> Drawn:
    """The judge's scores against known grades; each row sums to one."""
    del style
    shown = results.confusion()
    shares = np.array([np.nan if e.value is None else e.value for e in shown]).reshape(GRADES, GRADES)
    figure, axes = grid(1, 1, 4.4, 3.8)
    panel = axes[0][0]
    counts = np.array([str(e.n) for e in shown]).reshape(GRADES, GRADES)
    image = heat_map(panel, shares, np.where(np.isnan(shares), "", counts).tolist(), vmin=0, vmax=1, cmap="Blues")
    on_diagonal = [(e, i + 1) for i in range(GRADES) for j, e in enumerate(shown[i * GRADES :][:GRADES]) if i == j]
    words = [f"grade {grade}: {number(e.value)} judged {grade}" for e, grade in on_diagonal]
    grades = [str(g) for g in range(1, GRADES + 1)]
    panel.set_xticks(range(GRADES), grades)
    panel.set_yticks(range(GRADES), grades)
    panel.set_xlabel("judge's score")
    panel.set_ylabel("known grade")
    figure.colorbar(image, ax=panel, shrink=0.8, label="share of the known grade")
    return Drawn("judge_confusion", "Judge against known grades (counts)", "; ".join(words), figure, shown)


def self_and_others(results: Results, style: Style, own: str) -> Drawn:
    """What models say of themselves beside what they say of another AI and of the average AI."""
    keys = [m for m in (own, *ABOUT_OTHERS[own]) if m in results.measures()]
    name = "self_and_others" if own == SELF_ASSESSMENT else f"{own}_and_others"
    title = f"{results.name(own).capitalize()}: of themselves, of another AI and of the average AI"
    if len(keys) < 2:
        return nothing(name, title)
    labels = ["average AI" if "average" in k else "another AI" if k != own else "itself" for k in keys]
    ends = MORAL_ENDS if moral(own) else UNIT_ENDS
    return stage_panels(results, style, name, title, keys, results.level, labels=labels, scale=bounds(own), ends=ends)


def form_effects(results: Results, style: Style) -> Drawn:
    """How a question is put: position, polarity, scale direction and language, measure by measure."""
    wanted = ("intentions", *FORMATS)
    found = [e for e in results.estimates if e.kind == EFFECT and e.measure in wanted]
    keys = list(dict.fromkeys((e.measure, e.reference) for e in found if not e.reference.startswith("minus ")))
    keys.sort(key=lambda key: wanted.index(key[0]))
    labels = {f"{measure}: {effect}": (measure, effect) for measure, effect in keys}
    return stage_panels(
        results,
        style,
        "form_effects",
        "Effects of how a question is put",
        list(labels),
        lambda cell, key: results.index.get((EFFECT, labels[key][0], cell, labels[key][1], "all", "all")),
        scale=(-1, 1),
        ends="difference between the two ways; 0 = it does not matter",
    )


def modes(results: Results, style: Style) -> Drawn:
    """Every measure that was asked in the paper's way too: the paper's mode against ours, a point per model."""
    name, title = "modes", "The paper's way of asking against ours"
    measures = [m for m in results.measures() if f"{m}{PAPER}" in results.measures() and bounds(m) == (0, 1)]
    if not measures:
        return nothing(name, title)
    columns = min(4, len(measures))
    rows = -(-len(measures) // columns)
    figure, axes = grid(rows, columns, 0.8 + 2.3 * columns, 0.8 + 2.3 * rows)
    shown, words, handles = [], [], {}
    for k, panel in enumerate(axes.flat):
        panel.set_visible(k < len(measures))
        panel.axline((0, 0), slope=1, color=style.paper, linewidth=0.8)
        panel.set_xlim(*limits((0, 1)))
        panel.set_ylim(*limits((0, 1)))
    for panel, measure in zip(axes.flat, measures, strict=False):
        panel.set_title(results.name(measure), loc="left")
        for cell in results.cells():
            found = there([results.level(cell.name, measure), results.level(cell.name, measure + PAPER)])
            if len(found) < 2 or cell.stage not in STAGES:
                continue
            across, upright = (e for _, e in found)
            handles[cell.stage] = panel.errorbar(
                [across.value],
                [upright.value],
                xerr=bars([across]),
                yerr=bars([upright]),
                elinewidth=0.8,
                markersize=4.5,
                **style.stage(STAGES.index(cell.stage)),
            )
            shown += [across, upright]
            words.append(f"{results.name(measure)}, {cell.name}: {number(across.value)} and {number(upright.value)}")
    label_below(axes, "our mode")
    figure.supylabel("the paper's mode", fontsize=9)
    legend(figure, handles, len(handles))
    return Drawn(name, title, "; ".join(words), figure, shown)


def worst_of_curve(results: Results, style: Style) -> Drawn:
    """Harmfulness of the worst of k replies against k; one panel per domain and size."""
    ks = sorted(
        int(m.removeprefix(WORST))
        for m in results.measures()
        if m.startswith(WORST) and m.removeprefix(WORST).isdigit()
    )
    name, title = "worst_of_k", "Harmfulness of the worst of k replies"
    domains, sizes = results.domains(), results.sizes()
    if len(ks) < 2 or not domains:
        return nothing(name, title)
    figure, axes = grid(len(domains), len(sizes), 1 + 2.6 * len(sizes), 0.8 + 2.1 * len(domains))
    shown, words, handles = [], [], {}
    for row, domain in enumerate(domains):
        for column, size in enumerate(sizes):
            panel = axes[row][column]
            for i, stage in enumerate(STAGES):
                cell = results.cell(size, domain, stage)
                found = there([None if cell is None else results.level(cell.name, f"{WORST}{k}") for k in ks])
                if not found:
                    continue
                look = style.stage(i) | {"linestyle": style.lines[i], "markersize": 4}
                handles[stage] = points(panel, [ks[k] for k, _ in found], [e for _, e in found], look, across=False)
                shown += [e for _, e in found]
                path = ", ".join(f"{ks[k]}: {number(e.value)}" for k, e in found)
                words.append(f"{domain}, {size}, {stage}: {path}")
            panel.set_ylim(*limits((0, 1)))
            panel.set_title(f"{domain}, {size}", loc="left")
    label_below(axes, "k, the number of replies of which the worst counts")
    legend(figure, handles, len(handles))
    return Drawn(name, title, "; ".join(words), figure, shown)


def draw_checks(results: Results, style: Style) -> list[Drawn]:
    """Every figure of this kind that the run has estimates for."""
    drawn: Sequence[Drawn] = [
        seen_unseen(results, style),
        form_effects(results, style),
        *(self_and_others(results, style, own) for own in ABOUT_OTHERS),
        modes(results, style),
        worst_of_curve(results, style),
        *([judge_confusion(results, style)] if results.confusion() else []),
    ]
    return [d for d in drawn if d.shown]
