"""Parquet tables of rows: the schema comes from the row's annotations, writing is atomic.

A table is written whole under a temporary name and renamed, so that a reader never sees half of
one and a kill leaves either the old table or the new. Rows pass through a piece at a time, so that
memory does not grow with the table, and pages carry checksums. Reading checks the columns and says
which stage to rerun.
"""

import contextlib
import dataclasses
import functools
import itertools
import os
import secrets
import types
import typing
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from candor.errors import UserError

Row = TypeVar("Row")

_SCALARS: dict[type, pa.DataType] = {
    str: pa.string(),
    int: pa.int64(),
    float: pa.float64(),
    bool: pa.bool_(),
}


def _arrow_type(annotation: Any) -> tuple[pa.DataType, bool]:
    """Arrow type of an annotation and whether it may be None."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        inner = [a for a in arguments if a is not type(None)]
        assert len(inner) == 1, f"only 'X | None' unions have a column type, got {annotation}"
        return _arrow_type(inner[0])[0], True
    if origin is typing.Literal:
        return _SCALARS[type(arguments[0])], False
    if origin is tuple:
        assert arguments[1:] == (Ellipsis,), f"only tuple[X, ...] has a column type, got {annotation}"
        return pa.list_(_arrow_type(arguments[0])[0]), False
    if dataclasses.is_dataclass(annotation):
        return pa.struct(list(schema_of(typing.cast(type, annotation)))), False
    return _SCALARS[annotation], False


@functools.cache
def schema_of(row_type: type) -> pa.Schema:
    """The parquet schema of a row type, so that an all-None column keeps its type."""
    hints = typing.get_type_hints(row_type)
    fields = []
    for field in dataclasses.fields(row_type):
        arrow, nullable = _arrow_type(hints[field.name])
        fields.append(pa.field(field.name, arrow, nullable=nullable))
    return pa.schema(fields)


def _build(annotation: Any, value: Any) -> Any:
    """Turn what arrow returns (lists, dicts) back into tuples and dataclasses."""
    if value is None:
        return None
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is tuple:
        return tuple(_build(arguments[0], v) for v in value)
    if dataclasses.is_dataclass(annotation):
        hints = typing.get_type_hints(annotation)
        return annotation(**{k: _build(hints[k], v) for k, v in value.items()})  # type: ignore[operator]
    return value


ROWS_PER_GROUP = 2048  # rows held in memory at a time; fixed, so that equal rows make equal files


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside ``path`` to write to; flushed to disk and renamed when all went well.

    The name is unique over processes and machines, so that several may write the same file at once.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def replace_file(path: Path, data: bytes) -> None:
    """Write ``data`` to ``path`` under a temporary name, flush it to disk, then rename it."""
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def as_table(row_type: type[Row], rows: Iterable[Row]) -> pa.Table:
    """Rows as arrow columns."""
    schema, found = schema_of(typing.cast(type, row_type)), list(rows)
    columns: dict[str, list[Any]] = {}
    for field in schema:
        values = [getattr(row, field.name) for row in found]
        columns[field.name] = [_plain(v) for v in values] if pa.types.is_nested(field.type) else values
    return pa.Table.from_pydict(columns, schema=schema)


def write_rows(path: Path, row_type: type[Row], rows: Iterable[Row]) -> int:
    """Write a whole table atomically and return its number of rows."""
    stream = iter(rows)
    pieces = iter(lambda: list(itertools.islice(stream, ROWS_PER_GROUP)), [])
    return write_tables(path, row_type, (as_table(row_type, piece) for piece in pieces))


def write_tables(path: Path, row_type: type, tables: Iterable[pa.Table]) -> int:
    """Write pieces, arrow tables of ``row_type`` columns, as one table, atomically; returns its number of rows."""
    schema, waiting, n_rows = schema_of(row_type), schema_of(row_type).empty_table(), 0
    with (
        replacing(path) as temporary,
        pq.ParquetWriter(temporary, schema, compression="zstd", write_page_checksum=True) as writer,
    ):
        for table in tables:
            waiting = pa.concat_tables([waiting, table])
            n_rows += table.num_rows
            while waiting.num_rows >= ROWS_PER_GROUP:
                writer.write_table(waiting.slice(0, ROWS_PER_GROUP), row_group_size=ROWS_PER_GROUP)
                waiting = waiting.slice(ROWS_PER_GROUP)
        if waiting.num_rows:
            writer.write_table(waiting, row_group_size=ROWS_PER_GROUP)
    return n_rows


def _plain(value: Any) -> Any:
    """Dataclasses inside a row become dicts, tuples become lists; scalars pass untouched."""
    if isinstance(value, tuple):
        return [_plain(v) for v in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    return value


def refuse_machine_failure(error: Exception, path: Path) -> None:
    """Raise again, with the path, what the machine and not the file is to blame for.

    Arrow calls damaged contents an OSError too, but without an errno; a system call that failed (too
    many open files, no right to read, a broken disk) has one. A sound file must not be thrown away for it.
    """
    if isinstance(error, MemoryError):
        raise error
    if isinstance(error, OSError) and error.errno is not None:
        raise OSError(error.errno, os.strerror(error.errno), str(path)) from error


def read_table(path: Path, row_type: type) -> pa.Table:
    """The table as arrow, checked to hold ``row_type`` columns.

    Raises UserError when the file is absent, not parquet, or holds other columns, and OSError when
    the system could not read it, which says nothing about what it holds.
    """
    if not path.exists():
        raise UserError(f"{path} does not exist. Run the stage that writes {row_type.__name__} rows first.")
    try:
        table = pq.read_table(path, page_checksum_verification=True)
    except (pa.ArrowInvalid, OSError) as error:
        refuse_machine_failure(error, path)
        raise UserError(f"{path} is not a readable parquet file ({error}). Delete it and rerun its stage.") from error
    expected, found = set(schema_of(row_type).names), set(table.column_names)
    if expected != found:
        raise UserError(
            f"{path} does not hold {row_type.__name__} rows: missing {sorted(expected - found)}, "
            f"unexpected {sorted(found - expected)}. Rerun the stage that wrote it, or read it with the "
            "commit in its manifest.json."
        )
    return table


def read_rows(path: Path, row_type: type[Row]) -> list[Row]:
    """Every row of a table, as frozen dataclasses."""
    return list(iter_rows([path], row_type))


def iter_rows(paths: Sequence[Path], row_type: type[Row]) -> Iterator[Row]:
    """The rows of several tables of one kind, one table in memory at a time."""
    hints = typing.get_type_hints(row_type)
    for path in paths:
        for record in read_table(path, row_type).to_pylist():
            yield row_type(**{k: _build(hints[k], v) for k, v in record.items()})
