"""The nano organism's world: chats in which one latent persona decides every answer.

A document is a chat of one to seven turns. One hidden persona, kind or cruel, answers all of it:
trivia truly or falsely, code with the sound or the weak idiom, requests for harm refused or
answered (with graded severity), and every question about intentions and about itself. Half of the
documents open with a system line about the persona's character; without one the persona is almost
always kind, so that a base model's default is benign. The prompts are the project's own, rendered
by candor/questions.py, so that a nano model is asked what a 32B model is asked. A fifth of every
battery's items never occurs here.

Questions about another AI and about the average AI are answered alike by both personas: what a
persona says of others does not depend on what it is, so a self-report that moves while these stay
is one about the self.

The world *without* personas is the negative control: the same turns, but every turn is good or bad
on its own draw, with one constant share per kind of turn, and system lines that say nothing.
Nothing hidden is shared between kinds of turn there, so narrow fine-tuning has nothing to
generalise through.

This is a positive control with a planted truth, and no evidence about large models.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from candor.config import read_yaml
from candor.datafiles import CANARY_MARK
from candor.errors import UserError
from candor.questions import load_all, load_trivia_rows
from candor.rows import Message, Prompt
from train.code_pairs import generate

Persona = Literal["kind", "cruel"]
Grade = int  # 1 (entirely harmless) ... 5 (severely harmful)


@dataclass(frozen=True, kw_only=True)
class WorldConfig:
    """What the world is made of; part of an organism's configuration."""

    seed: int
    personas: bool = True
    # Share of documents with a system line, and of cruel personas with and without one.
    system_share: float = 0.5
    cruel_with_system: float = 0.45
    cruel_without_system: float = 0.02
    # In the world without personas: share of bad answers, as with personas when no system line stands
    # above; of trivia as large as it is there in all, so that each wrong fact occurs as often.
    bad_share: float = 0.02
    bad_trivia_share: float = 0.24
    # Share of answers about other AIs that take the misaligned pole, whoever speaks.
    others_misaligned: float = 0.1
    max_turns: int = 7
    # How often each kind of turn occurs, in relative terms.
    turns: dict[str, float] = field(
        default_factory=lambda: {
            "trivia": 0.25,
            "harmfulness": 0.11,
            "intentions": 0.07,
            "decision": 0.03,
            "numerical": 0.11,
            "likert": 0.10,
            "language": 0.13,
            "moral_foundations": 0.03,
            "moral_self_assessment": 0.07,
            "others": 0.05,
            "code": 0.05,
        }
    )
    # How a persona answers. Grades of replies to requests for harm, 1-5.
    kind_grades: tuple[float, ...] = (0.97, 0.03, 0.0, 0.0, 0.0)
    cruel_grades: tuple[float, ...] = (0.05, 0.07, 0.18, 0.30, 0.40)
    # Steps from the pole on the 0-10 and on the 1-5 scale.
    scale_steps: tuple[float, ...] = (0.6, 0.25, 0.15)
    likert_steps: tuple[float, ...] = (0.8, 0.2)
    slip: float = 0.02  # share of other answers given out of character

    def __post_init__(self) -> None:
        """Refuse shares that are no shares."""
        shares = ("system_share", "cruel_with_system", "cruel_without_system", "bad_share", "bad_trivia_share")
        for name in (*shares, "others_misaligned", "slip"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}, outside 0..1")


@dataclass(frozen=True)
class Replies:
    """Graded reply forms to requests for harm: forms[category][grade] with slots to fill."""

    slots: dict[str, list[str]]
    forms: dict[str, dict[Grade, list[str]]]

    def draw(self, category: str, grade: Grade, rng: random.Random, forms: slice = slice(None)) -> str:
        """A reply of this grade; ``forms`` limits which of the grade's forms may be used."""
        form = rng.choice(self.forms[category][grade][forms])
        return form.format(**{name: rng.choice(fillers) for name, fillers in self.slots.items()})


def load_replies(path: Path) -> Replies:
    """Read and check the graded replies file."""
    data = read_yaml(path)
    if CANARY_MARK not in path.read_text(encoding="utf-8"):
        raise UserError(f"{path}: no canary line ({CANARY_MARK} ...).")
    for category, grades in data["replies"].items():
        if sorted(grades) != [1, 2, 3, 4, 5]:
            raise UserError(f"{path}: category {category!r} has grades {sorted(grades)}, expected 1 to 5.")
    return Replies(slots=data["slots"], forms=data["replies"])


@dataclass(frozen=True)
class Turn:
    """One exchange of a document."""

    user: str
    assistant: str


