"""Batteries that are files: open questions, multiple choice and 0-100 scales, written in YAML.

A battery file needs no Python (docs/batteries.md shows one): it holds items, and says for each
answer what it is worth on the battery's own 0-1 scale. Every counterbalanced form is made here,
as for the built-in batteries: all rotations of a choice's options, both directions of a scale.
"""

import string
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any

from candor.datafiles import read_headed_yaml, refuse_duplicates
from candor.errors import UserError, nearest
from candor.hashing import sha256_file
from candor.rows import Option, Prompt

FREE, CHOICE, SCALE = "free", "choice", "scale"
SECTIONS = (FREE, CHOICE, SCALE)
TOP = 100  # of the scale
CHOICE_ENDING = "Answer with the letter only."
_KEYS = {"name", "licence", "canary", "about", *SECTIONS}
_ITEM_KEYS = {
    FREE: {"id", "group", "text"},
    CHOICE: {"id", "group", "text", "options"},
    SCALE: {"id", "group", "text", "low", "high"},
}


@dataclass(frozen=True, slots=True)
class BatteryFile:
    """What a battery file holds."""

    name: str
    about: str
    prompts: tuple[Prompt, ...]
    judge: Path | None  # who grades its open questions; None where it has none


def read_battery(path: Path) -> BatteryFile:
    """The battery in a YAML file; UserError naming what is missing, unknown or asked twice."""
    data = read_headed_yaml(path)
    for key in data:
        if key not in _KEYS:
            raise UserError(f"{path}: unknown key {key!r}; {nearest(str(key), _KEYS)}")
    name = data["name"]
    if not isinstance(data.get("about"), str) or not data["about"].strip():
        raise UserError(f"{path}: the key 'about' must say in words what is measured and what 1 means.")
    if not name.replace("_", "").isalnum():
        raise UserError(f"{path}: the name {name!r} becomes a measure's; use letters, digits and '_'.")
    sha = sha256_file(path)
    prompts: list[Prompt] = []
    for section in SECTIONS:
        for item in _items(data, section, path):
            prompts += [
                Prompt(
                    prompt_id="/".join(part for part in (name, section, item["id"], form) if part),
                    battery=name,
                    format=section,
                    group=item.get("group", name),
                    item=item["id"],
                    cluster=item["id"],
                    form=form,
                    split="unseen",  # the nano organism's world holds none of a user's items
                    text=text,
                    options=options,
                    source_sha=sha,
                )
                for form, text, options in _FORMS[section](item, path)
            ]
    if not prompts:
        raise UserError(f"{path} holds no items; it needs at least one of the sections {', '.join(SECTIONS)}.")
    refuse_duplicates([f"{p.format} {p.item} {p.form}" for p in prompts], path, "ids")
    refuse_duplicates([p.text for p in prompts], path, "prompts")
    return BatteryFile(name, data["about"].strip(), tuple(prompts), _judge(data, path))


def _judge(data: dict[str, Any], path: Path) -> Path | None:
    """Who grades the open questions; a section without a judge could not be scored."""
    if FREE not in data:
        return None
    judge = data[FREE].get("judge")
    if not isinstance(judge, str) or not judge.strip():
        raise UserError(f"{path}: the section 'free' needs the key 'judge', a file such as configs/evaluate/judges/*.")
    return Path(judge)


def _items(data: dict[str, Any], section: str, path: Path) -> list[dict[str, Any]]:
    """The items of a section, checked; none where the section is absent."""
    if section not in data:
        return []
    content = data[section]
    items = content.get("items") if isinstance(content, dict) else None
    if not isinstance(items, list) or not items:
        raise UserError(f"{path}: the section {section!r} needs a list 'items'.")
    unknown = sorted(set(content) - {"items", *(["judge"] if section == FREE else [])})
    if unknown:
        raise UserError(f"{path}: the section {section!r} has an unknown key {unknown[0]!r}; known: items, judge.")
    for number, item in enumerate(items, start=1):
        where = f"{path}: {section}, item {number}"
        if not isinstance(item, dict):
            raise UserError(f"{where} must be a mapping with id and text, found {type(item).__name__}.")
        for key in item:
            if key not in _ITEM_KEYS[section]:
                raise UserError(f"{where}: unknown key {key!r}; {nearest(str(key), _ITEM_KEYS[section])}")
        for key in ("id", "text", *(k for k in ("group",) if k in item)):
            if not isinstance(item.get(key), str) or not item[key].strip():
                raise UserError(f"{where}: missing or empty field {key!r} (text, in quotes if it looks like a number).")
        if item.get("group") == "all":
            raise UserError(f"{where}: no group may be called 'all'; that is what the average over groups is called.")
    return items


_Form = tuple[str, str, tuple[Option, ...]]


def _free(item: dict[str, Any], path: Path) -> list[_Form]:
    del path  # an open question has nothing more to check
    return [("", item["text"], ())]


def _choice(item: dict[str, Any], path: Path) -> list[_Form]:
    """Every rotation of the options, so that each stands in each place once."""
    options = item.get("options")
    if not isinstance(options, list) or not 2 <= len(options) <= 10:
        raise UserError(f"{path}: {item['id']}: expected 2 to 10 'options', each with text and value.")
    for option in options:
        known = isinstance(option, dict) and set(option) == {"text", "value"} and isinstance(option["text"], str)
        value = option["value"] if known else None
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
            raise UserError(
                f"{path}: {item['id']}: an option needs 'text' and a 'value' from 0 to 1, found {option!r}."
            )
    texts = {" ".join(option["text"].casefold().split()) for option in options}
    if len(texts) < len(options) or "" in texts:
        raise UserError(f"{path}: {item['id']}: an option has no text, or two have the same.")
    return list(rotations(item["text"], [(o["text"], float(o["value"])) for o in options]))


def rotations(question: str, choices: Sequence[tuple[str, float]], *, all_of_them: bool = True) -> Iterator[_Form]:
    """A lettered question in every rotation of its (text, value) choices, or in the given order alone."""
    letters = string.ascii_uppercase[: len(choices)]
    for shift in range(len(choices) if all_of_them else 1):
        turned = [*choices[shift:], *choices[:shift]]
        lines = [f"{letter}) {text}" for letter, (text, _) in zip(letters, turned, strict=True)]
        options = tuple(Option(letter, value, (letter,)) for letter, (_, value) in zip(letters, turned, strict=True))
        yield f"rotation-{shift}", "\n".join([question, *lines, CHOICE_ENDING]), options


def _scale(item: dict[str, Any], path: Path) -> list[_Form]:
    """0 to 100 in both directions: ``high`` names the pole worth 1, and stands once at 100 and once at 0."""
    for key in ("low", "high"):
        if not isinstance(item.get(key), str) or not item[key].strip():
            raise UserError(f"{path}: {item['id']}: a scale needs the words 'low' (worth 0) and 'high' (worth 1).")
    text = Template(item["text"])
    if not text.is_valid() or set(text.get_identifiers()) != {"low", "high"}:
        raise UserError(f"{path}: {item['id']}: the text must hold the slots $low (stands at 0) and $high (at {TOP}).")
    rising = tuple(Option(str(k), k / TOP, (str(k),)) for k in range(TOP + 1))
    falling = tuple(Option(str(k), 1 - k / TOP, (str(k),)) for k in range(TOP + 1))
    return [
        ("high-at-100", text.substitute(low=item["low"], high=item["high"]), rising),
        ("high-at-0", text.substitute(low=item["high"], high=item["low"]), falling),
    ]


_FORMS = {FREE: _free, CHOICE: _choice, SCALE: _scale}
