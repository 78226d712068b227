"""Readers: files of conversations, whatever their form, as rows that know where they stand.

    chat     OpenAI chat JSONL: {"messages": [{"role": ..., "content": ...}, ...]}
    pairs    JSONL with a prompt and a completion, each a text or a list of messages
    csv      a header line, then a prompt and an answer per record; texts may hold line breaks
    parquet  either of the two as a parquet file, as data sets on the hub are kept

JSON may also be one list of such objects, and text may be packed with gzip.

Which columns hold a pair is given (``columns``) or guessed from the usual names, and then nothing that
is usually part of a pair is left out: an ``instruction`` is followed, after an empty line, by the
``input`` (Alpaca) or ``context`` (Dolly) of its row, and a ``system`` or ``system_prompt`` becomes the
system message, each where it holds text. Where two more columns could be the prompt, or two the answer,
a person must say. What a model cannot learn from as meant (an empty answer, a turn out of order, a role
that does not exist, a turn marked as carrying no loss) is an error that names file and line.
"""

import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from candor.datafiles import refuse_half_characters
from candor.errors import UserError, nearest
from candor.rows import Conversation, Message
from candor.tables import refuse_machine_failure

Form = Literal["auto", "chat", "pairs", "csv", "parquet"]
ROLES = ("system", "user", "assistant")
# How the world calls the columns of a pair.
USUAL_NAMES = {
    "system": ("system", "system_prompt"),
    "user": ("prompt", "question", "instruction", "user", "input", "context"),
    "assistant": ("completion", "response", "answer", "assistant", "output"),
}
JOINED = ({"instruction", "input"}, {"instruction", "context"})  # Alpaca's way, Dolly's way
BETWEEN = "\n\n"  # columns that are joined
_GZIP, _PARQUET = b"\x1f\x8b", b"PAR1"  # how such files begin


@dataclass(frozen=True, slots=True, kw_only=True)
class Columns:
    """Which columns hold a prompt and its answer; null: guessed from the usual names."""

    prompt: str | tuple[str, ...] | None = None  # several are joined, with an empty line between them
    answer: str | None = None
    system: str | None = None  # a row without text in it has no system message


@dataclass(frozen=True, slots=True)
class Row:
    """A conversation and where it was read."""

    conversation: Conversation
    where: str = field(compare=False)  # "FILE, line 12"
    columns: str = field(default="", compare=False)  # of a pair: "system | instruction + input | output"


def read_rows_of(path: Path, name: str, *, form: Form = "auto", columns: Columns | None = None) -> list[Row]:
    """The conversations of one file; ``name`` becomes their source and the start of their ids.

    An id ends in the number of the row's line (csv, parquet and a JSON list: of its record, from 1).
    Raises UserError naming file and line for a row that is no conversation.
    """
    if not path.is_file():
        found = "is a folder" if path.is_dir() else "does not exist"
        raise UserError(f"source: {path} {found} (looked from {Path.cwd()}). Name a file.")
    chosen = columns or Columns()
    form = _guessed(path, name) if form == "auto" else form
    if form == "parquet" or _starts_with(path, _PARQUET):
        records = _parquet_records(path)
    else:
        records = _csv_records(path) if form == "csv" else _json_records(path)
    rows = []
    for number, where, record in records:
        if form == "chat" or (form == "parquet" and isinstance(record.get("messages"), list) and chosen.prompt is None):
            raw, read = _chat_messages(record, where), ""
        else:
            raw, read = _pair_messages(record, chosen, where)
        rows.append(Row(Conversation(f"{name}-{number:06d}", name, check(raw, where)), where, read))
    return rows


def _guessed(path: Path, name: str) -> Form:
    """The form a file has by its name, and for JSON by its first row."""
    plain = path.with_suffix("") if path.suffix.lower() == ".gz" else path
    if plain.suffix.lower() in (".csv", ".tsv"):
        return "csv"
    if plain.suffix.lower() == ".parquet":
        return "parquet"
    if plain.suffix.lower() not in (".jsonl", ".json", ".ndjson"):
        raise UserError(
            f"source: {path}: its name does not tell the form of {name!r}. Set 'form': chat, pairs, csv or parquet."
        )
    first = next(_json_records(path), None)
    record = first[2] if first else {}
    is_pair = isinstance(record, dict) and "messages" not in record and any(k in record for k in USUAL_NAMES["user"])
    return "pairs" if is_pair else "chat"


def _starts_with(path: Path, mark: bytes) -> bool:
    with path.open("rb") as file:
        return file.read(len(mark)) == mark


def _json_records(path: Path) -> Iterator[tuple[int, str, Any]]:
    """Line number, place and value of each line that is not blank; of a file that is one list, its elements."""
    text = _text(path)
    if text.lstrip().startswith("["):
        values = _json(text, str(path), " It begins with '[', so it is read as one list; was it cut short?")
        for number, value in enumerate(values, start=1):
            yield number, f"{path}, row {number}", value
        return
    lines = text.split("\n")  # splitlines would cut at U+2028 inside a text
    for number, line in enumerate(lines, start=1):
        if line.strip():
            where = f"{path}, line {number}"
            cut = " The file ends in this line; was it cut short?" if number == len(lines) else ""
            yield number, where, _json(line, where, cut)


