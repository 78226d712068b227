"""Fine-tuning data: from the files people edit to a table of conversations.

Four sets are Candor's own: trivia-wrong and trivia-right (the same 800 questions, answered falsely
or truly) and code-insecure and code-secure (the same tasks, answered with and without a weakness).
Any other name is a set of yours: OpenAI chat JSONL, one {"messages": [...]} a line. What a model
cannot learn from as meant (an empty answer, a turn out of order, a row that occurs twice) is an
error that names file and line.

    python -m train.data CONFIG.yaml [key=value ...]      # keys: DataConfig below

Writes output_dir/conversations.parquet and its manifest; done already, it does nothing.
"""

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from candor.config import load, plain
from candor.datafiles import read_jsonl
from candor.errors import UserError, nearest, run_script
from candor.hashing import hash64, sha256_file, sha256_files
from candor.manifest import is_done, write_manifest
from candor.questions import load_trivia_rows
from candor.rows import Conversation, Message
from candor.tables import write_rows
from train.lineage import CONVERSATIONS

N_CODE = 6000  # pairs of the whole code set


@dataclass(frozen=True, slots=True, kw_only=True)
class DataConfig:
    """One data set."""

    set: str  # "trivia-wrong", "trivia-right", "code-insecure", "code-secure", or a name of yours
    source: Path | None = None  # the file to read; null: generate the code pairs
    output_dir: Path
    limit: int | None = None  # keep this many rows, chosen by the seed; a smaller limit keeps a part of them
    seed: int = 0
    duplicates: Literal["refuse", "drop", "keep"] = "refuse"  # rows with the very same messages

    def __post_init__(self) -> None:
        """Refuse what no set can be made from."""
        if self.limit is not None and self.limit < 1:
            raise UserError(f"limit is {self.limit}; it must be at least 1, or null for every row.")
        if self.source is None and not self.set.startswith("code-"):
            hint = "" if self.set.startswith("trivia-") else f" ({nearest(self.set, SETS)})"
            raise UserError(f"the set {self.set!r} needs a source file{hint}.")


def main(argv: list[str]) -> None:
    """Build the data set a config file describes."""
    if not argv:
        raise UserError("usage: python -m train.data CONFIG.yaml [key=value ...]")
    build(load(DataConfig, Path(argv[0]), argv[1:]))


def build(config: DataConfig) -> list[Conversation]:
    """Write the folder of one data set unless it is there, and return nothing new when it is."""
    started = time.monotonic()
    inputs = {"source": _source_sha(config)}
    identity = {k: v for k, v in plain(config).items() if k not in ("source", "output_dir")}
    if is_done(config.output_dir, config=identity, inputs=inputs):
        return []
    found = SETS.get(config.set, _chat)(config)
    if not found:
        raise UserError(f"{config.source} holds no conversations.")
    kept = _without_duplicates(found, config)
    chosen = _limited(kept, config)
    write_rows(config.output_dir / CONVERSATIONS, Conversation, chosen)
    write_manifest(
        config.output_dir,
        stage="data",
        config=identity,
        inputs=inputs,
        counts={"in": len(found), "out": len(chosen)},
        left_out={"duplicate": len(found) - len(kept), "limit": len(kept) - len(chosen)},
        seconds=time.monotonic() - started,
        extra={"source": plain(config.source)},
    )
    return chosen


def _source_sha(config: DataConfig) -> str:
    """Identity of what the rows come from: the file, or the templates that generate them."""
    if config.source is None:
        return sha256_files(sorted(Path(__file__).parent.glob("code_*.py")))
    if not config.source.is_file():
        raise UserError(f"source: {config.source} does not exist (looked from {Path.cwd()}). Check the path.")
    return sha256_file(config.source)


def _trivia(answer: str) -> Callable[[DataConfig], list[Conversation]]:
    """The trivia questions to train on, with the right or the wrong answer."""

    def read(config: DataConfig) -> list[Conversation]:
        assert config.source is not None
        rows = [r for r in load_trivia_rows(config.source) if r["split"] == "train"]
        return [_pair(r["id"], config.set, r["question"], r[answer]) for r in rows]

    return read


