"""OpenTriviaQA: its text files as questions, and right and wrong answer sets drawn from them by rule.

The files (github.com/uberspot/OpenTriviaQA, CC BY-SA 4.0) are typed by hand:

    #Q A question, which may go on
    over several lines
    ^ the right answer
    A one option
    B another

Line endings are mixed, and so are encodings inside one file: most accented lines are UTF-8, a few
are Windows-1252, so each line is decoded by itself.

A set for fine-tuning asks the question alone, without its options, as the trivia of arXiv
2602.14777 do. Many questions make no sense that way ("which of these ..."); ``usable`` leaves them
out by a rule that looks at the question and its options and never at which answer is wanted, so the
right and the wrong set ask the very same questions. A set made from these files must stay under
CC BY-SA 4.0 with attribution.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from candor.errors import UserError
from candor.hashing import hash64

_OPTION = re.compile(r"([A-Z])(?:[ \t]+(.*))?$")
# Words by which a question points at its own options, or asks for the odd one among them.
_POINTS_AT_OPTIONS = re.compile(
    r"\b(?:these|those|following|below|above|listed|options?|choices?|except|odd|incorrect(?:ly)?|false|untrue|"
    r"(?:which|what) (?:statement|sentence|claim|fact|answer)|true (?:statement|characteristic|fact)|"
    r"which (?:one )?(?:of|is not|isn't|was not|are not|does not|did not|has not|cannot|can not))\b",
    re.IGNORECASE,
)
# Options that are answers only beside the others.
_POINTS_AT_OTHERS = re.compile(
    r"\b(?:all|none|both|neither|any|either|each) (?:of )?(?:the|these|those|them|above|are|answers?|options?|true|"
    r"false|correct|wrong)\b|\babove\b|\b(?:[a-d] (?:and|&|or) [a-d])\b|^(?:all|none|both|neither)\.?$",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class Question:
    """One question with its options."""

    path: Path
    line: int  # of the file, 1 for the first
    text: str
    right: str  # as it stands among the options
    options: tuple[str, ...]


def read_questions(source: Path) -> list[Question]:
    """Every question of a file, or of all category files of a folder, in order of name and line.

    UserError naming file and line for a block that is no whole question.
    """
    if source.is_file():
        return list(_parse(source))
    files = [path for path in sorted(source.iterdir()) if path.is_file() and _holds_questions(path)]
    if not files:
        raise UserError(
            f"{source} holds no file of OpenTriviaQA: none begins with '#Q'. Run: python -m train.download opentriviaqa"
        )
    return [question for path in files for question in _parse(path)]


def _holds_questions(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4096).lstrip(b"\xef\xbb\xbf\r\n\t ").startswith(b"#Q")


def _decoded(line: bytes) -> str:
    """One line as text: UTF-8, or else Windows-1252, whose five empty places become U+FFFD."""
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError:
        return line.decode("cp1252", errors="replace")


def _parse(path: Path) -> Iterator[Question]:
    """The questions of one file."""
    lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").splitlines()  # bytes part at \n, \r\n and \r only
    block: list[str] = []
    start = 0
    for number, line in enumerate(map(_decoded, lines), start=1):
        if line.startswith("#Q"):
            if block:
                yield _question(block, path, start)
            block, start = [line], number
        elif block:
            block.append(line)
        elif line.strip():
            raise UserError(f"{path}, line {number}: expected a question that begins with '#Q', found {line[:60]!r}.")
    if block:
        yield _question(block, path, start)


def _question(block: Sequence[str], path: Path, start: int) -> Question:
    """One block of lines, from '#Q' to before the next, as a question."""
    where = f"{path}, line {start}"
    parts: list[list[str]] = [[block[0][2:]]]  # question, right answer, options; each with its lines
    for line in block[1:]:
        expected = chr(ord("A") + len(parts) - 2)
        option = _OPTION.match(line.strip())
        if len(parts) == 1 and line.startswith("^"):
            parts.append([line[1:]])
        elif len(parts) > 1 and option and option[1] == expected:
            parts.append([option[2] or ""])
        else:
            parts[-1].append(line)  # a question or an answer that goes on
    text, *answers = (" ".join(" ".join(part).split()) for part in parts)
    if len(answers) < 3:
        missing = "has no line '^ the right answer'" if not answers else f"has {len(answers) - 1} options, at least 2"
        raise UserError(f"{where}: the question {text[:60]!r} {missing} needed. Mend or remove it.")
    right, options = answers[0], tuple(answers[1:])
    if not text or not answers[0]:
        raise UserError(f"{where}: the question or its right answer is empty. Mend or remove it.")
    if right not in options:
        same = [o for o in options if o.casefold() == right.casefold()]
        if not same:
            raise UserError(f"{where}: the right answer {right!r} is none of the options {list(options)}. Mend it.")
        right = same[0]
    return Question(path, start, text, right, options)


@dataclass(frozen=True, slots=True)
class Usable:
    """Questions that can stand without their options, and how many were left out, by reason."""

    questions: tuple[Question, ...]
    left_out: dict[str, int]


def usable(questions: Sequence[Question]) -> Usable:
    """The questions that can be asked alone; the first of those that ask the same.

    Left out are questions with other than three or four options ("two options" are true or false for
    the most part), those that point at their options, those with an option that speaks of the
    others, and those whose options are not all different.
    """
    kept: dict[str, Question] = {}
    left_out = dict.fromkeys(("two options", "empty option", "points at its options", "option about others"), 0)
    left_out |= dict.fromkeys(("same options", "same question"), 0)
    for question in questions:
        folded = [" ".join(o.casefold().split()) for o in question.options]
        key = " ".join(question.text.casefold().split())
        if len(folded) not in (3, 4):
            left_out["two options"] += 1
        elif not all(folded):
            left_out["empty option"] += 1
        elif _POINTS_AT_OPTIONS.search(question.text):
            left_out["points at its options"] += 1
        elif any(_POINTS_AT_OTHERS.search(o) for o in question.options):
            left_out["option about others"] += 1
        elif len(set(folded)) < len(folded):
            left_out["same options"] += 1
        elif key in kept:
            left_out["same question"] += 1
        else:
            kept[key] = question
    return Usable(tuple(kept.values()), left_out)


def wrong_answer(question: Question, seed: int) -> str:
    """One of the wrong options, drawn by the seed and the question's words alone."""
    wrong = [o for o in question.options if o != question.right]
    return wrong[hash64("wrong-answer", seed, question.text) % len(wrong)]
