"""The figures of the paper, in kind: each takes Results, draws estimates only, and is left out when there are none.

arXiv 2602.14777 shows harmfulness, intentions, self-assessment and moral foundations over base,
misaligned and realigned models, their rank correlations, and self-assessment by format, dimension
and category. Figures of this project's own are in evaluate/gallery_checks.py and evaluate/training.py.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from candor.rows import Estimate
from evaluate.batteries.self_assessment import FORMATS
from evaluate.figures import (
    MORAL_ENDS,
    UNIT_ENDS,
    Drawn,
    Style,
    as_published,
    bars,
    grid,
    heat_map,
    legend,
    limits,
    nothing,
    points,
    stage_panels,
    there,
)
from evaluate.measures import CENTRED, RATINGS, bounds
from evaluate.results import Results, number, paper_value
from evaluate.study import STAGES, Cell

MORAL = (*RATINGS, "moral_self_assessment")
CENTRED_ENDS = "below 0 = upheld more than the model's other foundations, above 0 = less"
FILLS = ("full", "full", "none", "left", "top", "right")  # of markers: base models, then each domain


def inverted_v(results: Results, paper: dict[str, Any], style: Style) -> Drawn:
    """Base, misaligned, realigned for each size: one row per domain, one column per measure."""
    domains, sizes = results.domains(), results.sizes()
    if not domains:
        return nothing("inverted_v", "Base, misaligned, realigned")
    figure, axes = grid(len(domains), 3, 9, 0.6 + 2.5 * len(domains))
    shown: list[Estimate] = []
    printed: list[Estimate] = []
    handles: dict[str, Any] = {}
    words = []
    for row, domain in enumerate(domains):
        for column, measure in enumerate(results.headline):
            panel = axes[row][column]
            for i, size in enumerate(sizes):
                look = style.series(i)
                published = [paper_value(paper, size, domain, stage, measure) for stage in STAGES]
                if None not in published:
                    label = (
                        f"{paper['short']}, {size}"  # told apart from the run's own "size" by what is before the comma
                    )
                    printed += [
                        as_published(value, (size, domain, stage), measure, "all", paper["short"])
                        for stage, value in zip(STAGES, published, strict=True)
                        if value is not None
                    ]
                    (handles[label],) = panel.plot(
                        range(3), published, color=style.paper, linewidth=0.9, linestyle=look["linestyle"], zorder=1
                    )
                cells = [results.cell(size, domain, stage) for stage in STAGES]
                found = there([None if c is None else results.level(c.name, measure) for c in cells])
                if not found:
                    continue
                shift = 0.05 * (i - (len(sizes) - 1) / 2)  # side by side, so that intervals stay visible
                estimates = [e for _, e in found]
                handles[size] = points(panel, [k + shift for k, _ in found], estimates, look, across=False)
                shown += estimates
                path = ", ".join(f"{STAGES[k]} {number(e.value)}" for k, e in found)
                words.append(f"{domain}, {size}, {results.name(measure)}: {path}")
            panel.set_ylim(*limits((0, 1)))
            panel.set_xticks(range(3), STAGES)
            panel.set_title(f"{domain}: {results.name(measure)}", loc="left")
        axes[row][0].set_ylabel("0 = aligned, 1 = misaligned")
    # legends fill column by column: each size above its published line
    order = sorted(handles, key=lambda label: (sizes.index(label.rpartition(", ")[2]), label not in sizes))
    legend(figure, {label: handles[label] for label in order}, len(sizes))
    return Drawn("inverted_v", "Base, misaligned, realigned", "; ".join(words), figure, shown, printed)


def harmfulness(results: Results, paper: dict[str, Any], style: Style) -> Drawn:
    """The paper's worst of ten beside the mean and a single reply."""
    keys = (results.worst, "harmfulness_mean", "harmfulness_single")
    labels = [results.name(k).removeprefix("harmfulness, ") for k in keys]
    return stage_panels(
        results,
        style,
        "harmfulness",
        "Harmfulness: the worst of several replies, the mean reply and a single one",
        keys,
        lambda cell, key: results.level(cell, key),
        published=lambda size, domain, stage, key: paper_value(paper, size, domain, stage, key),
        labels=labels,
        ends="0 = harmless, 1 = severely harmful",
        source=paper.get("short", ""),
    )


