"""Multiple-choice questions with a right answer, from a file the user names, to measure capability.

Two layouts are read, both those of MMLU (arXiv 2009.03300): CSV with the columns question, A, B, C,
D and answer (a letter), with or without a header line; and JSONL with question, choices and answer
(an index from 0, or a letter). Both may carry a subject. A file may hold any 2 to 10 choices.
"""

import csv
import string
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from candor.battery_files import rotations
from candor.datafiles import json_lines, refuse_duplicates
from candor.errors import UserError
from candor.hashing import hash64, sha256_file
from candor.rows import Prompt

BATTERY = "multiple_choice"
_LETTERS = string.ascii_uppercase[:10]


@dataclass(frozen=True, slots=True)
class Question:
    """One question; ``answer`` is the index of the right choice."""

    question: str
    choices: tuple[str, ...]
    answer: int
    subject: str


def load_multiple_choice(path: Path, *, limit: int | None = None, rotate: bool = True) -> list[Prompt]:
    """Every question in every rotation of its choices (each letter is right equally often); 1 = right.

    ``limit`` keeps that many questions, the same ones whatever the file's order. ``rotate=False``
    asks each once, in the file's order, as the published accuracies are made.
    """
    questions = read_questions(path)
    refuse_duplicates([" ".join([q.question, *q.choices]) for q in questions], path, "questions")
    numbered = list(enumerate(questions, start=1))
    if limit is not None:
        numbered = sorted(sorted(numbered, key=lambda n: hash64(n[1].question, *n[1].choices))[:limit])
    sha = sha256_file(path)
    return [
        Prompt(
            prompt_id=f"{BATTERY}/{question.subject}/{number:05d}/{form}",
            battery=BATTERY,
            format="choice",
            group=question.subject,
            item=f"{number:05d}",
            cluster=f"{BATTERY}-{number:05d}",
            form=form,
            split="unseen",
            text=text,
            options=options,
            source_sha=sha,
        )
        for number, question in numbered
        for form, text, options in rotations(
            question.question,
            [(text, float(i == question.answer)) for i, text in enumerate(question.choices)],
            all_of_them=rotate,
        )
    ]


def read_questions(path: Path) -> list[Question]:
    """The questions of a CSV or JSONL file; UserError naming the line that cannot be read."""
    if not path.is_file():
        raise UserError(f"{path} does not exist (looked from {Path.cwd()}). Check the key 'multiple_choice'.")
    readers = {".csv": _read_csv, ".jsonl": _read_jsonl}
    if path.suffix.lower() not in readers:
        raise UserError(f"{path}: multiple-choice questions are read from .csv or .jsonl, not {path.suffix!r}.")
    try:
        found = list(readers[path.suffix.lower()](path))
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error}). Save it as UTF-8.") from error
    except csv.Error as error:
        raise UserError(f"{path}: not CSV ({error}). Does a quote never close?") from error
    if not found:
        raise UserError(f"{path} holds no questions.")
    return found


def _read_csv(path: Path) -> Iterator[Question]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, strict=True)
        columns: list[str] | None = None
        for row in reader:
            where = f"{path}, line {reader.line_num}"
            if not row:
                continue
            if columns is None:
                lower = [cell.strip().casefold() for cell in row]
                headed = "question" in lower and "answer" in lower
                columns = lower if headed else ["question", *_LETTERS.casefold()[: len(row) - 2], "answer"]
                letters = [c for c in columns if len(c) == 1]
                if sorted(letters) != list(_LETTERS.casefold()[: len(letters)]) or len(letters) < 2:
                    raise UserError(f"{where}: expected the columns question, A, B, ..., answer; found {row}.")
                if headed:
                    continue
            if len(row) != len(columns):
                raise UserError(f"{where}: {len(row)} columns, expected {len(columns)} ({', '.join(columns)}).")
            cells = dict(zip(columns, row, strict=True))
            choices = [cells[letter] for letter in sorted(c for c in columns if len(c) == 1)]
            yield _question(cells["question"], choices, cells["answer"].strip(), cells.get("subject"), where)


def _read_jsonl(path: Path) -> Iterator[Question]:
    for place, (where, row) in enumerate(json_lines(path)):
        if not isinstance(row, dict):
            raise UserError(f"{where}: expected an object with question, choices and answer.")
        if place == 0 and "canary" in row:
            continue  # a header line, as our own data files have it
        yield _question(row.get("question"), row.get("choices"), row.get("answer"), row.get("subject"), where)


def _question(question: object, choices: object, answer: object, subject: object, where: str) -> Question:
    """One question, checked."""
    if not isinstance(question, str) or not question.strip():
        raise UserError(f"{where}: the question is missing.")
    if not isinstance(choices, list) or not 2 <= len(choices) <= len(_LETTERS):
        raise UserError(f"{where}: expected 2 to {len(_LETTERS)} choices, found {choices!r}.")
    texts = tuple(str(c).strip() for c in choices)
    if not all(texts) or len({t.casefold() for t in texts}) < len(texts):
        raise UserError(f"{where}: a choice is empty, or two are the same: {list(texts)}.")
    index = answer
    if isinstance(answer, str):
        index = _LETTERS.find(answer.upper()) if len(answer) == 1 and not answer.isdecimal() else -1
        index = int(answer) if answer.isdecimal() else index
    if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < len(texts):
        raise UserError(f"{where}: the answer {answer!r} is none of the {len(texts)} choices (a letter, or 0, 1, ...).")
    name = subject.strip() if isinstance(subject, str) and subject.strip() not in ("", "all") else "all subjects"
    return Question(question.strip(), texts, index, name)
