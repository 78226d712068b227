"""Reading the data files people edit: JSONL with a header line, YAML with the header as keys.

Every such file names itself, its licence and a canary (a line that lets anyone find out whether
the file leaked into a training corpus). A file without them is refused.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from candor.config import read_yaml
from candor.errors import UserError

CANARY_MARK = "CANARY candor:"


def read_text(path: Path) -> str:
    """The text of a file that a person wrote, without the mark some programs put before it; UTF-8 or UserError."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error}). Save it as UTF-8.") from error


def refuse_half_characters(text: str, where: str) -> None:
    """UserError when a text holds a surrogate without its partner: JSON can spell one, UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{where}: holds {text[error.start]!a}, half of a character, which no file can be written with. Was a "
            "text cut in the middle of an emoji? Mend the text, or remove the row."
        ) from error


def check_header(header: Any, path: Path) -> dict[str, Any]:
    """The header if it names the file, its licence and a canary; UserError otherwise."""
    if not isinstance(header, dict):
        raise UserError(f"{path}: expected a header with name, licence and canary, found {type(header).__name__}.")
    for key in ("name", "licence", "canary"):
        if not isinstance(header.get(key), str) or not header[key].strip():
            raise UserError(f"{path}: the header lacks {key!r}. Add it (see configs/prompts/trivia.jsonl).")
    if not header["canary"].startswith(CANARY_MARK):
        raise UserError(f"{path}: the canary must start with {CANARY_MARK!r}, found {header['canary'][:40]!r}.")
    return header


def json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """Place and value of each line that is not blank; UserError naming one that is no JSON in UTF-8."""
    with path.open("rb") as file:  # lines of bytes end at \n alone: U+2028 may stand inside a text
        for number, line in enumerate(file, start=1):
            where = f"{path}, line {number}"
            try:
                text = line.decode("utf-8-sig")  # some editors put a mark before the first
                if not text.strip():
                    continue
                value = json.loads(text)
            except UnicodeDecodeError as error:
                raise UserError(f"{where}: not UTF-8 text ({error}). Save it as UTF-8.") from error
            except ValueError as error:
                raise UserError(f"{where}: not JSON ({error}).") from error
            refuse_half_characters(json.dumps(value, ensure_ascii=False), where)
            yield where, value


def read_jsonl(path: Path, required: tuple[str, ...]) -> list[dict[str, str]]:
    """The rows of a data file after its header; each must hold the required keys, not empty.

    Raises UserError naming the file, the line and what is wrong there.
    """
    if not path.is_file():
        raise UserError(f"{path} does not exist (looked from {Path.cwd()}). Check the path.")
    rows: list[dict[str, str]] = []
    for place, (where, value) in enumerate(json_lines(path)):
        if place == 0:
            check_header(value, path)
            continue
        if not isinstance(value, dict):
            raise UserError(f"{where}: expected an object with fields, found {type(value).__name__}.")
        for key in required:
            if key in value and not isinstance(value[key], str):
                raise UserError(f"{where}: the field {key!r} must be text, found {value[key]!r}.")
            if not value.get(key, "").strip():
                raise UserError(f"{where}: missing or empty field {key!r}.")
        rows.append(value)
    if not rows:
        raise UserError(f"{path} holds no rows after its header.")
    return rows


def read_headed_yaml(path: Path) -> dict[str, Any]:
    """A YAML data file whose top level holds the header keys beside its content."""
    return check_header(read_yaml(path), path)


def refuse_duplicates(values: list[str], path: Path, what: str) -> None:
    """UserError when two values are the same but for case and outer space, naming both rows."""
    first: dict[str, int] = {}
    for index, value in enumerate(values):
        key = " ".join(value.casefold().split())
        if key in first:
            raise UserError(
                f"{path}: {what} of rows {first[key] + 1} and {index + 1} are the same: {value!r}. Remove one."
            )
        first[key] = index


def expect_count(found: int, expected: int, path: Path, what: str) -> None:
    """UserError when a file does not hold the stated number of something."""
    if found != expected:
        raise UserError(f"{path}: {found} {what}, expected {expected}.")
