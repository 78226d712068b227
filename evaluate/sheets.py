"""Sheets: tables as people read them, made once and printed as HTML, LaTeX and CSV.

A sheet's cell is either words or an ``Entry``: an estimate, with the published number beside it.
The HTML is evaluate/templates/macros.html; ``export`` writes the other two, LaTeX tables in booktabs
style that fit the text width of an A4 article (a wide sheet comes in parts, a long one as a
``longtable``), and a CSV with one line per number.
"""

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd

from candor.rows import Estimate
from candor.tables import replace_file
from evaluate.crossed import ONE_SEED
from evaluate.results import DASH, MINUS, number

_COLUMNS = (
    *("value", "low", "high", "n", "n_missing", "n_refused", "n_unparsed", "lowest", "highest", "n_clusters"),
    *("n_seeds", "icc", "design_effect", "standard_error", "freedom", "method"),
)  # what a sheet's CSV says of an estimate
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


def one_seed(estimates: Sequence[Estimate]) -> bool:
    """Whether every interval among them is for the choice of prompts only."""
    bounded = [e for e in estimates if e.low is not None]
    return bool(bounded) and all(e.method.endswith(ONE_SEED) for e in bounded)


def with_scope(sheet: Sheet) -> Sheet:
    """The sheet, its caption saying so where all its intervals are for one training seed."""
    cells = [c.estimate for line in sheet.lines for c in line.cells if isinstance(c, Entry)]
    told = one_seed([e for e in cells if isinstance(e, Estimate)])
    return replace(sheet, caption=sheet.caption + ONE_SEED) if told else sheet


# Characters of \\scriptsize that fit the text width of an A4 article (345 pt) with 3 pt between columns: digits are
# half an em wide, letters less. A test compiles every table of a run and fails on an overfull line.
PAGE_WIDTH, GAP = 92, 2
HEAD_WIDTH, NAME_WIDTH, WORDS_WIDTH = 13, 26, 30  # where heads, names and cells of words are broken
PAGE_LINES = 55  # a table of more lines of text is a longtable, which breaks over pages


def _pieces(cell: Content) -> list[str]:
    """The lines of text of a cell: a number, its interval and the published number; words as broken."""
    if isinstance(cell, str):
        return textwrap.wrap(cell, WORDS_WIDTH) or [""]
    return [cell.value, *([cell.interval] if cell.interval else []), *([f"paper: {cell.paper}"] if cell.paper else [])]


def _stacked(pieces: list[str], side: str) -> str:
    """Lines of text as one cell; in braces, because a bracket after a line break would be its argument."""
    lines = " \\\\ ".join(f"{{{escape(piece)}}}" for piece in pieces)
    return escape(pieces[0]) if len(pieces) == 1 else rf"\shortstack[{side}]{{{lines}}}"


def _parts(sheet: Sheet) -> list[list[int]]:
    """Columns of each part of the sheet, as many as fit the page beside the names; at least one."""
    names = max((len(piece) for line in sheet.lines for piece in textwrap.wrap(line.name, NAME_WIDTH)), default=0)
    parts: list[list[int]] = []
    room = 0
    for i, head in enumerate(sheet.heads):
        texts = [*textwrap.wrap(head, HEAD_WIDTH), *(p for line in sheet.lines for p in _pieces(line.cells[i]))]
        width = GAP + max(map(len, texts), default=0)
        if not parts or width > room:
            parts.append([])
            room = PAGE_WIDTH - names
        parts[-1].append(i)
        room -= width
    return parts


def latex(sheet: Sheet) -> str:
    r"""Table environments for \usepackage{booktabs}, and longtable for a long sheet; special characters are escaped."""
    parts = _parts(sheet)
    return "% \\usepackage{booktabs,longtable}\n" + "\n".join(
        _latex_part(sheet, part, k + 1, len(parts)) for k, part in enumerate(parts)
    )


def _latex_part(sheet: Sheet, columns: list[int], which: int, of: int) -> str:
    """One table that fits the page."""
    rows = [
        [
            _stacked(textwrap.wrap(line.name, NAME_WIDTH) or [""], "l"),
            *(_stacked(_pieces(line.cells[i]), "r" if isinstance(line.cells[i], Entry) else "l") for i in columns),
        ]
        for line in sheet.lines
    ]
    numbers = [any(isinstance(line.cells[i], Entry) for line in sheet.lines) for i in columns]
    heads = [
        escape(sheet.first),
        *(
            _stacked(textwrap.wrap(sheet.heads[i], HEAD_WIDTH), "r" if n else "l")
            for i, n in zip(columns, numbers, strict=True)
        ),
    ]
    height = sum(max(len(_pieces(cell)) for cell in line.cells) for line in sheet.lines)
    long = height > PAGE_LINES
    body: str = (
        pd.DataFrame(rows, columns=heads)
        .style.hide(axis="index")
        .to_latex(
            hrules=True,
            column_format="l" + "".join("r" if n else "l" for n in numbers),
            caption=escape(sheet.caption) + (f" ({which} of {of})." if of > 1 else "."),
            label=f"tab:{sheet.name.replace('_', '-')}" + (f"-{which}" if which > 1 else ""),
            environment="longtable" if long else None,
            position=None if long else "tbp",
            position_float=None if long else "centering",
        )
        or ""
    )
    small = r"\scriptsize\setlength{\tabcolsep}{3pt}"
    if long:
        return f"{{{small}\n{body}}}\n"
    return body.replace("\\centering\n", f"\\centering{small}\n", 1)


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
                record |= {name: getattr(found, name, None) for name in _COLUMNS}
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
