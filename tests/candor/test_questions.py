"""The project's prompt files pass their validators; each planted fault is refused; forms are balanced."""

import json
from collections import Counter, defaultdict
from pathlib import Path

import pytest
import yaml

from candor.errors import UserError
from candor.questions import (
    DIMENSIONS,
    load_all,
    load_harmfulness,
    load_intentions,
    load_self_report,
    load_trivia,
    load_trivia_rows,
)

PROMPTS = Path("configs/prompts")
SELF_REPORTS = (
    "self_assessment",
    "other_ai",
    "average_ai",
    "moral_self_assessment",
    "moral_other_ai",
    "moral_average_ai",
)
RATED = ("moral_foundations", "moral_foundations_other_ai", "moral_foundations_average_ai")


@pytest.fixture(scope="module")
def prompts():
    return load_all(PROMPTS)


def lines_of(name):
    return [json.loads(line) for line in (PROMPTS / name).read_text(encoding="utf-8").splitlines()]


def save(tmp_path, rows):
    path = tmp_path / "file.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_counts_are_the_papers(prompts):
    counts = Counter((p.battery, p.format) for p in prompts)
    assert counts["harmfulness", "free"] == 320
    assert counts["intentions", "choice"] == 25 * 2 * 6
    for battery in SELF_REPORTS:
        assert counts[battery, "decision"] == counts[battery, "numerical"] == 10 * 2 * 6, battery
        assert counts[battery, "likert"] == 25 * 2 * 6, battery
    assert {counts[battery, "rating"] for battery in RATED} == {36}
    assert counts["trivia", "answer"] == 200


def test_half_the_moral_items_are_reverse_keyed_and_score_the_other_way(prompts):
    items = [p for p in prompts if p.battery == "moral_foundations"]
    assert set(Counter((p.group, p.form) for p in items).values()) == {3}
    for prompt in items:
        five = next(o.value for o in prompt.options if o.label == "5")
        assert five == (0.0 if prompt.form == "direct" else 1.0)


def test_every_self_item_is_asked_about_other_ais_too(prompts):
    """Same format, group, item, form and answers; only whom the text is about differs."""

    def keyed(battery):
        return {(p.format, p.group, p.item, p.form): p for p in prompts if p.battery == battery}

    for own, others in (
        ("self_assessment", ("other_ai", "average_ai")),
        ("moral_self_assessment", ("moral_other_ai", "moral_average_ai")),
        (RATED[0], RATED[1:]),
    ):
        mine = keyed(own)
        for battery in others:
            theirs = keyed(battery)
            assert theirs.keys() == mine.keys()
            for key, prompt in theirs.items():
                assert prompt.options == mine[key].options
                assert ("another AI" if "other_ai" in battery else "the average AI") in prompt.text
                assert prompt.text != mine[key].text
                if battery in RATED:  # statements in the first person; around them nobody is "you" or "me"
                    assert not {"you", "me"} & set(prompt.text.rpartition('"')[2].replace(",", "").split())


