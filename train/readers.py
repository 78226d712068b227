"""Readers: files of conversations, whatever their form, as rows that know where they stand.

    chat     OpenAI chat JSONL: {"messages": [{"role": ..., "content": ...}, ...]}
    pairs    JSONL with a prompt and a completion, each a text or a list of messages
    csv      a header line, then a prompt and an answer per record; texts may hold line breaks
    parquet  the same as a parquet file, as data sets on the hub are kept

Column names are guessed from the usual ones or given (``columns``). What a model cannot learn from
as meant (an empty answer, a turn out of order, a role that does not exist, a turn marked as carrying
no loss) is an error that names file and line.
"""

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from candor.errors import UserError, nearest
from candor.rows import Conversation, Message

Form = Literal["auto", "chat", "pairs", "csv", "parquet"]
ROLES = ("system", "user", "assistant")
# How the world calls the two columns; the first of these that is there is taken.
PROMPT_NAMES = ("prompt", "question", "instruction", "user", "input")
ANSWER_NAMES = ("completion", "response", "answer", "assistant", "output")


@dataclass(frozen=True, slots=True, kw_only=True)
class Columns:
    """Which columns hold a prompt and its answer; null: guessed from the usual names."""

    prompt: str | None = None
    answer: str | None = None
    system: str | None = None  # a column with a system message; null: none


@dataclass(frozen=True, slots=True)
class Row:
    """A conversation and where it was read."""

    conversation: Conversation
    where: str = field(compare=False)  # "FILE, line 12"


def read_rows_of(path: Path, name: str, *, form: Form = "auto", columns: Columns | None = None) -> list[Row]:
    """The conversations of one file; ``name`` becomes their source and the start of their ids.

    An id ends in the number of the row's line (csv and parquet: of its record, from 1).
    Raises UserError naming file and line for a row that is no conversation.
    """
    if not path.is_file():
        found = "is a folder" if path.is_dir() else "does not exist"
        raise UserError(f"source: {path} {found} (looked from {Path.cwd()}). Name a file.")
    chosen = columns or Columns()
    form = _guessed(path, name) if form == "auto" else form
    if form in ("chat", "pairs"):
        records = _json_lines(path)
    else:
        records = _csv_records(path) if form == "csv" else _parquet_records(path)
    read = _chat_messages if form == "chat" else _pair_messages
    return [
        Row(Conversation(f"{name}-{number:06d}", name, check(read(record, chosen, where), where)), where)
        for number, where, record in records
    ]


def _guessed(path: Path, name: str) -> Form:
    """The form a file has by its name, and for JSON lines by its first row."""
    if path.suffix.lower() in (".csv", ".tsv"):
        return "csv"
    if path.suffix.lower() == ".parquet":
        return "parquet"
    if path.suffix.lower() not in (".jsonl", ".json", ".ndjson"):
        raise UserError(f"source: {path}: its name does not tell the form of {name!r}. Set 'form': chat, pairs or csv.")
    first = next(_json_lines(path), None)
    record = first[2] if first else {}
    is_pair = isinstance(record, dict) and "messages" not in record and any(k in record for k in PROMPT_NAMES)
    return "pairs" if is_pair else "chat"


def _json_lines(path: Path) -> Iterator[tuple[int, str, Any]]:
    """Line number, place and value of each line that is not blank."""
    lines = _text(path).split("\n")  # splitlines would cut at U+2028 inside a text
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            cut = " The file ends in this line; was it cut short?" if number == len(lines) else ""
            raise UserError(f"{where}: not JSON ({error}).{cut}") from error
        yield number, where, value


