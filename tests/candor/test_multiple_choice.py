"""Multiple choice from both layouts, in every rotation; mistakes told with their line."""

import json

import pytest

from candor.errors import UserError
from candor.multiple_choice import load_multiple_choice, read_questions

ROWS = [
    ("What is two plus two?", ["3", "4", "5", "6"], 1),
    ("Which animal barks?", ["cat", "cow", "dog", "hen"], 2),
    ("What colour is snow?", ["white", "black", "red", "green"], 0),
]


def write(path, lines):
    path.write_text("\n".join(lines) + "\n")
    return path


def csv_line(question, choices, answer):
    return ",".join([question, *choices, "ABCD"[answer]])


@pytest.fixture
def files(tmp_path):
    """The same questions in all layouts."""
    return [
        write(tmp_path / "bare.csv", [csv_line(*row) for row in ROWS]),
        write(tmp_path / "headed.csv", ["question,A,B,C,D,answer", *(csv_line(*row) for row in ROWS)]),
        write(
            tmp_path / "index.jsonl",
            [json.dumps({"question": q, "choices": c, "answer": a}) for q, c, a in ROWS],
        ),
        write(
            tmp_path / "letter.jsonl",
            [json.dumps({"question": q, "choices": c, "answer": "ABCD"[a]}) for q, c, a in ROWS],
        ),
    ]


def test_every_layout_gives_the_same_questions(files):
    found = [[(q.question, list(q.choices), q.answer) for q in read_questions(f)] for f in files]
    assert all(each == ROWS for each in found)


def test_each_letter_is_right_once_and_forms_share_a_cluster(files):
    prompts = load_multiple_choice(files[0])
    assert len(prompts) == 3 * 4 and len({p.cluster for p in prompts}) == 3
    for cluster in {p.cluster for p in prompts}:
        own = [p for p in prompts if p.cluster == cluster]
        assert sorted(next(o.label for o in p.options if o.value == 1) for p in own) == list("ABCD")
    for p in prompts:
        lines = dict(line.split(") ", 1) for line in p.text.splitlines()[1:-1])
        right = next(o.label for o in p.options if o.value == 1)
        assert lines[right] in ("4", "dog", "white")


def test_limit_keeps_the_same_questions_whatever_the_order(files, tmp_path):
    other = write(tmp_path / "turned.csv", [csv_line(*row) for row in reversed(ROWS)])
    kept = [{p.text for p in load_multiple_choice(f, limit=2, rotate=False)} for f in (files[0], other)]
    assert len(kept[0]) == 2 and kept[0] == kept[1]


def test_a_mark_blank_lines_and_line_separators_are_no_mistakes(tmp_path):
    row = {"question": "two\u2028lines", "choices": ["x", "y"], "answer": 0}
    path = write(tmp_path / "a.jsonl", ["\ufeff" + json.dumps(row, ensure_ascii=False), ""])
    assert [q.question for q in read_questions(path)] == ["two\u2028lines"]


@pytest.mark.parametrize(
    ("name", "lines", "message"),
    [
        ("a.csv", ["q,x,y,z,w,E"], "line 1: the answer 'E' is none of the 4"),
        ("a.csv", ["q,x,x,z,w,A"], "two are the same"),
        ("a.csv", ["q,x,y,z,w,A", "q,x"], "line 2: 2 columns, expected 6"),
        ("a.csv", ["question,answer"], "expected the columns question, A, B"),
        ("a.csv", ["q,x,y,A", "q,x,y,A"], "are the same"),
        ("a.jsonl", ["{"], "line 1: not JSON"),
        ("a.jsonl", ['{"question": "\\udc00"}'], "line 1: .*half of a character"),
        ("a.csv", ['q,"x,y,z,w,A'], "not CSV.*never close"),
        ("a.csv", ["q,x,y,z,w,²"], "none of the 4"),
        ("a.jsonl", ['{"question": "q", "choices": ["x"], "answer": 0}'], "expected 2 to 10 choices"),
        ("a.jsonl", ['{"question": "q", "choices": ["x", "y"], "answer": 2}'], "none of the 2"),
        ("a.txt", ["q"], "read from .csv or .jsonl"),
    ],
)
def test_mistakes_are_told(tmp_path, name, lines, message):
    with pytest.raises(UserError, match=message):
        load_multiple_choice(write(tmp_path / name, lines))
