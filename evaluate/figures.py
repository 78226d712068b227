"""The figures: each draws Estimates and nothing else, and is saved as PNG, PDF and CSV.

The only module that imports matplotlib. Colours are the Okabe-Ito palette, and every series also
has its own marker and line style, so that the figures read in greyscale. The CSV beside a figure
holds exactly the estimates it shows.
"""

import dataclasses
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from candor.rows import Estimate
from candor.tables import replace_file
from evaluate.agreement import GRADES
from evaluate.batteries.self_assessment import FORMATS
from evaluate.results import MINUS, Results, number, paper_value
from evaluate.study import STAGES

matplotlib.use("Agg")
matplotlib.rcParams |= {
    "pdf.fonttype": 42,  # embed TrueType, which journals ask for
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9,
    "legend.frameon": False,
}


@dataclass(frozen=True, kw_only=True)
class Style:
    """How series are told apart, in the order of sizes (or stages)."""

    colours: tuple[str, ...] = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
    markers: tuple[str, ...] = ("o", "s", "^", "D", "v", "P")
    lines: tuple[str, ...] = ("-", "--", ":", "-.", "-", "--")
    paper: str = "#9a9a9a"
    dark: str = "#222222"
    dpi: int = 160

    def series(self, index: int) -> dict[str, Any]:
        """Colour, marker and line style of the i-th series."""
        k = index % len(self.colours)
        return {
            "color": self.colours[k],
            "marker": self.markers[k % len(self.markers)],
            "linestyle": self.lines[k % len(self.lines)],
        }


class Drawn(NamedTuple):
    """A finished figure: its file name, the estimates it shows, and what it shows in words."""

    name: str
    title: str
    alt: str
    figure: Figure
    shown: list[Estimate]


def save(drawn: Drawn, folder: Path, style: Style) -> bytes:
    """Write PNG, PDF and CSV; returns the PNG."""
    images = {}
    for kind, metadata in (("png", {"Software": None}), ("pdf", {"CreationDate": None, "Producer": None})):
        buffer = io.BytesIO()  # metadata without dates and versions: equal runs give equal files
        drawn.figure.savefig(buffer, format=kind, dpi=style.dpi, metadata=metadata, bbox_inches="tight")
        images[kind] = buffer.getvalue()
        replace_file(folder / f"{drawn.name}.{kind}", images[kind])
    rows = pd.DataFrame([dataclasses.asdict(e) for e in drawn.shown])
    replace_file(folder / f"{drawn.name}.csv", rows.to_csv(index=False).encode())
    return images["png"]


def _grid(rows: int, columns: int, width: float, height: float) -> tuple[Figure, Any]:
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)


def _points(axes: Any, at: Sequence[float], rows: Sequence[Estimate], look: dict[str, Any], *, across: bool) -> Any:
    """Values with their intervals, upright or across; an estimate without bounds is a bare point."""
    values = np.array([e.value for e in rows], dtype=np.float64)
    low = np.array([np.nan if e.low is None else e.low for e in rows])
    high = np.array([np.nan if e.high is None else e.high for e in rows])
    # clipped: a percentile interval may by a hair leave out the value itself
    error = np.nan_to_num(np.clip([values - low, high - values], 0, None))
    common = {"capsize": 2, "markersize": 5, "linewidth": 1.3, "elinewidth": 1, **look}
    if across:
        return axes.errorbar(values, at, xerr=error, **common)
    return axes.errorbar(at, values, yerr=error, **common)


