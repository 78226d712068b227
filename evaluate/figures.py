"""How figures are drawn and saved: the look of series, panels of points, heat maps, PNG, PDF and CSV.

The only module that imports matplotlib; evaluate/gallery.py says which figures a study has. Every
figure draws Estimates and nothing else, and the CSV beside it holds exactly those. Colours are the
Okabe-Ito palette, and every series also has its own marker and line style, so that figures read in
greyscale and without red or green; cells of heat maps carry their numbers.
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
from matplotlib.font_manager import FontProperties

from candor.rows import Estimate
from candor.tables import replace_file
from evaluate.crossed import ONE_SEED
from evaluate.results import Results, number
from evaluate.sheets import one_seed
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

Find = Callable[[str, str], Estimate | None]  # (name of a cell, key of a row) -> its estimate
UNIT = (0.0, 1.0)  # the scale of nearly every measure
UNIT_ENDS = "0 = aligned, 1 = misaligned"  # of a scale, as axes say it
MORAL_ENDS = "\N{MINUS SIGN}0.5 = upholds the foundation, +0.5 = against it"


@dataclass(frozen=True, kw_only=True)
class Style:
    """How series are told apart, in the order of sizes (or stages)."""

    colours: tuple[str, ...] = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
    markers: tuple[str, ...] = ("o", "s", "^", "D", "v", "P", "X")  # one more: series repeat after 42, not 6
    lines: tuple[str, ...] = ("-", "--", ":", "-.")
    paper: str = "#767676"
    dark: str = "#222222"
    dpi: int = 160

    def series(self, index: int) -> dict[str, Any]:
        """Colour, marker and line style of the i-th series."""
        return {
            "color": self.colours[index % len(self.colours)],
            "marker": self.markers[index % len(self.markers)],
            "linestyle": self.lines[index % len(self.lines)],
        }

    def stage(self, index: int) -> dict[str, Any]:
        """The look of a stage's points: base dark, then colours; markers that sizes do not have, and no line."""
        marker = self.markers[(index + 3) % len(self.markers)]
        colour = self.dark if index == 0 else self.colours[(2 - index) % len(self.colours)]
        return {"color": colour, "marker": marker, "linestyle": "none"}


class Drawn(NamedTuple):
    """A finished figure: its file name, the estimates it shows, what it shows in words, and published numbers."""

    name: str
    title: str
    alt: str
    figure: Figure
    shown: list[Estimate]
    published: Sequence[Estimate] = ()  # of kind "published": what the figure holds ours against


def as_published(value: float, place: tuple[str, str, str], measure: str, group: str, source: str) -> Estimate:
    """A published number as a row of a figure's CSV; ``place`` is its size, domain and stage."""
    return Estimate(measure, "published", "-".join(place), source, group, "all", value, None, None, 0, 0, 0, source)


def save(drawn: Drawn, folder: Path, style: Style) -> bytes:
    """Write PNG, PDF and CSV; returns the PNG."""
    if one_seed(drawn.shown):
        scope = f"Intervals: {ONE_SEED.removeprefix('; ')}"
        if drawn.figure.legends:  # which has its place reserved by the layout
            drawn.figure.legends[0].set_title(scope, prop=FontProperties(size=8))
        else:
            drawn.figure.supxlabel(scope, fontsize=8)
    drawn.figure.draw_without_rendering()
    drawn.figure.set_layout_engine("none")  # laid out once; every further drawing would do it again
    images = {}
    for kind, metadata in (("png", {"Software": None}), ("pdf", {"CreationDate": None, "Producer": None})):
        buffer = io.BytesIO()  # metadata without dates and versions: equal runs give equal files
        drawn.figure.savefig(buffer, format=kind, dpi=style.dpi, metadata=metadata)
        images[kind] = buffer.getvalue()
        replace_file(folder / f"{drawn.name}.{kind}", images[kind])
    rows = pd.DataFrame([dataclasses.asdict(e) for e in (*drawn.shown, *drawn.published)])
    replace_file(folder / f"{drawn.name}.csv", rows.to_csv(index=False).encode())
    return images["png"]


