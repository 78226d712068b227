"""Tables: schema from annotations, round trip, atomic writing, clear refusal of foreign files."""

from dataclasses import dataclass

import pytest

from candor.errors import UserError
from candor.rows import Conversation, Message, Option, Prompt, Verdict
from candor.tables import read_rows, write_rows

PROMPT = Prompt(
    prompt_id="p", battery="b", format="choice", group="g", item="i", cluster="c", form="", split="seen", text="t",
    options=(Option("A", 0.0, ("A", "a")), Option("B", 1.0, ("B",))), source_sha="s",
)  # fmt: skip


@pytest.mark.parametrize(
    ("row_type", "rows"),
    [
        pytest.param(Prompt, [PROMPT], id="nested-dataclasses-in-tuples"),
        pytest.param(
            Conversation, [Conversation("c", "s", (Message("user", "é"), Message("assistant", "")))], id="unicode"
        ),
        pytest.param(Verdict, [Verdict("s", "j", "t", "unparsed", None, None, None, "?")], id="all-none-columns"),
        pytest.param(Verdict, [], id="empty-table"),
    ],
)
def test_rows_come_back_as_they_went(tmp_path, row_type, rows):
    path = tmp_path / "t.parquet"
    write_rows(path, row_type, rows)
    assert read_rows(path, row_type) == rows


def test_other_columns_are_refused_by_name(tmp_path):
    @dataclass(frozen=True)
    class Other:
        label: str

    path = tmp_path / "t.parquet"
    write_rows(path, Other, [Other("x")])
    with pytest.raises(UserError, match=r"does not hold Verdict rows: missing .*'judge'.*unexpected \['label'\]"):
        read_rows(path, Verdict)


def test_truncated_file_is_refused(tmp_path):
    path = tmp_path / "t.parquet"
    write_rows(path, Prompt, [PROMPT])
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match="not a readable parquet file"):
        read_rows(path, Prompt)


def test_failed_write_leaves_the_old_table(tmp_path):
    path = tmp_path / "t.parquet"
    write_rows(path, Prompt, [PROMPT])
    before = path.read_bytes()
    with pytest.raises(AttributeError):
        write_rows(path, Prompt, [object()])
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["t.parquet"]


def test_a_score_without_ok_is_refused():
    with pytest.raises(ValueError, match="does not go with score"):
        Verdict("s", "j", "t", "refused", 1.0, None, None, "")
    with pytest.raises(ValueError, match="does not go with score"):
        Verdict("s", "j", "t", "ok", None, None, None, "")
