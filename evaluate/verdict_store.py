"""The store of judges' answers: what was asked of whom, and every word and probability that came back.

A folder of small tables, each written whole or not at all and never changed. Several processes may
add to one folder without a lock, because each writes files of its own; a rerun reads what is there
and asks only for the rest. Only answers are stored: a call that failed leaves nothing behind, so it
is made again. A table that is damaged is set aside as ``*.bad`` and said so; where the machine fails
to read one (candor/tables.py) it stays, and the error is raised.

Beside the tables, ``spent/`` says what the answers have cost: one small file for each run that asked,
renewed whenever it stores. Money is counted there, by whom and as it was spent (a batch is cheaper, a
price changes, a call that timed out is billed and stores nothing), and never worked out from answers.

An answer lies under the hash of what produced it (the judge's identity, its template, the request
and the reply), not under a sample: equal replies are asked about once, and a folder copied to
another machine is as good there.
"""

import json
import os
import sys
import uuid
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from candor.errors import UserError
from candor.tables import iter_rows, replace_file, write_rows

MERGED, SPENT = "answers.parquet", "spent"


@dataclass(frozen=True, slots=True)
class Answer:
    """What a judge answered to one question; verdicts are read from it, as often as one likes."""

    ask_sha: str  # of everything that produced the answer
    reply: str
    finish_reason: str  # "stop", "length", "content_filter", "refusal" or "too_long"
    probabilities: tuple[float, ...]  # of every possible answer, from a local engine; else empty
    evidence: str  # JSON {answer so far: {token: log-probability}}, from an endpoint; "" where it gives none
    model: str  # who answered, in the endpoint's words
    input_tokens: int
    output_tokens: int


class AnswerStore:
    """One folder of answers."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def tables(self) -> list[Path]:
        """The tables there are, in a fixed order."""
        return sorted(self.folder.glob("*.parquet"))

    def read(self) -> Iterator[Answer]:
        """Every answer, one table in memory at a time; of equal questions the first table's counts."""
        for path in self.tables():
            try:
                rows = list(iter_rows([path], Answer))
            except FileNotFoundError:
                continue  # merged by another process while it was opened
            except (UserError, ValueError, TypeError) as error:
                if not path.exists():  # merged by another process meanwhile; it is read under its new name
                    continue
                aside = path.with_suffix(".parquet.bad")
                path.replace(aside)
                sys.stderr.write(f"{path} set aside as {aside.name}; its answers are asked for again: {error}\n")
                continue
            yield from rows

    def add(self, answers: Sequence[Answer], name: str = "") -> None:
        """Write a table; without a name it gets one of its own that no other process can take."""
        if answers:
            own = name or f"part-{os.getpid()}-{uuid.uuid4().hex}"
            write_rows(self.folder / f"{own}.parquet", Answer, answers)

    def note(self, run: str, account: dict[str, Any]) -> None:
        """Write what one run has taken so far (Ledger.account), in place of what it wrote before."""
        replace_file(self.folder / SPENT / f"{run}.json", json.dumps(account).encode())

    def merge(self, first: Iterable[str]) -> None:
        """Put everything into one table, answers to ``first`` in that order before the rest, and delete the parts.

        For a folder that nobody else uses.
        """
        parts = self.tables()
        if [p.name for p in parts] == [MERGED]:
            return
        kept: dict[str, Answer] = {}
        for answer in self.read():
            kept.setdefault(answer.ask_sha, answer)
        order = {sha: place for place, sha in enumerate(first)}
        rows = sorted(kept.values(), key=lambda a: (order.get(a.ask_sha, len(order)), a.ask_sha))
        write_rows(self.folder / MERGED, Answer, rows)
        for path in parts:
            if path.name != MERGED:
                path.unlink(missing_ok=True)


def accounts(folder: Path) -> dict[str, dict[str, Any]]:
    """What every run has taken that asked with a store in the folder or below it, by the run's name."""
    files = sorted(folder.rglob(f"{SPENT}/*.json"))
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in files}
