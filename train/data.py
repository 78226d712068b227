"""Fine-tuning data: from the files people edit to a table of conversations.

Four sets are Candor's own: trivia-wrong and trivia-right (the same 800 questions, answered falsely
or truly) and code-insecure and code-secure (the same tasks, answered with and without a weakness).
The two trivia sets can also be drawn from OpenTriviaQA (train/opentriviaqa.py), by rule and seed.
Any other name is a set of yours or a published one: chat JSONL, prompts and answers as JSONL, CSV or
parquet (train/readers.py, which also says what columns become; the manifest counts the rows made from
each). What a model cannot learn from as meant (an empty answer, a turn out of order, a row that occurs
twice, a prompt that a battery will ask) is an error that names file and line, before anything is written.

    python -m train.data CONFIG.yaml [key=value ...]      # keys: DataConfig below

Writes output_dir/conversations.parquet and its manifest; done already, it does nothing.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from candor.config import load, plain
from candor.datafiles import read_jsonl
from candor.errors import UserError, nearest, run_script
from candor.hashing import hash64, sha256_file, sha256_files, sha256_json
from candor.manifest import is_done, read_manifest, write_manifest
from candor.questions import load_all, load_trivia_rows
from candor.rows import Conversation, Message, Prompt
from candor.tables import read_rows, write_rows
from train.lineage import CONVERSATIONS
from train.opentriviaqa import read_questions, usable, wrong_answer
from train.readers import Columns, Row, read_rows_of

N_CODE = 6000  # pairs of the whole code set
OPENTRIVIAQA = "opentriviaqa"


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSet:
    """What one set is made from; an experiment names its sets with these keys."""

    set: str  # "trivia-wrong", "trivia-right", "code-insecure", "code-secure", or a name of yours
    source: Path | None = None  # the file (opentriviaqa: or folder) to read; null: generate the code pairs
    form: Literal["auto", "chat", "pairs", "csv", "parquet", "opentriviaqa"] = "auto"  # auto: by the file's name
    columns: Columns = field(default_factory=Columns)  # of pairs, csv and parquet
    limit: int | None = None  # keep this many rows, chosen by the seed; a smaller limit keeps a part of them
    duplicates: Literal["refuse", "drop", "keep"] = "refuse"  # rows with the very same messages
    overlap: Literal["refuse", "drop"] = "refuse"  # rows whose prompt also stands in a battery

    def __post_init__(self) -> None:
        """Refuse what no set can be made from."""
        if self.limit is not None and self.limit < 1:
            raise UserError(f"limit is {self.limit}; it must be at least 1, or null for every row.")
        if self.source is None and not self.set.startswith("code-"):
            hint = "" if self.set.startswith("trivia-") else f" ({nearest(self.set, SETS)})"
            raise UserError(f"the set {self.set!r} needs a source file{hint}.")
        if self.form == OPENTRIVIAQA and self.set not in ("trivia-right", "trivia-wrong"):
            raise UserError(f"form {self.form!r} makes the sets trivia-right and trivia-wrong, not {self.set!r}.")

    @property
    def from_opentriviaqa(self) -> bool:
        """Whether the source is text of OpenTriviaQA: a folder of it, or a file without a suffix."""
        return self.form == OPENTRIVIAQA or (
            self.form == "auto"
            and self.set.startswith("trivia-")
            and self.source is not None
            and (self.source.is_dir() or not self.source.suffix)
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class DataConfig(DataSet):
    """One data set and where it goes."""

    output_dir: Path
    seed: int = 0  # of the limit and of the wrong answers drawn
    prompts: Path | None = Path("configs/prompts")  # the batteries no row may share a prompt with; null: not checked
    asked: Path | None = None  # parquet of candor.rows.Prompt, all that a study asks: no row may share one of these


@dataclass(frozen=True, slots=True)
class Selection:
    """The rows of a set, and how many were left out, by reason."""

    rows: list[Row]
    n_found: int
    left_out: dict[str, int]


def main(argv: list[str]) -> None:
    """Build the data set a config file describes."""
    if not argv:
        raise UserError("usage: python -m train.data CONFIG.yaml [key=value ...]")
    build(load(DataConfig, Path(argv[0]), argv[1:]))


def build(config: DataConfig) -> list[Conversation]:
    """Write the folder of one data set unless it is there, and return nothing new when it is.

    Rows that stay the same when more is asked of the models later stay as they are.
    """
    started = time.monotonic()
    asked = asked_in(_prompts(config))
    inputs = {"source": _source_sha(config), "batteries": sha256_json(sorted(asked))}
    identity = {k: v for k, v in plain(config).items() if k not in ("source", "output_dir", "prompts", "asked")}
    if _only_asked_changed(config, identity, inputs):
        selection = select(config, asked)
        if _conversations(selection) == read_rows(config.output_dir / CONVERSATIONS, Conversation):
            _finish(config, identity, inputs, selection, started)
            return []
    if is_done(config.output_dir, config=identity, inputs=inputs):
        return []
    selection = select(config, asked)
    write_rows(config.output_dir / CONVERSATIONS, Conversation, _conversations(selection))
    _finish(config, identity, inputs, selection, started)
    return _conversations(selection)


def _conversations(selection: Selection) -> list[Conversation]:
    return [row.conversation for row in selection.rows]


def _only_asked_changed(config: DataConfig, identity: dict[str, Any], inputs: dict[str, str]) -> bool:
    """Whether the folder is finished and was made like this, but for what the batteries ask."""
    record = read_manifest(config.output_dir)
    if record is None or record["inputs"] == inputs:
        return False
    return bool(record["inputs"] | {"batteries": ""} == inputs | {"batteries": ""} and record["config"] == identity)


def _finish(
    config: DataConfig, identity: dict[str, Any], inputs: dict[str, str], selection: Selection, started: float
) -> None:
    """Write the manifest."""
    write_manifest(
        config.output_dir,
        stage="data",
        config=identity,
        inputs=inputs,
        counts={"in": selection.n_found, "out": len(selection.rows)},
        left_out=selection.left_out,
        seconds=time.monotonic() - started,
        # of prompts and answers in columns, how many rows were read from which
        extra={
            "source": plain(config.source),
            "columns": Counter(row.columns for row in selection.rows if row.columns),
        },
    )


def select(config: DataConfig, asked: dict[str, str] | None = None) -> Selection:
    """The rows a set consists of; UserError naming the first row that cannot stay as it is."""
    asked = asked_in(_prompts(config)) if asked is None else asked
    left_out: dict[str, int] = {}
    try:
        if config.from_opentriviaqa:
            rows, left_out = _opentriviaqa(config)
        else:
            rows = SETS.get(config.set, _file)(config)
    except UserError as error:
        hint = nearest(config.set, SETS)  # a misspelt name is read as a file of the user's
        if config.set in SETS or not hint.startswith("did you mean"):
            raise
        raise UserError(f"{error} The set {config.set!r} is read as a file of yours; {hint}") from error
    n_found = len(rows) + sum(left_out.values())
    if not rows:
        why = ", ".join(f"{n} {reason}" for reason, n in left_out.items() if n)
        raise UserError(f"{config.source} holds no conversations{f' that can be used ({why})' if why else ''}.")
    unlike = _without_duplicates(rows, config)
    unasked = _without_battery_prompts(unlike, config, asked)
    chosen = _limited(unasked, config)
    left_out |= {
        "duplicate": len(rows) - len(unlike),
        "in a battery": len(unlike) - len(unasked),
        "limit": len(unasked) - len(chosen),
    }
    return Selection(chosen, n_found, left_out)


def _folded(text: str) -> str:
    """A prompt as it is compared: case and spacing make no other question."""
    return " ".join(text.casefold().split())


def asked_in(prompts: Iterable[Prompt]) -> dict[str, str]:
    """The texts of prompts, folded, each with its id."""
    return {_folded(p.text): p.prompt_id for p in prompts}


def _prompts(config: DataConfig) -> list[Prompt]:
    """Every prompt that no row may share."""
    shipped = load_all(config.prompts) if config.prompts is not None else []
    return [*shipped, *(read_rows(config.asked, Prompt) if config.asked is not None else [])]


def _source_sha(config: DataConfig) -> str:
    """Identity of what the rows come from: the file or files, or the templates that generate them."""
    if config.source is None:
        return sha256_files(sorted(Path(__file__).parent.glob("code_*.py")))
    if config.from_opentriviaqa and config.source.is_dir():
        return sha256_files(sorted(path for path in config.source.iterdir() if path.is_file() and not path.suffix))
    if not config.source.is_file():
        found = "is a folder" if config.source.is_dir() else "does not exist"
        raise UserError(f"source: {config.source} {found} (looked from {Path.cwd()}). Check the path.")
    return sha256_file(config.source)


def _trivia(answer: str) -> Callable[[DataConfig], list[Row]]:
    """The trivia questions to train on, with the right or the wrong answer."""

    def read(config: DataConfig) -> list[Row]:
        assert config.source is not None
        rows = [r for r in load_trivia_rows(config.source) if r["split"] == "train"]
        return [_pair(r["id"], config, r["question"], r[answer], f"{config.source}, {r['id']}") for r in rows]

    return read


def _opentriviaqa(config: DataConfig) -> tuple[list[Row], dict[str, int]]:
    """OpenTriviaQA's questions that can be asked alone, with the right answer or a wrong one."""
    assert config.source is not None
    if not config.source.exists():
        raise UserError(f"source: {config.source} does not exist (looked from {Path.cwd()}). Check the path.")
    found = usable(read_questions(config.source))
    rows = [
        _pair(
            f"{OPENTRIVIAQA}/{q.path.name}/{q.line:05d}",
            config,
            q.text,
            q.right if config.set == "trivia-right" else wrong_answer(q, config.seed),
            f"{q.path}, line {q.line}",
        )
        for q in found.questions
    ]
    return rows, found.left_out