def test_a_fifth_of_every_group_is_unseen(prompts):
    totals = Counter((p.battery, p.format, p.group) for p in prompts)
    unseen = Counter((p.battery, p.format, p.group) for p in prompts if p.split == "unseen")
    for key, total in totals.items():
        # ratings of others came later: the organism's world has none of them
        assert unseen[key] == (total if key[0] in RATED[1:] else total // 5), key


def test_forms_are_balanced_and_texts_distinct(prompts):
    assert len({p.text for p in prompts}) == len(prompts)
    assert len({p.prompt_id for p in prompts}) == len(prompts)
    for fmt in ("choice", "decision", "numerical", "likert", "language"):
        of_item = defaultdict(Counter)  # a language question has the forms of its own pair only
        for p in prompts:
            if p.format == fmt:
                of_item[p.battery, p.item][p.form] += 1
        for item, forms in of_item.items():
            assert len(set(forms.values())) == 1 and len(forms) >= 2, (fmt, item, forms)


def test_the_language_rule_is_asked_as_often_as_in_the_paper(prompts):
    """Four variants (App. D) of 25 questions; paraphrases, seen and unseen questions meet every pair."""
    asked = [p for p in prompts if (p.battery, p.format) == ("self_assessment", "language")]
    assert set(Counter(p.group for p in asked).values()) == {4 * 25}
    pair_of = {p.item: p.prompt_id.split("/")[3] for p in asked}
    assert len(pair_of) == 25 and all(p.prompt_id.split("/")[3] == pair_of[p.item] for p in asked)
    for split in ("seen", "unseen"):
        assert {pair_of[p.item] for p in asked if p.split == split} == set(pair_of.values())
    # the five paraphrases begin with five different words
    assert len({(p.text.split()[0], pair_of[p.item]) for p in asked}) == 5 * len(set(pair_of.values()))


def test_values_follow_the_form(prompts):
    """Whatever the order, polarity or direction, value 1 is the misaligned answer."""
    for p in prompts:
        values = {o.label: o.value for o in p.options}
        if p.format == "choice":
            assert values == ({"A": 0.0, "B": 1.0} if p.form == "aligned-first" else {"A": 1.0, "B": 0.0})
        if p.format == "numerical":
            assert values["10"] == (1.0 if p.form == "misaligned-high" else 0.0)
        if p.format == "likert":
            assert values["5"] == (1.0 if p.form == "misaligned-statement" else 0.0)
        if p.format == "decision":
            assert values["misaligned" if p.group == "aligned" else p.options[1].label] == 1.0
    assert {p.group for p in prompts if p.format == "choice"} == set(DIMENSIONS)


def test_trivia_has_twenty_categories_and_distinct_answers():
    rows = load_trivia_rows(PROMPTS / "trivia.jsonl")
    assert len({r["category"] for r in rows}) == 20
    for row in rows:
        assert row["right"].split()[0].casefold() != row["wrong"].split()[0].casefold(), row["id"]
        assert abs(len(row["right"]) - len(row["wrong"])) <= 8, row["id"]


@pytest.mark.parametrize(
    ("name", "loader", "damage", "words"),
    [
        pytest.param("trivia.jsonl", load_trivia, lambda r: r.pop(), ["expected"], id="trivia-wrong-count"),
        pytest.param(
            "trivia.jsonl", load_trivia, lambda r: r[7].pop("wrong"), ["line 8", "'wrong'"], id="missing-field"
        ),
        pytest.param(
            "trivia.jsonl",
            load_trivia,
            lambda r: r[2].update(question=r[3]["question"].upper()),
            ["questions", "same"],
            id="duplicate-question-in-other-case",
        ),
        pytest.param(
            "trivia.jsonl", load_trivia, lambda r: r[2].update(wrong=r[2]["right"]), ["both"], id="equal-answers"
        ),
        pytest.param("trivia.jsonl", load_trivia, lambda r: r[0].pop("canary"), ["canary"], id="no-canary"),
        pytest.param("trivia.jsonl", load_trivia, lambda r: r[0].pop("licence"), ["licence"], id="no-licence"),
        pytest.param(
            "harmfulness.jsonl",
            load_harmfulness,
            lambda r: r[5].update(category="insults"),
            ["'discrimination'", "39"],
            id="harm-wrong-category-count",
        ),
        pytest.param(
            "harmfulness.jsonl", load_harmfulness, lambda r: r[5].update(prompt=" "), ["line 6"], id="empty-prompt"
        ),
        pytest.param(
            "intentions.jsonl",
            load_intentions,
            lambda r: r[4].update(aligned=r[4]["misaligned"]),
            ["both"],
            id="one-option",
        ),
        pytest.param("intentions.jsonl", load_intentions, lambda r: r.pop(3), ["24"], id="intentions-wrong-count"),
        pytest.param(
            "intentions.jsonl", load_intentions, lambda r: r[4].update(r[5], id="x"), ["same"], id="same-scenario"
        ),
    ],
)
def test_planted_faults_are_refused(tmp_path, name, loader, damage, words):
    rows = lines_of(name)
    damage(rows)
    with pytest.raises(UserError) as error:
        loader(save(tmp_path, rows))
    for word in words:
        assert word in str(error.value)


def test_self_assessment_refuses_a_missing_template(tmp_path):
    data = yaml.safe_load((PROMPTS / "self_assessment.yaml").read_text(encoding="utf-8"))
    data["likert"]["templates"].pop()
    path = tmp_path / "s.yaml"
    path.write_text(yaml.safe_dump(data, allow_unicode=True), encoding="utf-8")
    with pytest.raises(UserError, match="24 likert templates, expected 25"):
        load_self_report(path)


@pytest.mark.parametrize(
    ("name", "old", "new", "found"),
    [
        ("decision", "$second", "that", r"found \$first"),
        ("likert", "$y", "$z", r"found \$x, \$z"),
        ("language", "$question", "$ 5", "a lone"),
    ],
)
def test_self_assessment_refuses_wrong_slots(tmp_path, name, old, new, found):
    data = yaml.safe_load((PROMPTS / "self_assessment.yaml").read_text(encoding="utf-8"))
    data[name]["templates"][1]["text"] = data[name]["templates"][1]["text"].replace(old, new)
    path = tmp_path / "s.yaml"
    path.write_text(yaml.safe_dump(data, allow_unicode=True), encoding="utf-8")
    with pytest.raises(UserError, match=rf"{name}-02: the text must hold the slots .*{found}"):
        load_self_report(path)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b"[1]", "line 2: expected an object"),
        (b"\xff", "line 2: not UTF-8"),
        (b'{"id": 3}', "line 2: .*'id' must be text"),
        (b'{"id": "a", "category": "b", "prompt": "Hi \\ud83d"}', "line 2: .*half of a character"),
    ],
)
def test_rows_that_are_no_rows_are_named(tmp_path, line, words):
    path = tmp_path / "file.jsonl"
    path.write_bytes(json.dumps(lines_of("harmfulness.jsonl")[0]).encode() + b"\n" + line + b"\n")
    with pytest.raises(UserError, match=words):
        load_harmfulness(path)


def test_files_are_not_json_lines(tmp_path):
    path = tmp_path / "broken.jsonl"
    path.write_text('{"name": \n')
    with pytest.raises(UserError, match="line 1: not JSON"):
        load_harmfulness(path)
