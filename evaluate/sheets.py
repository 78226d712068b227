"""Sheets: tables as people read them, made once and printed as HTML, LaTeX and CSV.

A sheet's cell is either words or an ``Entry``: an estimate, with the published number beside it.
The HTML is evaluate/templates/macros.html; ``export`` writes the other two, a LaTeX table in
booktabs style that needs no other package, and a CSV with one line per number.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from candor.rows import Estimate
from candor.tables import replace_file
from evaluate.results import DASH, MINUS, number

LATEX = str.maketrans(
    {c: f"\\{c}" for c in "&%$#_{}"}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", MINUS: "$-$", DASH: "--"}
    | {"<": "$<$", ">": "$>$", "|": r"\textbar{}"}
)


@dataclass(frozen=True, slots=True)
class Plain:
    """A number that is no Estimate: a count, a p-value, a table of another stage."""

    value: float | None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True, slots=True)
class Entry:
    """A number of the study in a table, and what the paper has in its place."""

    estimate: Estimate | Plain | None
    published: float | None = None
    digits: int = 2
    words: str = ""  # shown in place of the digits, which it is still sorted by; e.g. "< 0.001"

    @property
    def value(self) -> str:
        """The number, or a dash."""
        return self.words or number(None if self.estimate is None else self.estimate.value, self.digits)

    @property
    def interval(self) -> str:
        """Its 95 % interval in brackets, or nothing."""
        found = self.estimate
        if found is None or found.value is None or found.low is None or found.high is None:
            return ""
        return f"[{number(found.low, self.digits)}, {number(found.high, self.digits)}]"

    @property
    def paper(self) -> str:
        """The published number, or nothing."""
        return "" if self.published is None else number(self.published)

    @property
    def missing(self) -> bool:
        """Whether there is no number."""
        return self.estimate is None or self.estimate.value is None

    @property
    def sort(self) -> str:
        """What a browser sorts by; nothing sorts last."""
        found = self.estimate
        return "" if found is None or found.value is None or math.isnan(found.value) else f"{found.value:.6g}"


Content = Entry | str


def p_entry(p: float | None) -> Entry:
    """A p-value as papers print it."""
    if p is None or math.isnan(p):
        return Entry(None)
    return Entry(Plain(p), digits=3, words="< 0.001" if p < 0.001 else "")


@dataclass(frozen=True, slots=True)
class Line:
    """One row: what it is about, and its cells."""

    name: str
    cells: tuple[Content, ...]


@dataclass(frozen=True, slots=True)
class Sheet:
    """One table."""

    name: str  # of its files
    caption: str
    first: str  # head of the column of names
    heads: tuple[str, ...]
    lines: tuple[Line, ...]

    def __post_init__(self) -> None:
        """Keep cells under their heads."""
        for line in self.lines:
            assert len(line.cells) == len(self.heads), f"{self.name}: {line.name} has {len(line.cells)} cells"

    @property
    def empty(self) -> bool:
        """Whether no cell holds anything."""
        return all(c.missing if isinstance(c, Entry) else not c for line in self.lines for c in line.cells)


def escape(text: str) -> str:
    """Text with LaTeX's special characters made harmless."""
    return text.translate(LATEX)


def _latex_cell(cell: Content) -> str:
    """A number above its interval and the published number; words as they are."""
    if isinstance(cell, str):
        return escape(cell)
    stack = [escape(cell.value)]
    if cell.interval:
        stack.append(rf"{{\scriptsize {escape(cell.interval)}}}")
    if cell.paper:
        stack.append(rf"{{\scriptsize paper: {escape(cell.paper)}}}")
    lines = " \\\\ ".join(stack)
    return lines if len(stack) == 1 else rf"\shortstack[r]{{{lines}}}"


def latex(sheet: Sheet) -> str:
    r"""A table environment for \usepackage{booktabs}; every special character is escaped."""
    rows = [[escape(line.name), *(_latex_cell(c) for c in line.cells)] for line in sheet.lines]
    frame = pd.DataFrame(rows, columns=[escape(h) for h in (sheet.first, *sheet.heads)])
    numbers = [any(isinstance(line.cells[i], Entry) for line in sheet.lines) for i in range(len(sheet.heads))]
    body: str = (
        frame.style.hide(axis="index").to_latex(
            hrules=True,
            column_format="l" + "".join("r" if n else "l" for n in numbers),
            caption=escape(sheet.caption) + ".",
            label=f"tab:{sheet.name.replace('_', '-')}",
            position="tbp",
            position_float="centering",
        )
        or ""
    )
    return "% \\usepackage{booktabs}\n" + body


def csv(sheet: Sheet) -> str:
    """One line per cell: an entry with all that its estimate says, words in the column ``text``."""
    records: list[dict[str, Any]] = []
    for line in sheet.lines:
        for head, cell in zip(sheet.heads, line.cells, strict=True):
            record: dict[str, Any] = {sheet.first: line.name, "column": head}
            if isinstance(cell, str):
                record["text"] = cell
            else:
                found = cell.estimate
                names = ("value", "low", "high", "n", "n_missing", "n_clusters", "method")
                record |= {name: getattr(found, name, None) for name in names}
                record["published"] = cell.published
            records.append(record)
    return str(pd.DataFrame(records).to_csv(index=False))


def export(sheets: list[Sheet], folder: Path) -> list[str]:
    """Write NAME.tex and NAME.csv of every sheet that holds something; returns their names."""
    written = []
    for sheet in sheets:
        if not sheet.empty:
            replace_file(folder / f"{sheet.name}.tex", latex(sheet).encode())
            replace_file(folder / f"{sheet.name}.csv", csv(sheet).encode())
            written.append(sheet.name)
    return written