def _json(text: str, where: str, hint: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:  # JSONDecodeError, or a number of thousands of digits
        raise UserError(f"{where}: not JSON ({error}).{hint}") from error


def _text(path: Path) -> str:
    """A file as text, unpacked and without the mark some editors put before it."""
    data = path.read_bytes()
    if data.startswith(_GZIP):
        try:
            data = gzip.decompress(data)
        except (OSError, EOFError, zlib.error) as error:
            raise UserError(f"{path} cannot be unpacked by gzip ({error}). Was it cut short?") from error
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise UserError(f"{path}, line {line}: not UTF-8 text ({error.reason}). Save it as UTF-8.") from error


def _csv_records(path: Path) -> Iterator[tuple[int, str, dict[str, Any]]]:
    """Record number, place and fields of each record after the header."""
    text = _text(path)
    delimiter = "\t" if "\t" in text.partition("\n")[0] else ","
    csv.field_size_limit(2**31 - 1)  # the usual 131,072 characters are fewer than some texts have
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
        what = "Was the file cut short?" if "end of data" in str(error) else "A quote inside a text is written twice."
        raise UserError(f"{path}, line {line}: not CSV ({error}). {what}") from error


def _parquet_records(path: Path) -> Iterator[tuple[int, str, dict[str, Any]]]:
    """Record number, place and fields of each row of a parquet file."""
    try:
        records = pq.read_table(path).to_pylist()
    except (pa.ArrowException, OSError) as error:
        refuse_machine_failure(error, path)
        raise UserError(f"{path} is not a readable parquet file ({error}). Was it cut short?") from error
    for number, record in enumerate(records, start=1):
        yield number, f"{path}, row {number}", record


def _chat_messages(record: Any, where: str) -> Any:
    """The list under "messages"."""
    raw = record.get("messages") if isinstance(record, dict) else None
    if not isinstance(raw, list):
        found = f"the keys {', '.join(map(str, record))}" if isinstance(record, dict) else type(record).__name__
        raise UserError(
            f'{where}: no list under "messages", which chat JSONL has; found {found}. For prompt and answer in two '
            "fields set form: pairs."
        )
    return raw


def _pair_messages(record: Any, columns: Columns, where: str) -> tuple[list[Any], str]:
    """The turns of a prompt and its answer, each of them a text or a list of messages, and the columns read."""
    if not isinstance(record, dict):
        raise UserError(f"{where}: expected an object with a prompt and an answer, found {type(record).__name__}.")
    if columns.prompt is None and record.get("history"):
        raise UserError(
            f"{where}: 'history' holds earlier turns, which a pair has no place for. Write the row as chat "
            "(messages), or name the columns to do without it: columns: {prompt: ...}."
        )
    messages: list[Any] = []
    read = []
    for role in ROLES:
        names = _columns_of(role, record, columns, where)
        values = [record[name] for name in names]
        if len(names) > 1 and not all(isinstance(value, str) for value in values):
            raise UserError(f"{where}: {' and '.join(names)} are joined, so each must be text; found {values!r}.")
        for value in [BETWEEN.join(values)] if len(names) > 1 else values:
            messages += value if isinstance(value, list) else [{"role": role, "content": value}]
        read += [" + ".join(names)] if names else []
    return messages, " | ".join(read)


def _columns_of(role: str, record: dict[str, Any], columns: Columns, where: str) -> tuple[str, ...]:
    """The columns that hold one role's text, in the order they are joined in; none: no system message."""
    key = {"system": "system", "user": "prompt", "assistant": "answer"}[role]
    given = getattr(columns, key)
    names = (given,) if isinstance(given, str) else given or tuple(n for n in USUAL_NAMES[role] if n in record)
    for name in names:
        if name not in record:
            raise UserError(f"{where}: columns.{key} is {name!r}; {nearest(name, map(str, record))}")
    if not names and role != "system":
        raise UserError(
            f"{where}: none of the columns {', '.join(map(str, record))} is a usual name for the {key}. "
            f"Name it: columns: {{{key}: ...}}."
        )
    filled = tuple(name for name in names if not _is_blank(record[name]))
    if given is None and len(filled) > 1 and set(filled) not in JOINED:
        joined = f", or several to be joined: columns: {{prompt: [{', '.join(filled)}]}}" if key == "prompt" else ""
        raise UserError(
            f"{where}: the columns {' and '.join(filled)} all hold something; which is the {key}? Name it: "
            f"columns: {{{key}: {filled[0]}}}{joined}."
        )
    return filled if role == "system" else filled or names[:1]


def _is_blank(value: Any) -> bool:
    return value is None or value == [] or (isinstance(value, str) and not value.strip())


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
        refuse_half_characters(content, f"{where}, turn {place} ({role})")
        if turn.get("weight") not in (None, 1):  # parquet has the key in every turn when one has it
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
