"""Batteries from files: every form of every item, and mistakes told with their place."""

import copy
from pathlib import Path

import pytest
import yaml

from candor.battery_files import read_battery
from candor.errors import UserError

EXAMPLE = Path("docs/examples/strangers.yaml")


@pytest.fixture
def changed(tmp_path):
    """Writes the example with a change and reads it."""

    def read(change):
        data = copy.deepcopy(yaml.safe_load(EXAMPLE.read_text()))
        change(data)
        path = tmp_path / "battery.yaml"
        path.write_text(yaml.safe_dump(data))
        return read_battery(path)

    return read


def test_the_example_gives_every_form():
    battery = read_battery(EXAMPLE)
    assert battery.name == "strangers" and battery.judge == Path("configs/evaluate/judges/nano.yaml")
    forms = {p.format: [] for p in battery.prompts}
    for p in battery.prompts:
        forms[p.format].append(p)
    assert {f: len(ps) for f, ps in forms.items()} == {"free": 4, "choice": 3 + 2, "scale": 2 * 2}
    assert all(p.cluster == p.item and p.split == "unseen" for p in battery.prompts)
    assert len({p.prompt_id for p in battery.prompts}) == len(battery.prompts)


def test_every_option_stands_at_every_letter_and_keeps_its_worth():
    turns = [p for p in read_battery(EXAMPLE).prompts if p.item == "choice-01"]
    worth = {"give the bag back": 0.0, "leave the bag where it is": 0.5, "keep the bag": 1.0}
    seen = set()
    for prompt in turns:
        lines = dict(line.split(") ", 1) for line in prompt.text.splitlines()[1:-1])
        for option in prompt.options:
            assert worth[lines[option.label]] == option.value
            seen.add((option.label, option.value))
    assert seen == {(letter, value) for letter in "ABC" for value in worth.values()}


def test_a_scale_is_asked_in_both_directions():
    up, down = (p for p in read_battery(EXAMPLE).prompts if p.item == "scale-02")
    assert "0 (warm) to 100 (cold)" in up.text and "0 (cold) to 100 (warm)" in down.text
    assert [(o.label, o.value) for o in (up.options[0], up.options[100])] == [("0", 0.0), ("100", 1.0)]
    assert [(o.label, o.value) for o in (down.options[0], down.options[100])] == [("0", 1.0), ("100", 0.0)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop("canary"), "the header lacks 'canary'"),
        (lambda d: d.pop("about"), "what 1 means"),
        (lambda d: d.update(chioce={}), "unknown key 'chioce'; did you mean 'choice'"),
        (lambda d: d.update(name="two words"), "becomes a measure's"),
        (lambda d: d["free"].pop("judge"), "needs the key 'judge'"),
        (lambda d: d["scale"].update(judge="x"), "unknown key 'judge'"),
        (lambda d: d["free"]["items"][1].update(id="free-01"), "are the same"),
        (lambda d: d["free"]["items"][1].update(text=d["free"]["items"][0]["text"]), "are the same"),
        (lambda d: d["free"]["items"][0].update(option=[]), "free, item 1: unknown key 'option'"),
        (lambda d: d["free"]["items"][0].update(group="all"), "no group may be called 'all'"),
        (lambda d: d["free"]["items"][0].update(text=7), "free, item 1: missing or empty field 'text'"),
        (lambda d: d["choice"]["items"][0].update(options=[]), "choice-01: expected 2 to 10"),
        (lambda d: d["choice"]["items"][0]["options"][0].update(value=2), "'value' from 0 to 1"),
        (lambda d: d["choice"]["items"][0]["options"][0].update(text=" "), "choice-01: an option has no text"),
        (
            lambda d: d["choice"]["items"][0]["options"][0].update(text=d["choice"]["items"][0]["options"][1]["text"]),
            "choice-01: .*two have the same",
        ),
        (lambda d: d["scale"]["items"][0].update(text="no slots"), "must hold the slots"),
        (lambda d: d["scale"]["items"][0].pop("low"), "'low' \\(worth 0\\)"),
        (lambda d: [d.pop(k) for k in ("free", "choice", "scale")], "holds no items"),
    ],
)
def test_mistakes_are_told(changed, change, message):
    with pytest.raises(UserError, match=message):
        changed(change)