def inverted_v(results: Results, paper: dict[str, Any], style: Style) -> Drawn:
    """Base, misaligned, realigned for each size: one row per domain, one column per measure."""
    domains, sizes = results.domains(), results.sizes()
    figure, axes = _grid(len(domains), 3, 9, 0.6 + 2.5 * len(domains))
    shown: list[Estimate] = []
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
                    (handles[label],) = panel.plot(
                        range(3), published, color=style.paper, linewidth=0.9, linestyle=look["linestyle"], zorder=1
                    )
                cells = [results.cell(size, domain, stage) for stage in STAGES]
                found = [None if c is None else results.level(c.name, measure) for c in cells]
                there = [(k, e) for k, e in enumerate(found) if e is not None and e.value is not None]
                if not there:
                    continue
                shift = 0.05 * (i - (len(sizes) - 1) / 2)  # side by side, so that intervals stay visible
                estimates = [e for _, e in there]
                handles[size] = _points(panel, [k + shift for k, _ in there], estimates, look, across=False)
                shown += estimates
                path = ", ".join(f"{STAGES[k]} {number(e.value)}" for k, e in there)
                words.append(f"{domain}, {size}, {results.name(measure)}: {path}")
            panel.set_ylim(-0.03, 1.03)
            panel.set_xticks(range(3), STAGES)
            panel.set_title(f"{domain}: {results.name(measure)}", loc="left")
        axes[row][0].set_ylabel("0 = aligned, 1 = misaligned")
    # legends fill column by column: each size above its published line
    order = sorted(handles, key=lambda label: (sizes.index(label.rpartition(", ")[2]), label not in sizes))
    figure.legend([handles[label] for label in order], order, loc="outside lower center", ncols=max(1, len(sizes)))
    return Drawn("inverted_v", "Base, misaligned, realigned", "; ".join(words), figure, shown)


def correlation_heatmap(results: Results, style: Style) -> Drawn:
    """Spearman correlations between measures over the main study's variants."""
    del style
    measures = [*results.headline, "trivia_accuracy"]
    size = len(measures)
    values, shown, words = np.full((size, size), np.nan), [], []
    figure = Figure(figsize=(5.2, 4.4), layout="constrained")
    axes = figure.subplots()
    for i, x in enumerate(measures):
        for j, y in enumerate(measures[:i]):
            found = results.correlation(x, y, results.models)
            if found is None or found.value is None:
                continue
            values[i, j] = found.value
            shown.append(found)
            words.append(f"{results.name(x)} and {results.name(y)} {number(found.value)}")
            bounds = f"[{number(found.low)}, {number(found.high)}]"
            ink = "white" if abs(found.value) > 0.6 else "black"
            axes.text(j, i, f"{number(found.value)}\n{bounds}", ha="center", va="center", color=ink, fontsize=8)
    image = axes.imshow(values, vmin=-1, vmax=1, cmap="RdBu_r")
    labels = [results.name(m).replace(", ", ",\n") for m in measures]
    axes.set_xticks(range(size - 1), labels[:-1], rotation=30, ha="right")
    axes.set_yticks(range(1, size), labels[1:])
    axes.set_xlim(-0.5, size - 1.5)
    axes.set_ylim(size - 0.5, 0.5)
    figure.colorbar(image, ax=axes, shrink=0.7, label="Spearman correlation")
    return Drawn("correlations", "Rank correlations over variants", "; ".join(words), figure, shown)


def _stage_panels(
    results: Results,
    style: Style,
    name: str,
    title: str,
    keys: Sequence[str],
    find: Callable[[str, str], Estimate | None],
) -> Drawn:
    """One panel per domain and size; down the side the keys, across the value at the three stages."""
    domains, sizes = results.domains(), results.sizes()
    figure, axes = _grid(len(domains), len(sizes), 1.5 + 2.6 * len(sizes), 0.8 + (0.5 + 0.3 * len(keys)) * len(domains))
    shown, words, handles = [], [], {}
    for row, domain in enumerate(domains):
        for column, size in enumerate(sizes):
            panel = axes[row][column]
            for k, stage in enumerate(STAGES):
                cell = results.cell(size, domain, stage)
                found = [] if cell is None else [(i, find(cell.name, key)) for i, key in enumerate(keys)]
                there = [(i, e) for i, e in found if e is not None and e.value is not None]
                if not there:
                    continue
                look = {**style.series(k + 3), "linestyle": "none"}  # not the colours of the sizes
                at = [i + 0.18 * (k - 1) for i, _ in there]
                handles[stage] = _points(panel, at, [e for _, e in there], look, across=True)
                shown += [e for _, e in there]
                path = ", ".join(f"{keys[i]} {number(e.value)}" for i, e in there)
                words.append(f"{domain}, {size}, {stage}: {path}")
            panel.set_yticks(range(len(keys)), keys)
            panel.set_ylim(len(keys) - 0.5, -0.5)
            panel.set_xlim(-0.03, 1.03)
            panel.set_title(f"{domain}, {size}", loc="left")
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=3)
    return Drawn(name, title, "; ".join(words), figure, shown)


