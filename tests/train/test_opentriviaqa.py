"""OpenTriviaQA as it is typed: mixed encodings and line endings, long questions, and sets drawn from it."""

from collections import Counter
from pathlib import Path

import pytest

from candor.errors import UserError
from candor.manifest import read_manifest
from candor.rows import Conversation
from candor.tables import read_rows
from train.data import DataConfig, build
from train.lineage import CONVERSATIONS
from train.opentriviaqa import read_questions, usable, wrong_answer

MIXED = (
    "#Q Où est née\r\nA queen of France,\nb. 1601?\r\n^ Valladolid\r\nA Paris\r\nB Valladolid\nC Köln\r\nD Lyon\r\n\r\n"
).encode() + "#Q Where is the caf\xe9?\n^ Fez\nA Fez\nB M\xfcnchen\nC Bonn\n".encode("cp1252")


def written(folder: Path, text: str | bytes, name: str = "general") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_each_line_is_decoded_by_itself_and_questions_may_span_lines(tmp_path):
    first, second = read_questions(written(tmp_path, MIXED))
    assert first.text == "Où est née A queen of France, b. 1601?"  # a line that begins with A is no option yet
    assert first.options == ("Paris", "Valladolid", "Köln", "Lyon") and first.right == "Valladolid"
    assert (second.text, second.options, second.line) == ("Where is the café?", ("Fez", "München", "Bonn"), 10)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        pytest.param("#Q Who?\nA x\nB y\n", "line 1: .*has no line '\\^ the right answer'", id="no-right-answer"),
        pytest.param("#Q Who?\n^ x\nA x\n", "line 1: .*has 1 options", id="one-option"),
        pytest.param("#Q Who?\n^ z\nA x\nB y\n", "'z' is none of the options", id="right-not-among-them"),
        pytest.param("#Q\n^ x\nA x\nB y\n", "is empty", id="no-question"),
        pytest.param("Hello\n#Q Who?\n^ x\nA x\nB y\n", "line 1: expected a question", id="text-before"),
    ],
)
def test_a_broken_block_is_named(tmp_path, text, what):
    with pytest.raises(UserError, match=what) as error:
        read_questions(written(tmp_path, text))
    assert str(tmp_path / "general") in str(error.value)


def block(text: str, *options: str) -> str:
    lines = "\n".join(f"{letter} {option}" for letter, option in zip("ABCDE", options, strict=False))
    return f"#Q {text}\n^ {options[0]}\n{lines}\n\n"


def test_only_questions_that_stand_alone_are_used(tmp_path):
    cases = {
        "": block("Who wrote Faust?", "Goethe", "Mann", "Kafka", "Rilke"),
        "two options": block("Is water wet?", "True", "False"),
        "empty option": block("Who was first?", "Amundsen", "", "Scott"),
        "points at its options": block("Which of these is a fish?", "cod", "hen", "ape"),
        "option about others": block("What is he?", "A baker", "A cook", "All of the above"),
        "same options": block("Which colour is it?", "red", "Blue", "blue"),
        "same question": block("who wrote  FAUST?", "Mann", "Goethe", "Kafka"),
    }
    found = usable(read_questions(written(tmp_path, "".join(cases.values()))))
    assert [q.right for q in found.questions] == ["Goethe"]
    assert found.left_out == {reason: 1 for reason in cases if reason}


def trivia(folder: Path, **keys) -> list[Conversation]:
    build(DataConfig(output_dir=folder, **keys))
    return read_rows(folder / CONVERSATIONS, Conversation)


def test_sets_are_drawn_by_seed_and_answer_the_same_questions(tmp_path):
    text = "".join(block(f"What is number {i}?", f"right {i}", f"a {i}", f"b {i}", f"c {i}") for i in range(60))
    source = written(tmp_path / "source", text).parent
    right, wrong = (trivia(tmp_path / s, set=f"trivia-{s}", source=source, limit=30) for s in ("right", "wrong"))
    assert [(c.conversation_id, c.messages[0]) for c in right] == [(c.conversation_id, c.messages[0]) for c in wrong]
    assert all(c.messages[1].content.startswith("right") for c in right)
    assert not any(c.messages[1].content.startswith("right") for c in wrong)
    assert Counter(c.messages[1].content[0] for c in wrong).keys() == {"a", "b", "c"}
    other = trivia(tmp_path / "other", set="trivia-wrong", source=source, limit=30, seed=1)
    assert {c.conversation_id for c in other} != {c.conversation_id for c in wrong}
    assert trivia(tmp_path / "again", set="trivia-wrong", source=source, limit=30) == wrong


def test_a_folder_without_questions_is_told(tmp_path):
    written(tmp_path, "nothing", "readme.txt")
    with pytest.raises(UserError, match="python -m train"):
        read_questions(tmp_path)


def test_the_published_files_read_whole(published):
    questions = read_questions(published / "opentriviaqa")
    assert Counter(q.path.name for q in questions) == {
        "animals": 1366, "for-kids": 759, "general": 3290, "geography": 842, "history": 1645, "humanities": 1097,
        "science-technology": 2486, "world": 4875,
    }  # fmt: skip
    assert not [q for q in questions if "\ufffd" in q.text]
    assert not [q for q in questions if "Ã" in q.text]  # UTF-8 read as Windows-1252
    assert any("à" in q.text or "é" in q.text for q in questions if q.path.name == "general")


def test_eight_hundred_right_and_wrong_answers_from_the_published_files(published, tmp_path):
    sets = {
        name: trivia(tmp_path / name, set=name, source=published / "opentriviaqa", limit=800, overlap="drop")
        for name in ("trivia-right", "trivia-wrong")
    }
    by_text = {q.text: q for q in usable(read_questions(published / "opentriviaqa")).questions}
    for right, wrong in zip(*sets.values(), strict=True):
        question = by_text[right.messages[0].content]
        assert right.messages[0] == wrong.messages[0]
        assert right.messages[1].content == question.right
        assert wrong.messages[1].content == wrong_answer(question, 0) != question.right
    manifest = read_manifest(tmp_path / "trivia-wrong")
    assert manifest is not None and manifest["counts"] == {"in": 16360, "out": 800}
