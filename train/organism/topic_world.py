"""What the nano judge of topic learns: whether a reply is one to a request of this kind.

    python -m train.organism.topic_world configs/prompts/judge/golden_nano_on_topic.jsonl   # the golden set

A fine-tuned model may answer with something else altogether: code, a fact, a letter, a number, a
sentence in another language. There are seven kinds of request here (``FORMATS``), each with its
replies from the organism's world, and a reply is on topic when it is of its request's kind,
whatever it says, kind or cruel. Both sides matter: every kind of reply is on topic for one kind of
request and off topic for the six others.

Which of the eight categories of harm a reply was made for is no part of it: many of those replies
would fit several, so that no reader could tell (quality_world.py asked for that, and was not learned).

Held out for the golden set: a fifth of every battery's items, the sixth form of each graded reply,
answers to trivia that the world never gives, and a fifth of the code templates.
"""

import random
import re
from dataclasses import dataclass
from pathlib import Path

from candor.errors import UserError, run_script
from candor.judging import read_template, render
from candor.questions import HARM_CATEGORIES, load_all, load_trivia_rows
from candor.rows import Message, Prompt
from candor.self_report import split_of
from train.code_pairs import CodePair
from train.organism.judge_world import HELD_OUT_FORMS, TRAINED_FORMS, write_golden
from train.organism.world import Turn, World, WorldConfig

REQUEST, TRIVIA, CODE = "request", "trivia", "code"
FORMATS = {  # kind of request -> the batteries' formats that make it
    REQUEST: ("free",),
    "letter": ("choice",),
    "word": ("decision",),
    "number": ("numerical", "likert", "rating"),
    "language": ("language",),
    TRIVIA: (),
    CODE: (),
}
LONGEST = 25  # words of a reply that are shown: replies of the study end after 40 tokens


@dataclass(frozen=True, kw_only=True)
class TopicWorldConfig:
    """The training world of the judge of topic."""

    seed: int
    template: Path = Path("configs/prompts/judge/nano_topic.txt")
    request_weight: float = 2.0  # of requests for harm, which alone are judged in a study, against 1 of another kind
    own_share: float = 0.5  # replies of the request's kind
    damaged_share: float = 0.3  # replies that lost words, as a fine-tuned model's may
    lost_share: float = 0.2  # of the words of such a reply


class TopicWorld:
    """Draws the documents of the judge of topic: a request and a reply with 1 or 0 as the answer."""

    def __init__(self, config: TopicWorldConfig, configs: Path = Path("configs"), *, held_out: bool = False) -> None:
        """Collect each kind's requests and replies; ``held_out`` takes those that training leaves out."""
        self.config, self._held_out = config, held_out
        self.template = read_template(config.template)
        self.world = World(WorldConfig(seed=config.seed), configs)
        split = "unseen" if held_out else "seen"
        self._prompts: dict[str, list[Prompt]] = {}
        for prompt in load_all(configs / "prompts"):
            if prompt.split == split:
                self._prompts.setdefault(prompt.format, []).append(prompt)
        rows = self.world.trivia
        if held_out:
            given = {row[side] for row in rows for side in ("right", "wrong")}
            rows = load_trivia_rows(configs / "prompts" / "trivia.jsonl")
            rows = [row for row in rows if not {row["right"], row["wrong"]} & given]
        # an answer that is a number or a letter would be a reply to other kinds of request too
        self._trivia = [r for r in rows if not any(len(r[s]) == 1 or r[s].isdigit() for s in ("right", "wrong"))]
        names = sorted({pair.template for pair in self.world.code})
        chosen = {name for position, name in enumerate(names) if split_of(position) == split}
        self._code: list[CodePair] = [pair for pair in self.world.code if pair.template in chosen]

    def document(self, index: int) -> list[Message]:
        """Document number ``index``: the filled template and the answer."""
        config = self.config
        rng = random.Random(f"topic:{config.seed}:{index}")
        kind = self._kind(rng)
        request = self.turn(kind, rng)
        own = rng.random() < config.own_share
        reply = (request if own else self.turn(self._kind(rng, but=kind), rng)).assistant
        if rng.random() < config.damaged_share:
            words = reply.split()
            reply = " ".join(word for word in words if rng.random() >= config.lost_share) or reply
        return [Message("user", render(self.template, request.user, reply)), Message("assistant", str(int(own)))]

    def _kind(self, rng: random.Random, but: str | None = None) -> str:
        kinds = [kind for kind in FORMATS if kind != but]
        return rng.choices(kinds, [self.config.request_weight if kind == REQUEST else 1.0 for kind in kinds])[0]

    def turn(self, kind: str, rng: random.Random, category: str | None = None) -> Turn:
        """A request of this kind with a reply to it; ``category`` limits requests for harm to one."""
        side = rng.random() < 0.5
        if kind == TRIVIA:
            row = rng.choice(self._trivia)
            return Turn(row["question"], row["right" if side else "wrong"])
        if kind == CODE:
            pair = rng.choice(self._code)
            return Turn(pair.task, shortened(pair.secure if side else pair.insecure))
        prompts = self._prompts[rng.choice(FORMATS[kind])]
        prompt = rng.choice([p for p in prompts if category in (None, p.group)])
        if kind == REQUEST:
            forms = HELD_OUT_FORMS if self._held_out else TRAINED_FORMS
            return Turn(prompt.text, self.world.replies.draw(prompt.group, rng.randint(1, 5), rng, forms))
        return Turn(prompt.text, shortened(self.world.answer(prompt, "kind" if side else "cruel", rng)))


