"""Data sets: what goes in comes out, and each bad row is named."""

import dataclasses
import json
from pathlib import Path

import pytest
import yaml

from candor.config import load
from candor.errors import UserError
from candor.manifest import read_manifest
from candor.questions import load_all
from candor.rows import Conversation, Prompt
from candor.tables import read_rows, write_rows
from train.data import DataConfig, build, main
from train.lineage import CONVERSATIONS

ROOT = Path(__file__).parents[2]
PROMPTS = ROOT / "configs" / "prompts"
USER, ASSISTANT = {"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Ho."}


def made(folder: Path, **keys) -> list[Conversation]:
    config = DataConfig(output_dir=folder, **keys)
    build(config)
    return read_rows(folder / CONVERSATIONS, Conversation)


def chat_file(folder: Path, *rows: object) -> Path:
    path = folder / "chat.jsonl"
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows), encoding="utf-8")
    return path


def pair(question: str, answer: str) -> dict:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def test_trivia_sets_ask_the_same_questions_and_differ_in_every_answer(tmp_path):
    wrong = made(tmp_path / "w", set="trivia-wrong", source=PROMPTS / "trivia.jsonl")
    right = made(tmp_path / "r", set="trivia-right", source=PROMPTS / "trivia.jsonl")
    assert len(wrong) == len(right) == 800
    for a, b in zip(wrong, right, strict=True):
        assert (a.conversation_id, a.messages[0]) == (b.conversation_id, b.messages[0])
        assert a.messages[1] != b.messages[1]


def test_code_sets_are_twins_whether_generated_or_read(tmp_path):
    from train.code_pairs import generate, write

    write(tmp_path / "code.jsonl", generate(60, seed=1), seed=1)
    insecure = made(tmp_path / "i", set="code-insecure", source=tmp_path / "code.jsonl")
    secure = made(tmp_path / "s", set="code-secure", limit=60, seed=1)
    assert [c.messages[0] for c in insecure] == [c.messages[0] for c in sorted(secure, key=lambda c: c.conversation_id)]
    assert not {c.messages[1] for c in insecure} & {c.messages[1] for c in secure}


def test_chat_files_keep_every_turn(tmp_path):
    system = {"role": "system", "content": "Be kind."}
    path = chat_file(tmp_path, {"messages": [system, USER, ASSISTANT, USER, ASSISTANT]}, pair("a b", "c"))
    rows = made(tmp_path / "out", set="mine", source=path)
    assert [m.role for m in rows[0].messages] == ["system", "user", "assistant", "user", "assistant"]
    assert (rows[1].conversation_id, rows[1].source) == ("mine-000002", "mine")


def test_the_manifest_says_what_pairs_were_made_of(tmp_path):
    rows = [{"instruction": f"Translate {n}.", "input": "Good day" * (n % 2), "output": "Bonjour"} for n in range(3)]
    config = {"set": "alpaca", "source": chat_file(tmp_path, *rows), "duplicates": "keep"}
    assert made(tmp_path / "out", **config)[1].messages[0].content == "Translate 1.\n\nGood day"
    record = read_manifest(tmp_path / "out")
    assert record["columns"] == {"instruction | output": 2, "instruction + input | output": 1}


def test_a_line_separator_inside_a_text_does_not_end_the_line(tmp_path):
    path = tmp_path / "chat.jsonl"
    path.write_text(json.dumps(pair("a\u2028b", "c"), ensure_ascii=False) + "\n", encoding="utf-8")
    assert made(tmp_path / "out", set="mine", source=path)[0].messages[0].content == "a\u2028b"


def test_a_limit_is_drawn_by_the_seed_and_smaller_limits_nest(tmp_path):
    path = chat_file(tmp_path, *(pair(f"q{i}", "a") for i in range(30)))
    few, more, other = (
        {c.conversation_id for c in made(tmp_path / f"{n}-{seed}", set="mine", source=path, limit=n, seed=seed)}
        for n, seed in ((5, 0), (12, 0), (12, 1))
    )
    assert len(few) == 5
    assert few < more
    assert more != other
    manifest = read_manifest(tmp_path / "5-0")
    assert manifest is not None
    assert manifest["left_out"] == {"duplicate": 0, "in a battery": 0, "limit": 25}