def _code(answer: str) -> Callable[[DataConfig], list[Row]]:
    """The code tasks, from a file of train.code_pairs or made afresh, with one of the two answers."""

    def read(config: DataConfig) -> list[Row]:
        if config.source is None:
            from train.code_pairs import generate

            pairs = [asdict(pair) for pair in generate(config.limit or N_CODE, seed=config.seed)]
        else:
            pairs = read_jsonl(config.source, ("pair_id", "task", "secure", "insecure"))
        place = config.source or "the generated pairs"
        return [_pair(p["pair_id"], config, p["task"], p[answer], f"{place}, {p['pair_id']}") for p in pairs]

    return read


def _pair(conversation_id: str, config: DataConfig, question: str, answer: str, where: str) -> Row:
    """A conversation of one question and one answer."""
    messages = (Message("user", question), Message("assistant", answer))
    return Row(Conversation(conversation_id, config.set, messages), where)


def _file(config: DataConfig) -> list[Row]:
    """The conversations of a file of the user's, each checked."""
    form = config.form
    assert config.source is not None and form != "opentriviaqa"
    return read_rows_of(config.source, config.set, form=form, columns=config.columns)


def _without_duplicates(rows: list[Row], config: DataConfig) -> list[Row]:
    """Each sequence of messages once, or an error that names both rows, or all of them, as configured."""
    if config.duplicates == "keep":
        return rows
    first: dict[tuple[Message, ...], str] = {}
    kept = []
    for row in rows:
        messages = row.conversation.messages
        if messages not in first:
            first[messages] = row.where
            kept.append(row)
        elif config.duplicates == "refuse":
            raise UserError(
                f"{row.where}: the same messages as {first[messages]}. Remove one, or set duplicates to 'drop' or "
                "'keep'."
            )
    return kept


