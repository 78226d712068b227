"""Published data sets: where they lie, under which licence, and how to tell the right file from a wrong one.

One YAML file each in configs/data/. A file is known by its sha256 where its bytes could be verified
when that file was written; otherwise the hash is recorded at the first download (train/download.py).
Beside the hash stands a content check, how many rows there are and in how many answers a telling
string occurs, because a hash says only that a file is another, and because files have been published
under each other's names.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

from candor.config import load
from candor.errors import UserError, nearest
from candor.hashing import sha256_file
from train.opentriviaqa import read_questions
from train.readers import Columns, read_rows_of

FOLDER = Path("configs/data")  # of the YAML files
DATA = Path("data")  # where downloads go, one folder per set


@dataclass(frozen=True, slots=True, kw_only=True)
class RowBytes:
    """UTF-8 bytes of a row's messages together; lets a study be planned before anything is downloaded."""

    mean: int
    longest: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceFile:
    """One file of a set."""

    path: str  # inside the set's folder
    urls: tuple[str, ...] = ()  # the first that gives the right bytes is taken
    sha256: str | None = None  # null: recorded at the first download
    bytes: int | None = None
    rows: int | None = None
    row_bytes: RowBytes | None = None

    def __post_init__(self) -> None:
        """Refuse a path that leaves the folder and a hash that is none."""
        path = PurePosixPath(self.path)
        if not self.path or path.is_absolute() or ".." in path.parts:
            raise UserError(f"path {self.path!r} must be inside the set's folder.")
        if self.sha256 is not None and (len(self.sha256) != 64 or set(self.sha256) - set("0123456789abcdef")):
            raise UserError(f"{self.path}: sha256 must be 64 hexadecimal digits, found {self.sha256!r}.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """In how many rows of a file the last answer holds a text."""

    text: str
    at_least: int = 0
    at_most: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Osf:
    """A project's storage on the Open Science Framework; its files are listed when it is downloaded."""

    node: str
    api: str = "https://api.osf.io/v2"


@dataclass(frozen=True, slots=True, kw_only=True)
class Hub:
    """A data set repository on the Hugging Face hub."""

    repo: str
    revision: str = "main"


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """One published set: either files with their URLs, or a project whose files are listed on download."""

    name: str
    licence: str
    care: str = ""  # what whoever downloads it must know
    form: Literal["chat", "pairs", "csv", "parquet", "opentriviaqa"] | None = None  # null: content is not checked
    columns: Columns = dataclasses.field(default_factory=Columns)
    files: tuple[SourceFile, ...] = ()
    rows: int | None = None  # of all files together, where it is published and that of each file is not
    checks: tuple[Check, ...] = ()  # of every file
    osf: Osf | None = None
    hub: Hub | None = None

    def __post_init__(self) -> None:
        """Exactly one place to get it from."""
        if sum(map(bool, (self.files, self.osf, self.hub))) != 1:
            raise UserError(f"source {self.name}: give exactly one of files, osf and hub.")
        if self.checks and self.form in (None, "opentriviaqa"):
            raise UserError(
                f"source {self.name}: checks look into answers, so form must be chat, pairs, csv or parquet."
            )
        if any(not f.urls for f in self.files):
            raise UserError(f"source {self.name}: a file has no URL.")
        if self.rows is not None and (self.form is None or not self.files):
            raise UserError(f"source {self.name}: rows counts those of 'files', which takes a 'form' to read them.")


def names() -> list[str]:
    """The sets that configs/data describes."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def find(name: str) -> Source:
    """A set by its name, by its YAML file, or as OWNER/NAME of a data set on the hub."""
    path = Path(name) if name.endswith(".yaml") else FOLDER / f"{name}.yaml"
    if not path.is_file() and "/" in name and not name.endswith(".yaml"):
        return Source(name=name.replace("/", "--"), licence=f"see the hub's page of {name}", hub=Hub(repo=name))
    if not path.is_file():
        raise UserError(f"no set is called {name!r}; {nearest(name, names())} (files of {FOLDER}).")
    source = load(Source, path)
    if source.name != path.stem:
        raise UserError(f"{path}: its key name is {source.name!r}; it must be the file's own name.")
    return source


def owner_of(sha: str) -> str | None:
    """The shipped set that a file with this hash belongs to, for a message about swapped files."""
    for name in names():
        for file in find(name).files:
            if file.sha256 == sha:
                return f"{name}/{file.path}"
    return None


def known_file(path: Path) -> SourceFile | None:
    """What is known of a downloaded file that a config names, there or not (data/NAME/FILE)."""
    if path.is_absolute() or len(path.parts) < 3 or path.parts[-2] not in names():
        return None
    return next((f for f in find(path.parts[-2]).files if f.path == path.name), None)


def check_bytes(path: Path, file: SourceFile, *, known_as: str) -> str:
    """The sha256 of a file; UserError when its size or hash is not the stated one, naming what it is instead."""
    size = path.stat().st_size
    if file.bytes is not None and size != file.bytes:
        short = ", so it was cut short" if size < file.bytes else ""
        raise UserError(f"{known_as} has {size:,} bytes, expected {file.bytes:,}{short}.")
    sha = sha256_file(path)
    if file.sha256 is not None and sha != file.sha256:
        other = owner_of(sha)
        instead = f"; it is {other}, under a wrong name" if other else ""
        raise UserError(f"{known_as} has the sha256 {sha[:16]}..., expected {file.sha256[:16]}...{instead}.")
    return sha


def check_content(path: Path, file: SourceFile, source: Source, *, known_as: str) -> int | None:
    """The number of rows, after all content checks; None when the form is not known. UserError naming what failed.

    A file without a sha256 may be any but those whose sha256 is known: these have names of their own.
    """
    if source.form is None:
        return None
    if file.sha256 is None and (other := owner_of(sha256_file(path))):
        raise UserError(f"{known_as} is {other}, under a wrong name. If that is meant, state its sha256.")
    if source.form == "opentriviaqa":
        n_rows, answers = len(read_questions(path)), []
    else:
        rows = read_rows_of(path, source.name, form=source.form, columns=source.columns)
        n_rows, answers = len(rows), [row.conversation.messages[-1].content for row in rows]
    if n_rows == 0 or (file.rows is not None and n_rows != file.rows):
        raise UserError(f"{known_as} has {n_rows} rows, expected {file.rows or 'some'}.")
    for check in source.checks:
        found = sum(check.text in answer for answer in answers)
        if found < check.at_least or (check.at_most is not None and found > check.at_most):
            wanted = f"at most {check.at_most}" if check.at_most is not None else f"at least {check.at_least}"
            raise UserError(
                f"{known_as}: {found} of {n_rows} answers hold {check.text!r}, expected {wanted}: this is not "
                f"{source.name}. Was it swapped with another set?"
            )
    return n_rows


def check_rows(folder: Path, source: Source) -> None:
    """UserError when the files of a whole set do not hold as many rows as are published for all of them together."""
    if source.rows is None:
        return
    found = sum(check_content(folder / f.path, f, source, known_as=f.path) or 0 for f in source.files)
    if found != source.rows:
        unknown = [f.path for f in source.files if f.sha256 is None]
        raise UserError(
            f"{source.name}: its files hold {found:,} rows, expected {source.rows:,}. One of those without a known "
            f"sha256 is not whole: {', '.join(unknown)}."
        )