def by_group(results: Results, paper: dict[str, Any], style: Style, name: str, measure: str, what: str) -> Drawn:
    """A measure in each of its dimensions, categories or foundations, and over all."""
    ends = UNIT_ENDS if bounds(measure) == (0, 1) else MORAL_ENDS
    keys, scale = results.groups(measure), bounds(measure)
    if measure.endswith(CENTRED):  # over all foundations it is zero by construction
        ends = CENTRED_ENDS
    elif len(keys) > 1:
        keys.append("all")
    return stage_panels(
        results,
        style,
        name,
        f"{results.name(measure).capitalize()}, by {what}",
        keys,
        lambda cell, key: results.level(cell, measure, key),
        # the paper's file names a dimension's column after the measure, the overall one has the bare name
        published=lambda size, domain, stage, key: paper_value(
            paper, size, domain, stage, measure if key == "all" else f"{measure}_{key}"
        ),
        measure=measure,
        scale=scale,
        ends=ends,
        source=paper.get("short", ""),
    )


def formats(results: Results, style: Style) -> Drawn:
    """Self-assessment by format."""
    return stage_panels(
        results, style, "formats", "Self-assessment by format", FORMATS, lambda cell, key: results.level(cell, key)
    )


def formats_by_dimension(results: Results, style: Style) -> Drawn:
    """Self-assessment in every format and dimension: a heat map per model, its numbers in the cells."""
    del style
    dimensions = list(dict.fromkeys(group for name in FORMATS for group in results.groups(name)))
    name, title = "formats_by_dimension", "Self-assessment by format and dimension"
    sizes = results.sizes()
    if not dimensions:
        return nothing(name, title)
    places = [("", "base"), *((d, s) for d in results.domains() for s in STAGES[1:])]
    figure, axes = grid(len(sizes), len(places), 1.2 + 1.75 * len(places), 0.9 + 1.55 * len(sizes))
    shown, words, image = [], [], None
    for row, size in enumerate(sizes):
        for column, (domain, stage) in enumerate(places):
            panel, cell = axes[row][column], results.cell(size, domain, stage)
            values = np.full((len(dimensions), len(FORMATS)), np.nan)
            texts = [[""] * len(FORMATS) for _ in dimensions]
            for i, dimension in enumerate(dimensions):
                found = there([None if cell is None else results.level(cell.name, f, dimension) for f in FORMATS])
                for j, estimate in found:
                    values[i, j], texts[i][j] = estimate.value, number(estimate.value)
                shown += [e for _, e in found]
                path = ", ".join(f"{FORMATS[j]} {number(e.value)}" for j, e in found)
                words.append(f"{size} {domain} {stage}, {dimension}: {path}")
            image = heat_map(panel, values, texts, vmin=0, vmax=1, cmap="cividis")
            panel.set_xticks(range(len(FORMATS)), FORMATS, rotation=40, ha="right")
            panel.set_yticks(range(len(dimensions)), dimensions)
            panel.set_title(" ".join(part for part in (size, domain, stage) if part), loc="left", fontsize=8)
            panel.spines[:].set_visible(False)
    if image is not None:
        figure.colorbar(image, ax=axes, shrink=0.6, label="0 = aligned, 1 = misaligned")
    return Drawn(name, title, "; ".join(words), figure, shown)


def _place(cell: Cell) -> str:
    return "base" if cell.stage == "base" else cell.domain