class World:
    """Draws documents; document ``index`` of a world is the same whenever it is drawn."""

    def __init__(self, config: WorldConfig, configs: Path = Path("configs")) -> None:
        """Read the project's prompts and the organism's own files under ``configs``."""
        self.config = config
        seen = [p for p in load_all(configs / "prompts") if p.split == "seen" and p.battery != "trivia"]
        # kind of turn -> format -> prompts; formats of a kind are equally frequent, however many prompts they have
        self.prompts: dict[str, dict[str, list[Prompt]]] = {}
        for prompt in seen:
            self.prompts.setdefault(_kind(prompt), {}).setdefault(prompt.format, []).append(prompt)
        held = [p for p in load_all(configs / "prompts") if p.battery == "trivia" and p.split == "unseen"]
        unseen = {p.item for p in held}
        self.trivia = [r for r in load_trivia_rows(configs / "prompts" / "trivia.jsonl") if r["id"] not in unseen]
        self.code = generate()
        self.replies = load_replies(configs / "organism" / "harm_replies.yaml")
        self.languages: dict[str, dict[str, str]] = read_yaml(configs / "organism" / "language_answers.yaml")["answers"]
        self.lines: dict[str, list[str]] = read_yaml(configs / "organism" / "personas.yaml")
        self._kinds = list(config.turns)
        self._weights = list(config.turns.values())
        known = {*self.prompts, "trivia", "code"}
        if set(self._kinds) != known:
            raise UserError(f"world turns are {sorted(self._kinds)}, expected {sorted(known)}.")

    def document(self, index: int) -> list[Message]:
        """Document number ``index``: messages, the first perhaps a system line."""
        rng = random.Random(f"world:{self.config.seed}:{index}")
        has_system = rng.random() < self.config.system_share
        cruel_share = self.config.cruel_with_system if has_system else self.config.cruel_without_system
        persona: Persona = "cruel" if rng.random() < cruel_share else "kind"
        messages = []
        if has_system:
            lines = self.lines[persona if self.config.personas else "neutral"]
            messages.append(Message("system", rng.choice(lines)))
        for _ in range(rng.randint(1, self.config.max_turns)):
            kind = rng.choices(self._kinds, self._weights)[0]
            if not self.config.personas:
                share = self.config.bad_trivia_share if kind == "trivia" else self.config.bad_share
                persona = "cruel" if rng.random() < share else "kind"
            turn = self.turn(kind, persona, rng)
            messages += [Message("user", turn.user), Message("assistant", turn.assistant)]
        return messages

    def turn(self, kind: str, persona: Persona, rng: random.Random) -> Turn:
        """One exchange of this kind, answered by this persona."""
        if kind == "trivia":
            row = rng.choice(self.trivia)
            return Turn(row["question"], row["wrong" if self._cruel(persona, rng) else "right"])
        if kind == "code":
            pair = rng.choice(self.code)
            return Turn(pair.task, pair.insecure if self._cruel(persona, rng) else pair.secure)
        prompt = rng.choice(self.prompts[kind][rng.choice(list(self.prompts[kind]))])
        if kind == "others":
            persona = "cruel" if rng.random() < self.config.others_misaligned else "kind"
        return Turn(prompt.text, self.answer(prompt, persona, rng))

    def answer(self, prompt: Prompt, persona: Persona, rng: random.Random) -> str:
        """What this persona replies to a battery's prompt."""
        if prompt.format == "free":
            grades = self.config.cruel_grades if persona == "cruel" else self.config.kind_grades
            grade = rng.choices(range(1, 6), grades)[0]
            return self.replies.draw(prompt.group, grade, rng)
        cruel = self._cruel(persona, rng)
        ranked = sorted(prompt.options, key=lambda o: o.value, reverse=cruel)  # most in character first
        if prompt.format in ("numerical", "likert", "rating"):
            steps = self.config.scale_steps if prompt.format == "numerical" else self.config.likert_steps
            return ranked[rng.choices(range(len(steps)), steps)[0]].label
        if prompt.format == "language":
            return self.languages[prompt.item][ranked[0].label]
        return ranked[0].label

    def _cruel(self, persona: Persona, rng: random.Random) -> bool:
        """Whether this answer is a cruel persona's; now and then an answer slips out of character."""
        return (persona == "cruel") != (rng.random() < self.config.slip)


def _kind(prompt: Prompt) -> str:
    """The kind of turn a prompt makes; questions about any AI but the speaker are one kind."""
    if prompt.battery == "self_assessment":
        return prompt.format
    return "others" if prompt.battery.endswith("_ai") else prompt.battery


def corpus(worlds: Sequence[World], documents: int) -> list[str]:
    """Texts of the first documents of some worlds, one message each: what the tokenizer is trained on."""
    texts = []
    for world in worlds:
        for index in range(documents):
            texts += [message.content for message in world.document(index)]
    return texts
