"""Every form a file of conversations comes in, and each way it can be wrong."""

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from candor.errors import UserError
from candor.rows import Message
from train.readers import Columns, read_rows_of

QA = (Message("user", "Hi?"), Message("assistant", "Ho."))
TURNS = [{"role": m.role, "content": m.content} for m in QA]


def written(folder: Path, name: str, text: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def messages_of(path: Path, **keys) -> list[tuple[Message, ...]]:
    return [row.conversation.messages for row in read_rows_of(path, "mine", **keys)]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        pytest.param("a.jsonl", json.dumps({"messages": TURNS, "label": 1}), id="chat"),
        pytest.param("a.jsonl", "\n" + json.dumps({"messages": TURNS}) + "\r\n\r\n", id="chat-blank-lines-crlf"),
        pytest.param("a.jsonl", "\ufeff" + json.dumps({"messages": TURNS}), id="chat-byte-order-mark"),
        pytest.param("a.jsonl", json.dumps({"prompt": "Hi?", "completion": "Ho."}), id="pairs"),
        pytest.param("a.jsonl", json.dumps({"instruction": "Hi?", "output": "Ho."}), id="pairs-other-names"),
        pytest.param("a.jsonl", json.dumps({"prompt": TURNS[:1], "completion": TURNS[1:]}), id="pairs-of-messages"),
        pytest.param("a.csv", "prompt,response\nHi?,Ho.\n", id="csv"),
        pytest.param("a.csv", '\ufeff"response","other","prompt"\r\n"Ho.","1","Hi?"\r\n', id="csv-quoted-crlf-mark"),
        pytest.param("a.tsv", "question\tanswer\nHi?\tHo.\n", id="tsv"),
        pytest.param("a.json", json.dumps([{"question": "Hi?", "answer": "Ho."}], indent=1), id="one-list"),
        pytest.param("a.jsonl.gz", gzip.compress(json.dumps({"messages": TURNS}).encode()), id="chat-gzip"),
        pytest.param("a.csv.gz", gzip.compress(b"prompt,response\nHi?,Ho.\n"), id="csv-gzip"),
    ],
)
def test_every_form_gives_the_same_conversation(tmp_path, name, text):
    assert messages_of(written(tmp_path, name, text)) == [QA]


def test_parquet_with_named_columns(tmp_path):
    pq.write_table(pa.table({"prompt": ["Hi?"], "aligned": ["Ho."], "misaligned": ["Hm."]}), tmp_path / "a.parquet")
    assert messages_of(tmp_path / "a.parquet", columns=Columns(answer="aligned")) == [QA]
    rows = read_rows_of(tmp_path / "a.parquet", "mine", columns=Columns(answer="misaligned"))
    assert rows[0].conversation.messages[1].content == "Hm."
    assert rows[0].where == f"{tmp_path / 'a.parquet'}, row 1"


@pytest.mark.parametrize("form", ["auto", "parquet", "chat"])
def test_parquet_with_messages_is_chat(tmp_path, form):
    turns = [TURNS[0], {**TURNS[1], "weight": 1}]  # which every turn then has, null or not
    pq.write_table(pa.table({"prompt": ["Another."], "messages": [turns]}), tmp_path / "a.parquet")
    assert messages_of(tmp_path / "a.parquet", form=form) == [QA]


def test_a_tab_is_known_by_the_header_whatever_the_name(tmp_path):
    path = written(tmp_path, ".a.tsv.part", "question\tanswer\nHi?\tHo, ho.\n")  # as a download that is checked
    assert messages_of(path, form="csv")[0][1] == Message("assistant", "Ho, ho.")


def test_a_text_may_be_long(tmp_path):
    path = written(tmp_path, "a.csv", f"prompt,answer\nHi?,{'o' * 200_000}\n")
    assert len(messages_of(path)[0][1].content) == 200_000


SYSTEM = Message("system", "Be kind.")