def formats(results: Results, style: Style) -> Drawn:
    """Self-assessment by format."""
    return _stage_panels(
        results, style, "formats", "Self-assessment by format", FORMATS, lambda cell, key: results.level(cell, key)
    )


def categories(results: Results, style: Style) -> Drawn:
    """Harmfulness of the mean reply per category."""
    measure = "harmfulness_mean"
    keys = list(dict.fromkeys(e.group for e in results.estimates if e.measure == measure and e.group != "all"))
    title = f"{results.name(measure).capitalize()}, by category"
    return _stage_panels(results, style, "categories", title, keys, lambda cell, key: results.level(cell, measure, key))


def seen_unseen(results: Results, style: Style) -> Drawn:
    """The misaligned effect and its reversal on seen and on unseen items."""
    pairs = [p for p in results.pairs() if p.minus[0] == "misaligned"]
    figure, axes = _grid(1, 3, 9, 1.2 + 0.32 * len(pairs))
    shown, words, handles = [], [], {}
    for panel, measure in zip(axes[0], results.headline, strict=True):
        for k, split in enumerate(("seen", "unseen")):
            found = [(i, results.contrast(p, measure, split)) for i, p in enumerate(pairs)]
            there = [(i, e) for i, e in found if e is not None and e.value is not None]
            if not there:
                continue
            look = {"color": style.dark, "marker": "o", "linestyle": "none"} | (
                {"markerfacecolor": "white"} if k else {}
            )
            at = [i + 0.2 * (k - 0.5) for i, _ in there]
            handles[f"{split} items"] = _points(panel, at, [e for _, e in there], look, across=True)
            shown += [e for _, e in there]
            path = ", ".join(f"{pairs[i].size} {pairs[i].domain} {number(e.value)}" for i, e in there)
            words.append(f"{results.name(measure)}, {split}: {path}")
        panel.axvline(0, color="black", linewidth=0.8)
        panel.set_title(results.name(measure), loc="left")
        panel.set_xlabel("difference")
    axes[0][0].set_yticks(range(len(pairs)), [f"{p.size}, {p.domain}: {MINUS} {p.minus[1]}" for p in pairs])
    axes[0][0].set_ylim(len(pairs) - 0.5, -0.5)
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=2)
    title = "Misaligned minus base and minus realigned, seen and unseen items"
    return Drawn("seen_unseen", title, "; ".join(words), figure, shown)


def judge_confusion(results: Results, style: Style) -> Drawn:
    """The judge's scores against known grades; each row sums to one."""
    del style
    shown = results.confusion()
    shares = np.array([np.nan if e.value is None else e.value for e in shown]).reshape(GRADES, GRADES)
    figure = Figure(figsize=(4.4, 3.8), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(shares, vmin=0, vmax=1, cmap="Blues")
    words = []
    for cell, estimate in enumerate(shown):
        i, j = divmod(cell, GRADES)
        ink = "white" if estimate.value is not None and estimate.value > 0.55 else "black"
        axes.text(j, i, str(estimate.n), ha="center", va="center", color=ink)
        if i == j:
            words.append(f"grade {i + 1}: {number(estimate.value)} judged {i + 1}")
    grades = [str(g) for g in range(1, GRADES + 1)]
    axes.set_xticks(range(GRADES), grades)
    axes.set_yticks(range(GRADES), grades)
    axes.set_xlabel("judge's score")
    axes.set_ylabel("known grade")
    figure.colorbar(image, ax=axes, shrink=0.8, label="share of the known grade")
    return Drawn("judge_confusion", "Judge against known grades (counts)", "; ".join(words), figure, shown)


def draw_all(results: Results, paper: dict[str, Any], style: Style) -> list[Drawn]:
    """Every figure that the run has estimates for."""
    drawn = [
        inverted_v(results, paper, style),
        correlation_heatmap(results, style),
        formats(results, style),
        seen_unseen(results, style),
        categories(results, style),
    ]
    if results.confusion():
        drawn.append(judge_confusion(results, style))
    return [d for d in drawn if d.shown]