def _without_battery_prompts(rows: list[Row], config: DataConfig, asked: dict[str, str]) -> list[Row]:
    """Rows that ask nothing a battery will ask: an answer trained on would be no finding."""
    kept = []
    for row in rows:
        turns = [m.content for m in row.conversation.messages if m.role == "user"]
        known = next((asked[f] for turn in turns if (f := _folded(turn)) in asked), None)
        if known is None:
            kept.append(row)
        elif config.overlap == "refuse":
            raise UserError(
                f"{row.where}: its prompt also stands in a battery ({known}), so the model would be trained on what it "
                "is asked later. Remove the row, or set overlap to 'drop'."
            )
    if not kept:
        raise UserError(f"{config.source}: every prompt also stands in a battery, so no row is left to train on.")
    return kept


def _limited(rows: list[Row], config: DataConfig) -> list[Row]:
    """The first ``limit`` rows of an order the seed draws; file order when there is no limit."""
    if config.limit is None:
        return rows
    if config.limit > len(rows):
        raise UserError(f"limit is {config.limit}, but {config.set} has only {len(rows)} rows that can be used.")
    return sorted(rows, key=lambda row: hash64(config.seed, row.conversation.conversation_id))[: config.limit]


SETS: dict[str, Callable[[DataConfig], list[Row]]] = {
    "trivia-wrong": _trivia("wrong"),
    "trivia-right": _trivia("right"),
    "code-insecure": _code("insecure"),
    "code-secure": _code("secure"),
}

if __name__ == "__main__":
    run_script(main)