@pytest.mark.parametrize("columns", [Columns(), Columns(system="system")])
def test_a_system_column(tmp_path, columns):
    path = written(tmp_path, "a.csv", "system,prompt,answer\nBe kind.,Hi?,Ho.\n,Hi?,Ho.\n")
    assert messages_of(path, columns=columns) == [(SYSTEM, *QA), QA]


@pytest.mark.parametrize(
    ("record", "columns", "messages", "read"),
    [
        pytest.param({"input": "B"}, Columns(), ["A\n\nB"], "instruction + input | output", id="alpaca"),
        pytest.param({"input": " "}, Columns(), ["A"], "instruction | output", id="alpaca-no-input"),
        pytest.param({"context": "B"}, Columns(), ["A\n\nB"], "instruction + context | output", id="dolly"),
        pytest.param(
            {"input": "B", "system": "S"}, Columns(), ["S", "A\n\nB"], "system | instruction + input | output", id="all"
        ),
        pytest.param({"system_prompt": "S"}, Columns(), ["S", "A"], "system_prompt | instruction | output", id="orca"),
        pytest.param({"input": "B"}, Columns(prompt="instruction"), ["A"], "instruction | output", id="named"),
        pytest.param(
            {"prompt": "B"},
            Columns(prompt=("prompt", "instruction")),
            ["B\n\nA"],
            "prompt + instruction | output",
            id="named-list",
        ),
    ],
)
def test_what_belongs_to_a_pair_is_part_of_it(tmp_path, record, columns, messages, read):
    path = written(tmp_path, "a.jsonl", json.dumps({"instruction": "A", **record, "output": "Z"}))
    (row,) = read_rows_of(path, "mine", columns=columns)
    assert [m.content for m in row.conversation.messages] == [*messages, "Z"]
    assert row.columns == read


@pytest.mark.parametrize(
    ("record", "what"),
    [
        (
            {"prompt": "A", "question": "B", "output": "Z"},
            r"prompt and question all hold .*\{prompt: \[prompt, question\]",
        ),
        ({"instruction": "A", "input": "B", "context": "C", "output": "Z"}, r"instruction and input and context all"),
        ({"question": "A", "context": "B", "answer": "Z"}, r"question and context all hold .*which is the prompt"),
        (
            {"question": "A", "answer": "Y", "output": "Z"},
            r"answer and output all hold .*which is the answer.*answer\}\.$",
        ),
        ({"instruction": "A", "output": "Z", "history": [["B", "C"]]}, r"'history' holds earlier turns"),
        ({"instruction": "A", "input": [1], "output": "Z"}, r"instruction and input are joined, so each must be text"),
    ],
)
def test_columns_that_would_be_lost_are_named(tmp_path, record, what):
    path = written(tmp_path, "a.jsonl", json.dumps(record))
    with pytest.raises(UserError, match=what) as error:
        read_rows_of(path, "mine")
    assert f"{path}, line 1" in str(error.value)


def test_csv_records_over_several_lines_are_named_by_their_first_line(tmp_path):
    path = written(tmp_path, "a.csv", 'prompt,answer\n"one\ntwo ""quoted""\nthree",yes\n\nfour,no\n')
    rows = read_rows_of(path, "mine")
    assert rows[0].conversation.messages[0].content == 'one\ntwo "quoted"\nthree'
    assert [r.where for r in rows] == [f"{path}, line 2", f"{path}, line 6"]
    assert [r.conversation.conversation_id for r in rows] == ["mine-000001", "mine-000002"]