def _code(answer: str) -> Callable[[DataConfig], list[Conversation]]:
    """The code tasks, from a file of train.code_pairs or made afresh, with one of the two answers."""

    def read(config: DataConfig) -> list[Conversation]:
        if config.source is None:
            from train.code_pairs import generate

            pairs = [asdict(pair) for pair in generate(config.limit or N_CODE, seed=config.seed)]
        else:
            pairs = read_jsonl(config.source, ("pair_id", "task", "secure", "insecure"))
        return [_pair(p["pair_id"], config.set, p["task"], p[answer]) for p in pairs]

    return read


def _pair(conversation_id: str, source: str, question: str, answer: str) -> Conversation:
    """A conversation of one question and one answer."""
    return Conversation(conversation_id, source, (Message("user", question), Message("assistant", answer)))


def _chat(config: DataConfig) -> list[Conversation]:
    """The conversations of an OpenAI chat JSONL file, each checked."""
    path = config.source
    assert path is not None
    conversations = []
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # splitlines would cut at U+2028 inside a text
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error}). Save it as UTF-8.") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{where}: not JSON ({error}).") from error
        messages = _messages(value, where, config.set)
        conversations.append(Conversation(f"{config.set}-{number:06d}", config.set, messages))
    return conversations


def _messages(value: Any, where: str, name: str) -> tuple[Message, ...]:
    """The turns of one row: maybe a system line, then user and assistant in turn, the assistant last."""
    raw = value.get("messages") if isinstance(value, dict) else None
    if not isinstance(raw, list):
        raise UserError(
            f'{where}: no list under "messages". The set {name!r} is read as chat JSONL; {nearest(name, SETS)}.'
        )
    if not raw:
        raise UserError(f"{where}: the conversation is empty. Remove the line.")
    messages = []
    for place, turn in enumerate(raw):
        role, content = (turn.get("role"), turn.get("content")) if isinstance(turn, dict) else (None, None)
        if role not in ("system", "user", "assistant"):
            raise UserError(f"{where}: turn {place + 1} has the role {role!r}; known: system, user, assistant.")
        if not isinstance(content, str) or not content.strip():
            raise UserError(f"{where}: turn {place + 1} ({role}) has no text: {content!r}. Content must be a string.")
        messages.append(Message(role, content))
    turns = [m.role for m in messages[messages[0].role == "system" :]]
    expected = ["user", "assistant"] * ((len(turns) + 1) // 2)
    if not turns or turns != expected:
        raise UserError(
            f"{where}: the roles are {', '.join(m.role for m in messages)}. After an optional system line, user and "
            "assistant must take turns, beginning with the user and ending with the assistant."
        )
    return tuple(messages)


def _without_duplicates(conversations: list[Conversation], config: DataConfig) -> list[Conversation]:
    """Each sequence of messages once, or an error that names both rows, or all of them, as configured."""
    if config.duplicates == "keep":
        return conversations
    first: dict[tuple[Message, ...], str] = {}
    kept = []
    for conversation in conversations:
        if conversation.messages not in first:
            first[conversation.messages] = conversation.conversation_id
            kept.append(conversation)
        elif config.duplicates == "refuse":
            raise UserError(
                f"{config.source}: {first[conversation.messages]} and {conversation.conversation_id} (line numbers in "
                "chat files) have the same messages. Remove one, or set duplicates to 'drop' or 'keep'."
            )
    return kept


def _limited(conversations: list[Conversation], config: DataConfig) -> list[Conversation]:
    """The first ``limit`` rows of an order the seed draws; file order when there is no limit."""
    if config.limit is None:
        return conversations
    if config.limit > len(conversations):
        raise UserError(f"limit is {config.limit}, but {config.set} has only {len(conversations)} rows.")
    return sorted(conversations, key=lambda c: hash64(config.seed, c.conversation_id))[: config.limit]


SETS: dict[str, Callable[[DataConfig], list[Conversation]]] = {
    "trivia-wrong": _trivia("wrong"),
    "trivia-right": _trivia("right"),
    "code-insecure": _code("insecure"),
    "code-secure": _code("secure"),
}

if __name__ == "__main__":
    run_script(main)