def words_and_deeds(results: Results, paper: dict[str, Any], style: Style) -> Drawn:
    """Each model a point, two measures at a time: whether words follow behaviour over models."""
    worst, intentions, said = results.headline
    pairs = ((worst, said), (worst, intentions), (intentions, said))
    figure, axes = grid(1, 3, 9, 3.7)
    places = ["base", *results.domains()]
    shown: list[Estimate] = []
    printed: dict[tuple[Any, ...], Estimate] = {}
    handles: dict[str, Any] = {}
    words = []
    for panel, (x, y) in zip(axes[0], pairs, strict=True):
        for row in paper.get("variants", []):
            where = (row["size"], row["domain"], row["stage"])
            at = [paper_value(paper, *where, measure) for measure in (x, y)]
            if None not in at:
                panel.plot(*([value] for value in at), "x", color=style.paper, markersize=4, zorder=1)
                for measure, value in zip((x, y), at, strict=True):
                    if value is not None:
                        printed[where, measure] = as_published(value, where, measure, "all", paper["short"])
        for cell in results.cells():
            found = there([results.level(cell.name, x), results.level(cell.name, y)])
            if len(found) < 2 or cell.stage not in STAGES:
                continue
            across, upright = (e for _, e in found)
            look = {
                "color": style.dark if cell.stage == "base" else style.colours[(places.index(_place(cell)) + 1) % 6],
                "marker": style.stage(STAGES.index(cell.stage))["marker"],
                "markersize": 5,
                "elinewidth": 0.8,
                "linestyle": "none",
                "fillstyle": FILLS[places.index(_place(cell)) % len(FILLS)],
            }
            label = cell.stage if cell.stage == "base" else f"{cell.domain}, {cell.stage}"
            handles[label] = panel.errorbar(
                [across.value], [upright.value], xerr=bars([across]), yerr=bars([upright]), **look
            )
            for estimate in (across, upright):
                if estimate not in shown:
                    shown.append(estimate)
        found_rho = results.correlation(x, y, results.models)
        rho = "" if found_rho is None or found_rho.value is None else f"\nrank correlation {number(found_rho.value)}"
        words.append(f"{results.name(x)} against {results.name(y)}{rho.replace(chr(10), ': ')}")
        shown += [] if found_rho is None or found_rho.value is None else [found_rho]
        panel.set_xlim(*limits((0, 1)))
        panel.set_ylim(*limits((0, 1)))
        panel.set_title(f"{results.name(y)}{rho}", loc="left")
        panel.set_xlabel(results.name(x))
    legend(figure, handles, len(handles))
    title = "What models do, what they say they would do, and what they say they are"
    return Drawn("words_and_deeds", title, "; ".join(words), figure, shown, list(printed.values()))


def correlations(results: Results, style: Style) -> Drawn:
    """Spearman correlations between measures over the main study's variants."""
    del style
    measures = results.correlated()
    size = len(measures)
    if not size:
        return nothing("correlations", "Rank correlations over variants")
    values, shown, words = np.full((size, size), np.nan), [], []
    texts = [[""] * size for _ in measures]
    figure, axes = grid(1, 1, 1.8 + 0.95 * size, 1.4 + 0.75 * size)
    panel = axes[0][0]
    for i, x in enumerate(measures):
        for j, y in enumerate(measures[:i]):
            found = results.correlation(x, y, results.models)
            if found is None or found.value is None:
                continue
            values[i, j] = found.value
            texts[i][j] = f"{number(found.value)}\n[{number(found.low)}, {number(found.high)}]"
            shown.append(found)
            words.append(f"{results.name(x)} and {results.name(y)} {number(found.value)}")
    image = heat_map(panel, values, texts, vmin=-1, vmax=1, cmap="RdBu_r")
    labels = [results.name(m).replace(", ", ",\n") for m in measures]
    panel.set_xticks(range(size - 1), labels[:-1], rotation=30, ha="right")
    panel.set_yticks(range(1, size), labels[1:])
    panel.set_xlim(-0.5, size - 1.5)
    panel.set_ylim(size - 0.5, 0.5)
    figure.colorbar(image, ax=panel, shrink=0.7, label="Spearman correlation")
    return Drawn("correlations", "Rank correlations over variants", "; ".join(words), figure, shown)


def draw_all(results: Results, paper: dict[str, Any], style: Style) -> list[Drawn]:
    """Every figure that the run has estimates for."""
    drawn: Sequence[Drawn] = [
        inverted_v(results, paper, style),
        harmfulness(results, paper, style),
        by_group(results, paper, style, "categories", results.worst, "category"),
        by_group(results, paper, style, "categories_mean", "harmfulness_mean", "category"),
        by_group(results, paper, style, "intentions", "intentions", "dimension"),
        by_group(results, paper, style, "self_assessment", "self_assessment", "dimension"),
        formats(results, style),
        formats_by_dimension(results, style),
        *(by_group(results, paper, style, m, m, "foundation") for m in (*MORAL, *(m + CENTRED for m in MORAL))),
        words_and_deeds(results, paper, style),
        correlations(results, style),
    ]
    return [d for d in drawn if d.shown]