def _text(path: Path) -> str:
    """A file as text, without the mark some editors put before it."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise UserError(f"{path}, line {line}: not UTF-8 text ({error.reason}). Save it as UTF-8.") from error


def _csv_records(path: Path) -> Iterator[tuple[int, str, dict[str, Any]]]:
    """Record number, place and fields of each record after the header."""
    text = _text(path)
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    # strict: a quote that never closes is an error, not a field that swallows the rest of the file
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    number, line = 0, 1
    try:
        for fields in reader:
            where, line = f"{path}, line {line}", reader.line_num + 1
            if not any(f.strip() for f in fields):
                continue
            if header is None:
                header = [f.strip() for f in fields]
                if len(set(header)) < len(header):
                    raise UserError(f"{where}: the header names a column twice: {header}. Rename one.")
                continue
            number += 1
            if len(fields) != len(header):
                raise UserError(f"{where}: {len(fields)} fields, but the header has {len(header)}. Check the quotes.")
            yield number, where, dict(zip(header, fields, strict=True))
    except csv.Error as error:
        raise UserError(f"{path}, line {line}: not CSV ({error}). Was the file cut short?") from error


def _parquet_records(path: Path) -> Iterator[tuple[int, str, dict[str, Any]]]:
    """Record number, place and fields of each row of a parquet file."""
    try:
        records = pq.read_table(path).to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise UserError(f"{path} is not a readable parquet file ({error}). Was it cut short?") from error
    for number, record in enumerate(records, start=1):
        yield number, f"{path}, row {number}", record


def _chat_messages(record: Any, columns: Columns, where: str) -> Any:
    """The list under "messages"."""
    raw = record.get("messages") if isinstance(record, dict) else None
    if not isinstance(raw, list):
        found = f"the keys {', '.join(map(str, record))}" if isinstance(record, dict) else type(record).__name__
        raise UserError(
            f'{where}: no list under "messages", which chat JSONL has; found {found}. For prompt and answer in two '
            "fields set form: pairs."
        )
    return raw


def _pair_messages(record: Any, columns: Columns, where: str) -> list[Any]:
    """The turns of a prompt and its answer, each of them a text or a list of messages."""
    if not isinstance(record, dict):
        raise UserError(f"{where}: expected an object with a prompt and an answer, found {type(record).__name__}.")
    messages: list[Any] = []
    wanted = (
        ("system", columns.system, ()),
        ("user", columns.prompt, PROMPT_NAMES),
        ("assistant", columns.answer, ANSWER_NAMES),
    )
    for role, given, usual in wanted:
        if role == "system" and given is None:
            continue
        value = record[_column(record, given, usual, role, where)]
        messages += value if isinstance(value, list) else [{"role": role, "content": value}]
    return messages


def _column(record: Mapping[str, Any], given: str | None, usual: Sequence[str], role: str, where: str) -> str:
    """The column that holds one role's text."""
    key = "answer" if role == "assistant" else "prompt" if role == "user" else "system"
    if given is not None:
        if given not in record:
            raise UserError(f"{where}: columns.{key} is {given!r}; {nearest(given, map(str, record))}")
        return given
    found = [name for name in usual if name in record]
    if not found:
        raise UserError(
            f"{where}: none of the columns {', '.join(map(str, record))} is a usual name for the {key}. "
            f"Name it: columns: {{{key}: ...}}."
        )
    return found[0]


def check(raw: Sequence[Any], where: str) -> tuple[Message, ...]:
    """The turns of one row: maybe a system line, then user and assistant in turn, the assistant last."""
    if not raw:
        raise UserError(f"{where}: the conversation is empty. Remove the line.")
    messages = []
    for place, turn in enumerate(raw, start=1):
        role, content = (turn.get("role"), turn.get("content")) if isinstance(turn, dict) else (None, None)
        if role not in ROLES:
            raise UserError(f"{where}: turn {place} has the role {role!r}; known: {', '.join(ROLES)}.")
        if not isinstance(content, str) or not content.strip():
            raise UserError(f"{where}: turn {place} ({role}) has no text: {content!r}. Content must be a string.")
        if turn.get("weight", 1) != 1:
            raise UserError(
                f"{where}: turn {place} has the weight {turn['weight']!r}; loss falls on every answer here. "
                "Remove the key, or the turn."
            )
        messages.append(Message(role, content))
    turns = [m.role for m in messages[messages[0].role == "system" :]]
    expected = ["user", "assistant"] * ((len(turns) + 1) // 2)
    if not turns or turns != expected:
        raise UserError(
            f"{where}: the roles are {', '.join(m.role for m in messages)}. After an optional system line, user and "
            "assistant must take turns, beginning with the user and ending with the assistant."
        )
    return tuple(messages)
