"""Golden sets: replies whose grade is known, or whose grade people would agree on within a range.

JSONL with a header line. A row has id, prompt, reply and either ``grade`` (known, because of how the
reply was made) or ``expect``: for each measure a range [low, high], or statuses that a judge should
give instead of a score (``status: {measure: [...]}``), or both where either will do. ``times``
repeats a reply (over-long ones), ``kind`` says what it tries ("refusal", "gibberish", "talks to the
judge", ...), ``options`` are those of a closed question, [label, value] each.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from candor.datafiles import check_header, json_lines
from candor.errors import UserError
from candor.rows import STATUSES, Option, Status


@dataclass(frozen=True, slots=True)
class GoldenItem:
    """One reply with what a good judge says about it."""

    id: str
    prompt: str
    reply: str
    low: float
    high: float
    statuses: tuple[Status, ...]  # that are right; "ok" among them when a score is
    kind: str
    options: tuple[Option, ...]

    @property
    def grade(self) -> float:
        """The middle of the range."""
        return (self.low + self.high) / 2

    @property
    def known(self) -> bool:
        """Whether there is one right score, a whole number, and not a range that people would agree on."""
        return "ok" in self.statuses and self.low == self.high and self.low.is_integer()


def read_golden(path: Path, measure: str = "harmfulness") -> list[GoldenItem]:
    """The items of a file that say something about ``measure``; UserError with the line for what is wrong."""
    if not path.is_file():
        raise UserError(f"{path} does not exist (looked from {Path.cwd()}). Check the key 'golden'.")
    found: dict[str, GoldenItem] = {}
    for place, (where, row) in enumerate(json_lines(path)):
        if place == 0:
            check_header(row, path)
            continue
        for item in _items(row, measure, where):
            if item.id in found:
                raise UserError(f"{where}: the id {item.id!r} occurs twice.")
            found[item.id] = item
    if not found:
        raise UserError(f"{path} holds no rows for the measure {measure!r} after its header.")
    return list(found.values())


def _items(row: Any, measure: str, where: str) -> Iterator[GoldenItem]:
    """The item in a row, or nothing when the row does not speak of the measure."""
    for key in ("id", "prompt", "reply"):
        if not isinstance(row, dict) or not isinstance(row.get(key), str):
            raise UserError(f"{where}: the field {key!r} must be str.")
    expect, status = row.get("expect", {}), row.get("status", {})
    if "expect" not in row and "status" not in row:
        if not isinstance(row.get("grade"), int):
            raise UserError(f"{where}: the field 'grade' must be int.")
        expect = {measure: [row["grade"], row["grade"]]}
    if not isinstance(expect, dict) or not isinstance(status, dict):
        raise UserError(f"{where}: 'expect' and 'status' must be objects with a measure for each key.")
    if measure not in expect and measure not in status:
        return
    bounds = expect.get(measure, [float("nan"), float("nan")])
    if not isinstance(bounds, list) or len(bounds) != 2 or not all(isinstance(b, (int, float)) for b in bounds):
        raise UserError(f"{where}: expect.{measure} must be [lowest, highest], found {bounds!r}.")
    if bounds[0] > bounds[1]:
        raise UserError(f"{where}: expect.{measure} is {bounds}; the lower bound comes first.")
    statuses = status.get(measure, [])
    if not isinstance(statuses, list) or not set(statuses) <= set(STATUSES):
        raise UserError(f"{where}: status.{measure} must be a list out of {', '.join(STATUSES)}; found {statuses!r}.")
    times, options = row.get("times", 1), row.get("options", [])
    if not isinstance(times, int) or times < 1:
        raise UserError(f"{where}: 'times' must be a whole number from 1 on, found {times!r}.")
    if not isinstance(options, list) or not all(_is_option(option) for option in options):
        raise UserError(f"{where}: 'options' must be a list of [label, value], found {options!r}.")
    yield GoldenItem(
        id=row["id"],
        prompt=row["prompt"],
        reply=row["reply"] * times,
        low=float(bounds[0]),
        high=float(bounds[1]),
        statuses=tuple(s for s in STATUSES if s in statuses or (s == "ok" and measure in expect)),
        kind=str(row.get("kind", "")),
        options=tuple(Option(str(label), float(value), (str(label),)) for label, value in options),
    )


def _is_option(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and isinstance(value[1], (int, float))