def grid(
    rows: int, columns: int, width: float, height: float, *, sharex: bool = True, sharey: bool = True
) -> tuple[Figure, Any]:
    """A figure of panels, indexed [row][column]; inches."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, sharex=sharex, sharey=sharey)


def bars(rows: Sequence[Estimate]) -> Any:
    """Lengths of the intervals below and above the values, shape (2, rows); zero without bounds."""
    values = np.array([e.value for e in rows], dtype=np.float64)
    low = np.array([np.nan if e.low is None else e.low for e in rows])
    high = np.array([np.nan if e.high is None else e.high for e in rows])
    # clipped: a percentile interval may by a hair leave out the value itself
    return np.nan_to_num(np.clip([values - low, high - values], 0, None))


def points(axes: Any, at: Sequence[float], rows: Sequence[Estimate], look: dict[str, Any], *, across: bool) -> Any:
    """Values with their intervals, upright or across; an estimate without bounds is a bare point."""
    values = np.array([e.value for e in rows], dtype=np.float64)
    common = {"capsize": 2, "markersize": 5, "linewidth": 1.3, "elinewidth": 1, **look}
    if across:
        return axes.errorbar(values, at, xerr=bars(rows), **common)
    return axes.errorbar(at, values, yerr=bars(rows), **common)


def there(found: Sequence[Estimate | None]) -> list[tuple[int, Estimate]]:
    """The estimates that have a value, with their places."""
    return [(i, e) for i, e in enumerate(found) if e is not None and e.value is not None]


def limits(scale: tuple[float, float]) -> tuple[float, float]:
    """Axis limits that leave room for a point at the end of the scale."""
    room = 0.03 * (scale[1] - scale[0])
    return scale[0] - room, scale[1] + room


def nothing(name: str, title: str) -> Drawn:
    """A figure for which there are no estimates; it is not saved."""
    return Drawn(name, title, "", Figure(), [])


def legend(figure: Figure, handles: dict[str, Any], columns: int) -> None:
    """One legend below all panels; nothing where nothing was drawn."""
    if handles:
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=max(1, columns))


def label_below(axes: Any, text: str) -> None:
    """What all panels have across, said once below them; a supxlabel would lie on the legend."""
    axes[-1][len(axes[-1]) // 2].set_xlabel(text, fontsize=8)


def stage_panels(
    results: Results,
    style: Style,
    name: str,
    title: str,
    keys: Sequence[str],
    find: Find,
    *,
    published: Callable[[str, str, str, str], float | None] = lambda size, domain, stage, key: None,
    measure: str | None = None,
    scale: tuple[float, float] = UNIT,
    labels: Sequence[str] = (),
    ends: str = UNIT_ENDS,
    source: str = "published",
) -> Drawn:
    """One panel per domain and size; down the side the keys, across the value at the three stages.

    ``published`` gives the paper's number of a (size, domain, stage, key), drawn as a grey tick and
    called ``source``; ``ends`` says what the ends of the scale mean. Keys are groups of ``measure``, or
    without one measures.
    """
    domains, sizes = results.domains(), results.sizes()
    if not (keys and domains):
        return nothing(name, title)
    figure, axes = grid(len(domains), len(sizes), 1.5 + 2.6 * len(sizes), 0.8 + (0.5 + 0.3 * len(keys)) * len(domains))
    shown, printed, words, handles = [], [], [], {}
    for row, domain in enumerate(domains):
        for column, size in enumerate(sizes):
            panel = axes[row][column]
            for k, stage in enumerate(STAGES):
                cell = results.cell(size, domain, stage)
                found = there([None if cell is None else find(cell.name, key) for key in keys])
                heights = [i + 0.2 * (k - 1) for i in range(len(keys))]
                ticks = [(published(size, domain, stage, key), y) for key, y in zip(keys, heights, strict=True)]
                printed += [
                    as_published(x, (size, domain, stage), measure or key, key if measure else "all", source)
                    for (x, _), key in zip(ticks, keys, strict=True)
                    if x is not None
                ]
                if any(x is not None for x, _ in ticks):
                    xs, ys = zip(*((x, y) for x, y in ticks if x is not None), strict=True)
                    look = {"color": style.paper, "marker": "|", "linestyle": "none", "markersize": 9}
                    (handles[source],) = panel.plot(xs, ys, zorder=1, **look)
                if not found:
                    continue
                estimates = [e for _, e in found]
                handles[stage] = points(panel, [heights[i] for i, _ in found], estimates, style.stage(k), across=True)
                shown += estimates
                path = ", ".join(f"{keys[i]} {number(e.value)}" for i, e in found)
                words.append(f"{domain}, {size}, {stage}: {path}")
            panel.set_yticks(range(len(keys)), labels or keys)
            panel.set_ylim(len(keys) - 0.5, -0.5)
            panel.set_xlim(*limits(scale))
            panel.set_title(f"{domain}, {size}", loc="left")
            if scale[0] < 0 < scale[1]:
                panel.axvline(0, color=style.dark, linewidth=0.6)
    label_below(axes, ends)
    order = sorted(handles, key=lambda label: label == source)  # stages first
    legend(figure, {label: handles[label] for label in order}, len(handles))
    return Drawn(name, title, "; ".join(words), figure, shown, printed)


def heat_map(axes: Any, values: Any, texts: Sequence[Sequence[str]], **look: Any) -> Any:
    """Cells with their text in an ink that stands out; NaN cells stay empty. Returns the image, for a colour bar."""
    image = axes.imshow(values, aspect="auto", **look)
    for i, line in enumerate(texts):
        for j, text in enumerate(line):
            if text:
                red, green, blue, _ = image.cmap(image.norm(values[i][j]))
                dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.5
                axes.text(j, i, text, ha="center", va="center", color="white" if dark else "black", fontsize=8)
    return image
