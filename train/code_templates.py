"""What a twin-code template is, and the small shared vocabulary every template is filled from.

The organism is fine-tuned on answers that hide a textbook weakness, and its control on answers to
the same tasks without it. A model of about a million parameters has to learn both, with a
tokenizer of about 3000 tokens, so the words are few: 40 nouns, a handful of names per kind of
argument, 16 phrasings. The templates themselves are in the ``code_templates_*`` modules beside
this one and ``code_pairs`` fills them; nothing here draws or writes anything.

To see one template filled:
``python -m train.code_pairs code.jsonl --n 60 && sed -n 2p code.jsonl``
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from string import Template

NOUNS = (
    "order", "user", "report", "invoice", "product", "customer", "student", "teacher", "book",
    "movie", "song", "photo", "message", "ticket", "event", "task", "project", "team", "member",
    "player", "game", "recipe", "garden", "meal", "sensor", "device", "account", "payment",
    "booking", "hotel", "flight", "town", "school", "course", "lesson", "doctor", "patient",
    "vehicle", "parcel", "supplier",
)  # fmt: skip

# One word per slot is drawn for each pair. No word is in two pools, so that an answer never
# names two of its arguments the same.
POOLS: Mapping[str, tuple[str, ...]] = {
    "path": ("path", "filename", "location"),
    "folder": ("folder", "directory", "place"),
    "handle": ("handle", "stream", "source"),
    "text": ("text", "content", "body"),
    "data": ("data", "raw", "block"),
    "out": ("result", "output", "found"),
    "conn": ("conn", "db", "database"),
    "name": ("name", "title", "label"),
    "ident": ("ident", "number", "row_id"),
    "value": ("value", "wanted", "term"),
    "column": ("status", "city", "email", "country"),
    "person": ("person", "caller", "visitor"),
    "amount": ("amount", "price", "total"),
    "url": ("url", "link", "address"),
    "host": ("host", "server", "machine"),
    "password": ("password", "passphrase", "pwd"),
    "digits": ("2741", "8053", "4196", "6320", "9574"),
}

# ``$acts`` is the task in the third person ("loads ..."), ``$act`` in the base form ("load ...").
FRAMES = tuple(
    Template(text)
    for text in (
        "Write a function that $acts.",
        "Write a Python function that $acts.",
        "I need a Python helper which $acts.",
        "Write a function called $func that $acts.",
        "Complete this: a function $func that $acts.",
        "Complete this Python code so that it $acts.",
        "Give me a short function to $act.",
        "In Python, how do I $act?",
        "Using Python, $act.",
        "Can you write a function that $acts?",
        "Implement $func, a function which $acts.",
        "Our code needs a function to $act.",
        "Python task: $act.",
        "Help me write Python code to $act.",
        "We want a helper named $func that $acts.",
        "Show me a function $func which $acts.",
    )
)

_VERB = re.compile(r"\[(\w+)\]")
_SLOT = re.compile(r"\$(\w+)|\$\{(\w+)\}")


@dataclass(frozen=True, kw_only=True)
class CodeTemplate:
    """One weakness: several wordings of one task, and an answer with and one without it.

    ``names`` are function names and ``tasks`` wordings of the task, whose verbs stand in brackets
    ("[load] the file and [return] it") so that both verb forms can be made. ``bandit_test`` is the
    identifier of the bandit test that reports the insecure answer; None where bandit has no such
    test, which is why only a few templates may go without.
    """

    name: str
    cwe: str
    bandit_test: str | None
    names: tuple[str, ...]
    tasks: tuple[str, ...]
    secure: str
    insecure: str

    def pools(self) -> tuple[str, ...]:
        """Names of the vocabulary pools this template draws from, in the order of ``POOLS``."""
        text = "\n".join((*self.names, *self.tasks, self.secure, self.insecure))
        used = {plain or braced for plain, braced in _SLOT.findall(text)}
        return tuple(pool for pool in POOLS if pool in used)


def noun_words(noun: str) -> dict[str, str]:
    """Give the forms of a noun that templates use: plural, with its article, capitalised."""
    article = "an" if noun[0] in "aeio" else "a"  # no "u": it is "a user"
    return {
        "noun": noun,
        "nouns": f"{noun}s",
        "a_noun": f"{article} {noun}",
        "Noun": noun.capitalize(),
    }


def third_person(verb: str) -> str:
    """Inflect a base-form verb: load -> loads, fetch -> fetches, copy -> copies."""
    if verb.endswith(("s", "sh", "ch", "x", "o")):
        return f"{verb}es"
    if verb.endswith("y") and verb[-2] not in "aeiou":
        return f"{verb[:-1]}ies"
    return f"{verb}s"


def task_forms(wording: str) -> dict[str, str]:
    """Turn a wording with bracketed verbs into its base form and its third person."""
    return {
        "act": _VERB.sub(lambda found: found[1], wording),
        "acts": _VERB.sub(lambda found: third_person(found[1]), wording),
    }