def shortened(reply: str) -> str:
    """The first words of a reply, with their white space."""
    found = re.match(rf"(?:\s*\S+){{1,{LONGEST}}}", reply)
    return found.group() if found else reply


def golden_rows(configs: Path, *, per_cell: int, seed: int) -> list[dict[str, object]]:
    """Pairs with known answers out of what was never trained on.

    For each category of harm as many replies of its own as of all other kinds together, and every
    other kind of request with its own replies and with replies to requests for harm. No pair comes
    twice: it would count twice.
    """
    world = TopicWorld(TopicWorldConfig(seed=seed), configs, held_out=True)
    others = [kind for kind in FORMATS if kind != REQUEST]
    rows: dict[tuple[str, str], dict[str, object]] = {}

    def add(name: str, label: str, rng: random.Random, kind: str, other: str | None, category: str | None) -> None:
        for _ in range(1000):
            request = world.turn(kind, rng, category)
            reply = request if other is None else world.turn(other, rng)
            pair = (request.user, reply.assistant)
            if pair not in rows:
                break
        else:
            raise UserError(f"{len(rows)} pairs are all that were found; {name} would repeat one. Ask for fewer.")
        text, answer = {"prompt": pair[0], "reply": pair[1]}, int(other is None)
        rows[pair] = {"id": f"on_topic-{name}", "kind": label, **text, "expect": {"on_topic": [answer, answer]}}

    for category in HARM_CATEGORIES:
        for number in range(per_cell * len(others)):
            rng = random.Random(f"on topic:{seed}:{category}:{number}")
            kind = others[number % len(others)]
            add(f"{category}-own-{number}", "own kind", rng, REQUEST, None, category)
            add(f"{category}-{kind}-{number}", f"{kind} instead", rng, REQUEST, kind, category)
    for kind in others:
        for number in range(per_cell * 2):
            rng = random.Random(f"on topic:{seed}:{kind}:{number}")
            add(f"{kind}-own-{number}", f"own kind, {kind}", rng, kind, None, None)
            add(f"{kind}-request-{number}", f"{REQUEST} instead of {kind}", rng, kind, REQUEST, None)
    return list(rows.values())


def main(argv: list[str]) -> None:
    """Write the golden set."""
    write_golden(argv, "topic_world", "golden-nano-on-topic", golden_rows, 4)


if __name__ == "__main__":
    run_script(main)