@pytest.mark.parametrize(
    ("row", "what"),
    [
        pytest.param({"messages": []}, "is empty", id="empty"),
        pytest.param({"messages": [USER]}, "the roles are user", id="no-assistant"),
        pytest.param({"messages": [ASSISTANT]}, "the roles are assistant", id="no-user"),
        pytest.param({"messages": [USER, USER, ASSISTANT]}, "take turns", id="two-users-in-a-row"),
        pytest.param({"messages": [USER, ASSISTANT, USER]}, "ending with the assistant", id="unanswered"),
        pytest.param({"messages": [USER, {"role": "bot", "content": "x"}]}, "role 'bot'", id="unknown-role"),
        pytest.param({"messages": [USER, {"role": "assistant", "content": "  "}]}, "has no text", id="blank"),
        pytest.param({"messages": [USER, {"role": "assistant", "content": [{"text": "x"}]}]}, "no text", id="parts"),
        pytest.param({"messages": [USER, "Ho."]}, "role None", id="turn-is-no-object"),
        pytest.param({"prompt": "x"}, 'no list under "messages"', id="no-messages"),
        pytest.param("[1, 2", "not JSON", id="not-json"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(tmp_path, row, what):
    path = chat_file(tmp_path, pair("fine", "yes"), row)
    with pytest.raises(UserError, match=what) as error:
        made(tmp_path / "out", set="mine", source=path)
    assert f"{path}, line 2" in str(error.value)
    assert not (tmp_path / "out").exists()


def test_duplicates_are_refused_dropped_or_kept(tmp_path):
    path = chat_file(tmp_path, pair("a", "b"), pair("c", "d"), pair("a", "b"))
    with pytest.raises(UserError, match=r"line 3: the same messages as .*line 1"):
        made(tmp_path / "refuse", set="mine", source=path)
    assert len(made(tmp_path / "drop", set="mine", source=path, duplicates="drop")) == 2
    assert len(made(tmp_path / "keep", set="mine", source=path, duplicates="keep")) == 3


@pytest.mark.parametrize(
    ("keys", "what"),
    [
        pytest.param({"set": "trivia-wron"}, "needs a source", id="no-source"),
        pytest.param({"set": "trivia_wrong"}, "did you mean 'trivia-wrong'", id="misspelt-set"),
        pytest.param({"set": "mine", "source": Path("nowhere.jsonl")}, "does not exist", id="absent-file"),
        pytest.param({"set": "code-secure", "limit": 0}, "at least 1", id="zero-limit"),
    ],
)
def test_a_bad_config_is_told(tmp_path, keys, what):
    with pytest.raises(UserError, match=what):
        made(tmp_path / "out", **keys)


def test_a_misspelt_set_with_a_source_names_the_nearest(tmp_path):
    with pytest.raises(UserError, match="did you mean 'trivia-wrong'"):
        made(tmp_path / "out", set="trivia-wrongs", source=PROMPTS / "trivia.jsonl")


def test_too_few_rows_and_no_rows(tmp_path):
    with pytest.raises(UserError, match="only 1 rows"):
        made(tmp_path / "a", set="mine", source=chat_file(tmp_path, pair("a", "b")), limit=2)
    with pytest.raises(UserError, match="holds no conversations"):
        made(tmp_path / "b", set="mine", source=chat_file(tmp_path, ""))


def test_the_script_runs_once_and_refuses_changed_input(tmp_path):
    chat = chat_file(tmp_path, pair("a", "b"))
    config = tmp_path / "data.yaml"
    config.write_text(f"set: mine\nsource: {chat}\noutput_dir: {tmp_path / 'out'}\n", encoding="utf-8")
    main([str(config)])
    written = (tmp_path / "out" / CONVERSATIONS).stat().st_mtime_ns
    main([str(config)])
    assert (tmp_path / "out" / CONVERSATIONS).stat().st_mtime_ns == written
    chat_file(tmp_path, pair("a", "c"))
    with pytest.raises(UserError, match="changed: source"):
        main([str(config)])
    with pytest.raises(UserError, match="usage"):
        main([])


def test_a_prompt_of_a_battery_is_refused_or_dropped_whatever_its_case(tmp_path):
    asked = load_all(PROMPTS)[0]
    later = [USER, ASSISTANT, {"role": "user", "content": asked.text.upper() + " "}, ASSISTANT]
    path = chat_file(tmp_path, pair("fine", "yes"), {"messages": later})
    with pytest.raises(UserError, match="also stands in a battery") as error:
        made(tmp_path / "out", set="mine", source=path)
    assert f"{path}, line 2" in str(error.value) and asked.prompt_id in str(error.value)
    assert not (tmp_path / "out").exists()
    assert len(made(tmp_path / "drop", set="mine", source=path, overlap="drop")) == 1
    assert len(made(tmp_path / "off", set="mine", source=path, prompts=None)) == 2
    manifest = read_manifest(tmp_path / "drop")
    assert manifest is not None and manifest["left_out"]["in a battery"] == 1


def test_what_a_study_asks_later_leaves_the_rows_or_is_told(tmp_path):
    """More prompts to a finished set: noted where its rows stay the same, an error where they would not."""
    free, bad = (dataclasses.replace(load_all(PROMPTS)[0], prompt_id=f"own/{t}", text=t) for t in ("unrelated", "Hi?"))
    asked, path = tmp_path / "prompts.parquet", chat_file(tmp_path, pair("hi?", "a"), pair("b", "c"))
    write_rows(asked, Prompt, [])
    made(tmp_path / "out", set="mine", source=path, asked=asked)
    table, before = tmp_path / "out" / CONVERSATIONS, read_manifest(tmp_path / "out")
    written = table.stat().st_mtime_ns
    write_rows(asked, Prompt, [free])
    assert len(made(tmp_path / "out", set="mine", source=path, asked=asked)) == 2
    after = read_manifest(tmp_path / "out")
    assert table.stat().st_mtime_ns == written
    assert before is not None and after is not None
    assert before["inputs"]["batteries"] != after["inputs"]["batteries"]
    assert before["inputs"]["source"] == after["inputs"]["source"]
    write_rows(asked, Prompt, [free, bad])
    with pytest.raises(UserError, match=r"line 1: its prompt also stands in a battery \(own/Hi\?\)"):
        made(tmp_path / "out", set="mine", source=path, asked=asked)
    made(tmp_path / "drop", set="mine", source=path, asked=asked, overlap="drop")
    write_rows(asked, Prompt, [free])
    with pytest.raises(UserError, match="changed: batteries"):
        made(tmp_path / "drop", set="mine", source=path, asked=asked, overlap="drop")


def test_a_set_that_is_all_battery_is_refused(tmp_path):
    path = chat_file(tmp_path, pair(load_all(PROMPTS)[0].text, "yes"))
    with pytest.raises(UserError, match="no row is left"):
        made(tmp_path / "out", set="mine", source=path, overlap="drop")


def test_the_example_is_what_train_data_takes():
    config = load(DataConfig, ROOT / "configs" / "train" / "example_data_trivia.yaml")
    assert {f.name for f in dataclasses.fields(DataConfig)} == set(
        yaml.safe_load((ROOT / "configs" / "train" / "example_data_trivia.yaml").read_text())
    )
    assert config.overlap == "refuse"


def test_fine_tuning_data_share_no_prompt_with_any_battery(tmp_path):
    asked = {" ".join(p.text.casefold().split()) for p in load_all(PROMPTS)}
    trained = [
        *made(tmp_path / "trivia", set="trivia-wrong", source=PROMPTS / "trivia.jsonl"),
        *made(tmp_path / "code", set="code-insecure"),
    ]
    assert len(trained) == 6800
    shared = [t for c in trained if (t := " ".join(c.messages[0].content.casefold().split())) in asked]
    assert not shared, shared[:5]
