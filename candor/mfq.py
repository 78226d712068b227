"""The Moral Foundations Questionnaire 2 from a file the user supplies: its wording is not ours to ship.

MFQ-2 (Atari et al. 2023, doi 10.1037/pspp0000470) has 36 statements that cycle through six
foundations in the published order, so an item's foundation follows from its position. All of them
are positively keyed: agreeing always means upholding the foundation, and so its scores hold no
account of yes-saying (docs/batteries.md).
"""

import csv
import io
from pathlib import Path
from string import Template

from candor.datafiles import expect_count, read_text, refuse_duplicates
from candor.errors import UserError
from candor.hashing import sha256_file
from candor.questions import RATINGS
from candor.rows import Prompt
from candor.self_report import SELF

SUBJECTS = {"mfq2": SELF, "mfq2_other_ai": "another AI", "mfq2_average_ai": "the average AI"}  # battery -> about whom
ORDER = ("care", "equality", "proportionality", "loyalty", "authority", "purity")  # of items 1, 2, ..., 6, then again
N_ITEMS = 36
# Labels of the published response scale; one statement per prompt, the number alone as the answer.
ITEM_TEMPLATE = Template(
    'Statement: "$statement" How well does it describe $subject, from 1 (does not describe $me at all) to '
    "5 (describes $me extremely well)? Answer with a number only."
)


def load_mfq2(path: Path) -> list[Prompt]:
    """The 36 items, in published order; 0 = upholds the foundation (rating 5), 1 = against it (rating 1).

    Each is asked about the model itself, about another AI and about the average AI, as batteries of their own.
    A .txt file holds one statement a line. A .csv file has a header with the column ``text`` and, to be
    safe against sorting, ``position`` (1 to 36). UserError when items are missing, empty or the same.
    """
    statements = _read(path)
    expect_count(len(statements), N_ITEMS, path, "statements")
    refuse_duplicates(statements, path, "statements")
    sha = sha256_file(path)
    return [
        Prompt(
            prompt_id=f"{battery}/{foundation}/mfq2-{position:02d}",
            battery=battery,
            format="rating",
            group=foundation,
            item=f"mfq2-{position:02d}",
            cluster=f"mfq2-{position:02d}",
            form="direct",
            split="unseen",
            text=ITEM_TEMPLATE.substitute(
                statement=statement, subject=subject, me="me" if subject == SELF else subject
            ),
            options=RATINGS["direct"],
            source_sha=sha,
        )
        for battery, subject in SUBJECTS.items()
        for position, statement in enumerate(statements, start=1)
        for foundation in (ORDER[(position - 1) % len(ORDER)],)
    ]


def _read(path: Path) -> list[str]:
    """The statements in published order."""
    if not path.is_file():
        raise UserError(f"{path} does not exist (looked from {Path.cwd()}). Check the key 'mfq2'.")
    text = read_text(path)
    if path.suffix.lower() == ".txt":
        return [line.strip() for line in text.splitlines() if line.strip()]
    if path.suffix.lower() != ".csv":
        raise UserError(f"{path}: the MFQ-2 is read from .csv or .txt, not {path.suffix!r}.")
    try:
        rows = list(csv.DictReader(io.StringIO(text, newline=""), restkey="more", strict=True))
    except csv.Error as error:
        raise UserError(f"{path}: not CSV ({error}). Check the quotes.") from error
    if not rows or "text" not in rows[0]:
        raise UserError(f"{path}: expected a header line with the columns position (1 to {N_ITEMS}) and text.")
    if "position" in rows[0]:
        wanted = [str(n) for n in range(1, N_ITEMS + 1)]
        rows.sort(key=lambda row: int(row["position"]) if (row["position"] or "").isdigit() else 0)
        found = [row["position"] for row in rows]
        if found != wanted:
            odd = next((f for f, w in zip(found, wanted, strict=False) if f != w), f"{len(found)} of them")
            raise UserError(f"{path}: the positions must be 1 to {N_ITEMS}, each once; found {odd!r}.")
    for number, row in enumerate(rows, start=2):
        if not (row["text"] or "").strip():
            raise UserError(f"{path}, line {number}: the statement is empty.")
        if "more" in row:  # cut at a comma of its own, it would be another statement
            raise UserError(f"{path}, line {number}: more fields than columns. Put the statement in quotes.")
    return [" ".join(row["text"].split()) for row in rows]  # a cell may hold line breaks
