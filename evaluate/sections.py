"""Sections of the report that a table in RUN/tables brings with it.

A stage that adds a table (tests, effects, another judge, the course of training) needs no code
here: evaluate/templates/sections.yaml says where the table is shown, under which heading, and
which of its columns. A table that is not described there is shown whole, under "Further tables".
A table without the columns that its section needs is an error, not an empty section.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from candor.config import build, read_yaml
from candor.errors import UserError
from evaluate.results import measure_name
from evaluate.sheets import Content, Entry, Line, Plain, Sheet, p_entry

OWN = {"scores", "estimates", "variants"}  # shown elsewhere in the report
MORE = "more"
MOST_ROWS = 300  # of one table on the page; the file has them all


@dataclass(frozen=True, kw_only=True)
class Section:
    """How one table is shown."""

    table: str  # RUN/tables/TABLE.parquet or .csv
    name: str = ""  # of the section's own files; the table's where a table has one section
    part: str  # the part of the report it belongs to
    heading: str
    text: str = ""
    columns: dict[str, str] = field(default_factory=dict)  # column -> its head; the first names the rows
    optional: tuple[str, ...] = ()  # of the columns, those that may be absent
    only: dict[str, tuple[str, ...]] = field(default_factory=dict)  # column -> the values whose rows are shown
    across: tuple[str, ...] = ()  # columns whose values become heads, with the column "value" below them
    digits: dict[str, int] = field(default_factory=dict)  # of a column's numbers; 2 unless told
    p_values: tuple[str, ...] = ()  # columns printed as p-values


@dataclass(frozen=True, slots=True)
class Shown:
    """A section as the template needs it."""

    section: Section
    sheet: Sheet
    file: str  # relative to the run folder
    n_rows: int


def read_sections(path: Path) -> list[Section]:
    """The descriptions in a YAML list."""
    record: Any = read_yaml(path)
    if not isinstance(record, list):
        raise UserError(f"{path}: expected a list of sections, found {type(record).__name__}.")
    return [build(Section, dict(entry), where=f"{path}[{i}]") for i, entry in enumerate(record)]


def table_files(run: Path) -> dict[str, Path]:
    """Tables that stages added to RUN/tables, parquet before CSV of the same name."""
    found: dict[str, Path] = {}
    for kind in ("csv", "parquet"):
        found |= {p.stem: p for p in sorted((run / "tables").glob(f"*.{kind}"))}
    return {name: path for name, path in sorted(found.items()) if name not in OWN}


def _read(path: Path) -> pd.DataFrame:
    try:
        return pd.read_parquet(path) if path.suffix == ".parquet" else pd.read_csv(path)
    except (ValueError, OSError) as error:
        raise UserError(f"{path} cannot be read as a table ({error}). Rerun the stage that writes it.") from error


def _content(record: dict[str, Any], column: str, section: Section) -> Content:
    """One cell: a number with its interval where columns give one, or words."""
    value = record[column]
    if value is None or (isinstance(value, float) and pd.isna(value)):
        return Entry(None)
    if isinstance(value, bool):
        return "yes" if value else "no"
    if not isinstance(value, (int, float)):
        return measure_name(str(value)) if column == "measure" else str(value)
    if column in section.p_values:
        return p_entry(float(value))
    stem = "" if column == "value" else f"{column}_"
    low, high = (record.get(f"{stem}{end}") for end in ("low", "high"))
    bounds = (None, None) if low is None or high is None or pd.isna(low) or pd.isna(high) else (float(low), float(high))
    digits = section.digits.get(column, 0 if isinstance(value, int) else 2)
    words = f"{value:,}" if isinstance(value, int) and column not in section.digits else ""
    return Entry(Plain(float(value), *bounds), digits=digits, words=words)


def to_sheet(frame: pd.DataFrame, section: Section, path: Path) -> Sheet:
    """A table's columns as a sheet; UserError when one that is needed is absent."""
    columns = section.columns or {str(c): str(c).replace("_", " ") for c in frame.columns}
    lacking = [
        c for c in (*columns, *section.only, *section.across) if c not in frame.columns and c not in section.optional
    ]
    if lacking:
        raise UserError(
            f"{path} has no column {', '.join(lacking)}, which the section {section.heading!r} of the report shows. "
            f"It has {', '.join(map(str, frame.columns))}. Rerun the stage that writes it, or change sections.yaml."
        )
    if section.across:
        return _pivoted(frame, section, columns)
    (first, head), *others = [(c, h) for c, h in columns.items() if c in frame.columns]
    records = frame.head(MOST_ROWS).to_dict("records")
    lines = [Line(str(r[first]), tuple(_content(r, c, section) for c, _ in others)) for r in records]
    return Sheet(section.name or section.table, section.heading, head, tuple(h for _, h in others), tuple(lines))


def _pivoted(frame: pd.DataFrame, section: Section, columns: dict[str, str]) -> Sheet:
    """A long table turned: one line per value of the first column, one column per combination of ``across``."""
    first, head = next(iter(columns.items()))
    cells: dict[str, dict[str, Content]] = {}
    for record in frame.to_dict("records"):
        place = ", ".join(measure_name(str(record[c])) for c in section.across)
        cells.setdefault(str(record[first]), {})[place] = _content(record, "value", section)
    heads = list(dict.fromkeys(place for line in cells.values() for place in line))
    lines = [Line(name, tuple(line.get(h, Entry(None)) for h in heads)) for name, line in cells.items()]
    return Sheet(section.name or section.table, section.heading, head, tuple(heads), tuple(lines))


def chosen(frame: pd.DataFrame, section: Section) -> pd.DataFrame:
    """The rows that a section shows."""
    for column, values in section.only.items():
        if column in frame.columns:
            frame = frame[frame[column].astype(str).isin(values)]
    return frame


def shown_sections(run: Path, sections: list[Section]) -> dict[str, list[Shown]]:
    """Every section whose table is in the run, by part of the report, in the order of the YAML file."""
    files = table_files(run)
    known = {s.table for s in sections}
    unknown = [Section(table=t, part=MORE, heading=t.replace("_", " ").capitalize()) for t in files if t not in known]
    found: dict[str, list[Shown]] = {}
    for section in [*sections, *unknown]:
        if section.table not in files:
            continue
        path = files[section.table]
        frame = chosen(_read(path), section)
        if not frame.empty:
            sheet = to_sheet(frame, section, path)
            shown = Shown(section, sheet, path.relative_to(run).as_posix(), len(frame))
            found.setdefault(section.part, []).append(shown)
    return found