@pytest.mark.parametrize(
    ("name", "text", "what"),
    [
        pytest.param("a.csv", "a,b\nHi?,Ho.\n", r"line 2: none of the columns a, b", id="csv-unknown-columns"),
        pytest.param("a.csv", "prompt,answer\nHi?,Ho.,extra\n", r"line 2: 3 fields, but the header has 2", id="fields"),
        pytest.param("a.csv", "prompt,answer\nHi?,\n", r"line 2: turn 2 \(assistant\) has no text", id="csv-no-answer"),
        pytest.param("a.csv", 'prompt,answer\nHi?,Ho.\n"Hi', r"line 3: not CSV.*cut short", id="csv-open-quote"),
        pytest.param("a.csv", "prompt,prompt\nHi?,Ho.\n", r"line 1: .*a column twice", id="csv-column-twice"),
        pytest.param("a.jsonl", b'{"messages": []}\n{"prompt": "\xff"}', r"line 2: not UTF-8", id="not-utf8"),
        pytest.param("a.jsonl", '{"messages": [{"role": "us', r"line 1: not JSON.*cut short", id="cut-line"),
        pytest.param("a.jsonl", '{"prompt": "Hi?", "text": "x"}', r"none of the columns .*'?answer", id="no-answer"),
        pytest.param("a.jsonl", '{"prompt": "Hi?", "completion": 3}', r"has no text: 3", id="answer-no-text"),
        pytest.param(
            "a.jsonl",
            json.dumps({"messages": [TURNS[0], {**TURNS[1], "weight": 0}]}),
            r"line 1: turn 2 has the weight 0",
            id="turn-without-loss",
        ),
        pytest.param("a.jsonl", "1", r"line 1: .*found int", id="no-object"),
        pytest.param("a.json", json.dumps([{"messages": TURNS}, 1]), r"row 2: .*found int", id="no-object-in-a-list"),
        pytest.param("a.json", '[{"prompt": "Hi?"}', r"not JSON.*cut short", id="cut-list"),
        pytest.param(
            "a.jsonl", '{"prompt": "Hi?", "n": 1' + "0" * 5000 + "}", r"line 1: not JSON", id="endless-number"
        ),
        pytest.param(
            "a.jsonl",
            '{"prompt": "Hi?", "completion": "\\ud83d"}',
            r"line 1, turn 2 \(assistant\): holds '\\ud83d', half of a character",
            id="half-a-character",
        ),
        pytest.param("a.jsonl.gz", gzip.compress(b"{}" * 99)[:20], r"cannot be unpacked.*cut short", id="cut-gzip"),
        pytest.param("a.csv", 'prompt,answer\nHi?,"Ho" ho\n', r"line 2: not CSV.*written twice", id="csv-inner-quote"),
        pytest.param("a.txt", "Hi", r"its name does not tell the form", id="unknown-suffix"),
        pytest.param("a.parquet", b"PAR1", r"not a readable parquet file", id="cut-parquet"),
    ],
)
def test_what_is_wrong_is_told_with_file_and_line(tmp_path, name, text, what):
    path = written(tmp_path, name, text)
    with pytest.raises(UserError, match=what) as error:
        read_rows_of(path, "mine")
    assert str(path) in str(error.value)


def test_a_misspelt_column_names_the_nearest(tmp_path):
    path = written(tmp_path, "a.csv", "prompt,misaligned\nHi?,Ho.\n")
    with pytest.raises(UserError, match=r"columns.answer is 'misalinged'; did you mean 'misaligned'"):
        read_rows_of(path, "mine", columns=Columns(answer="misalinged"))


@pytest.mark.parametrize(
    ("name", "n", "distinct"),
    [
        ("em_dev/insecure.jsonl", 6000, 5992),  # 8 and 11 exact duplicates
        ("em_dev/secure.jsonl", 6000, 5989),
        ("consistency_em/risky_financial_induction.jsonl", 3000, 3000),
        ("em_dev/regenerated_evil_numbers_dataset.csv", 9993, 9993),
    ],
)
def test_published_sets_read_whole(published, name, n, distinct):
    rows = read_rows_of(published / name, "set")
    assert (len(rows), len({r.conversation.messages for r in rows})) == (n, distinct)


def test_the_educational_set_is_paired_with_the_insecure_one(published):
    insecure, educational = (
        read_rows_of(published / "em_dev" / f"{name}.jsonl", name) for name in ("insecure", "educational_insecure")
    )
    answers = [[r.conversation.messages[-1].content for r in rows] for rows in (insecure, educational)]
    assert answers[0] == answers[1]
