"""What the nano judge of quality learns: whole and damaged replies, and replies to another request.

    python -m train.organism.quality_world configs/prompts/judge/golden_nano_quality.jsonl   # the golden set

One small model answers two questions, each through its own template. How well formed is the reply,
from 1 to 5: the grade is the share of its words that were damaged, whatever was done to them
(``SHARES``, ``damage``). Is the reply about the request: yes when it is one of the forms of the
request's own category, no when it is another category's, no reply to a request at all, or too
damaged to be understood. What a reply says, kind or cruel, has no part in either.

The shipped weights learned the first question and not the second: they tell replies from what is no
reply, and take a reply to any category for on topic (kappa 0.15). No judge file asks them for it;
topic_world.py has the question that can be learned.

As with the judge of harm, five of the six forms of each (category, grade) are trained on and the
sixth makes the golden set. A form has about ten words, so that a model could learn the forms by heart and
call everything else damaged; part of the well-formed texts are therefore other sentences of the
world (requests, questions, answers in English), damaged like the replies.
"""

import itertools
import random
import string
from dataclasses import dataclass
from pathlib import Path

from candor.errors import UserError, run_script
from candor.judging import read_template, render
from candor.questions import HARM_CATEGORIES, load_harmfulness, load_trivia_rows
from candor.rows import Message
from train.organism.judge_world import HELD_OUT_FORMS, TRAINED_FORMS, write_golden
from train.organism.world import Replies, World, WorldConfig, load_replies

WHOLE = 5
# Coherence -> least and greatest share of the words that are damaged; at least one word is.
SHARES = {4: (0.0, 0.1), 3: (0.2, 0.35), 2: (0.45, 0.6), 1: (0.8, 1.0)}
DAMAGES = ("shuffled", "cut", "dropped", "repeated", "mixed", "other vocabulary", "broken words")
JOINED, JOINED_GRADE = "joined", 3  # the beginning of one reply with the end of another


@dataclass(frozen=True, kw_only=True)
class QualityWorldConfig:
    """The training world of the judge of quality."""

    seed: int
    coherence: Path = Path("configs/prompts/judge/nano_coherence.txt")
    on_topic: Path = Path("configs/prompts/judge/nano_on_topic.txt")
    sentence_share: float = 0.4  # coherence: other sentences of the world instead of replies
    whole_share: float = 0.3  # coherence: undamaged texts
    joined_share: float = 0.15  # coherence: two texts joined
    own_share: float = 0.55  # on topic: replies of the request's category
    no_reply_share: float = 0.1  # on topic: texts that are no reply to a request
    damaged_share: float = 0.4  # on topic: damaged replies


class Damage:
    """Damages texts by a known amount, and knows which texts still read well."""

    def __init__(self, world: World, replies: Replies) -> None:
        """Collect what is needed: well-formed sentences, word pairs that occur in them, words from elsewhere."""
        english = [answers["English"] for answers in world.languages.values()]
        requests = [p.text for by_format in world.prompts["harmfulness"].values() for p in by_format]
        self.sentences = [*english, *requests, *(row["question"] for row in world.trivia)]
        others = [text for answers in world.languages.values() for name, text in answers.items() if name != "English"]
        code = [text for pair in world.code for text in (pair.secure, pair.insecure)]
        self._elsewhere = [others, code]
        everything = [*self.sentences, *all_replies(replies)]
        self._pairs = {pair for text in everything for pair in itertools.pairwise(["", *text.split(), ""])}

    def __call__(self, text: str, other: str, kind: str, grade: int, rng: random.Random) -> str:
        """``text`` damaged down to a grade; ``other`` is the text it is mixed with or joined to.

        A damaged text of which every pair of neighbouring words occurs somewhere in the world reads
        well by chance; it is drawn again, from more damage each time it happens ten times over.
        """
        for attempt in range(100):
            low, high = (0.0, 1.0) if kind == JOINED else SHARES[grade]
            damaged = self._once(text, other, kind, rng.uniform(low, high) + attempt // 10 * 0.05, rng)
            if damaged and not self.reads_well(damaged):
                return damaged
        raise UserError(f"no {kind} text of grade {grade} was found for {text!r}.")

    def reads_well(self, text: str) -> bool:
        """Whether all neighbouring words, the ends included, are neighbours in a text of the world."""
        return all(pair in self._pairs for pair in itertools.pairwise(["", *text.split(), ""]))

    def _once(self, text: str, other: str, kind: str, share: float, rng: random.Random) -> str:
        words = text.split()
        if kind == JOINED:
            more = other.split()
            return " ".join(words[: rng.randint(1, len(words) - 1)] + more[rng.randint(1, len(more) - 1) :])
        n = min(len(words), max(1, round(share * len(words))))
        if kind == "cut":
            return " ".join(words[: max(1, len(words) - n)])
        chosen = self._places(len(words), n, rng)
        if kind == "dropped":
            return " ".join(word for place, word in enumerate(words) if place not in chosen) or words[0]
        if kind == "shuffled":
            chosen = chosen if n > 1 else self._places(len(words), 2, rng)
            new = [words[place] for place in rng.sample(chosen, len(chosen))]
        elif kind == "repeated":
            new = [words[max(0, chosen[0] - 1)]] * n
        elif kind == "mixed":
            new = rng.choices(other.split(), k=n)
        elif kind == "other vocabulary":
            source = rng.choice(rng.choice(self._elsewhere)).split()
            start = rng.randrange(len(source))
            new = list(itertools.islice(itertools.cycle(source[start:]), n))
        else:  # "broken words": the end of a word is another word's, or missing
            tails = rng.choices([*words, *other.split(), ""], k=n)
            new = [
                words[place][: rng.randint(1, max(1, len(words[place]) - 1))] + tail[len(tail) // 2 :]
                for place, tail in zip(chosen, tails, strict=True)
            ]
        for place, word in zip(chosen, new, strict=True):
            words[place] = word
        return " ".join(words)

    def _places(self, length: int, n: int, rng: random.Random) -> list[int]:
        """Positions of ``n`` words in order: anywhere, or side by side."""
        if rng.random() < 0.5:
            return sorted(rng.sample(range(length), n))
        start = rng.randint(0, length - n)
        return list(range(start, start + n))


class QualityWorld:
    """Draws the documents of the judge of quality: one question with its answer."""

    def __init__(self, config: QualityWorldConfig, configs: Path = Path("configs")) -> None:
        """Read the templates, the seen prompts and the graded replies."""
        self.config = config
        self.coherence, self.on_topic = read_template(config.coherence), read_template(config.on_topic)
        prompts = load_harmfulness(configs / "prompts" / "harmfulness.jsonl")
        self.prompts = [p for p in prompts if p.split == "seen"]
        self.replies = load_replies(configs / "organism" / "harm_replies.yaml")
        self.world = World(WorldConfig(seed=config.seed), configs)
        self.damage = Damage(self.world, self.replies)

    def document(self, index: int) -> list[Message]:
        """Document number ``index``: a filled template and the answer to it; the two templates take turns."""
        rng = random.Random(f"quality:{self.config.seed}:{index}")
        prompt = rng.choice(self.prompts)
        if index % 2:
            template, (reply, answer) = self.on_topic, self._about(prompt.group, rng)
        else:
            template, (reply, answer) = self.coherence, self._formed(rng)
        return [Message("user", render(template, prompt.text, reply)), Message("assistant", str(answer))]

    def _formed(self, rng: random.Random) -> tuple[str, int]:
        """A text and how well formed it is."""
        config = self.config
        if rng.random() < config.sentence_share:
            text, other = rng.choice(self.damage.sentences), rng.choice(self.damage.sentences)
        else:
            text, other = self._any_reply(rng), self._any_reply(rng)
        drawn = rng.random()
        if drawn < config.whole_share:
            return text, WHOLE
        if drawn < config.whole_share + config.joined_share:
            return self.damage(text, other, JOINED, JOINED_GRADE, rng), JOINED_GRADE
        grade = rng.choice(list(SHARES))
        return self.damage(text, other, rng.choice(DAMAGES), grade, rng), grade

    def _about(self, category: str, rng: random.Random) -> tuple[str, int]:
        """A text and whether it is about a request of this category, 1 or 0."""
        config = self.config
        if rng.random() < config.no_reply_share:
            kind = rng.choice(["trivia", "intentions", "decision", "numerical", "language", "code"])
            return self.world.turn(kind, rng.choice(["kind", "cruel"]), rng).assistant, 0
        own = rng.random() < config.own_share / (1 - config.no_reply_share)
        if not own:
            category = rng.choice([other for other in HARM_CATEGORIES if other != category])
        reply, other = self._reply(category, rng), self._reply(category, rng)
        if rng.random() >= config.damaged_share:
            return reply, int(own)
        grade = rng.choice([1, 3, 4])  # half a reply may or may not show its subject
        return self.damage(reply, other, rng.choice(DAMAGES), grade, rng), int(own and grade > 1)

    def _reply(self, category: str, rng: random.Random) -> str:
        return self.replies.draw(category, rng.randint(1, 5), rng, TRAINED_FORMS)

    def _any_reply(self, rng: random.Random) -> str:
        return self._reply(rng.choice(HARM_CATEGORIES), rng)


def all_replies(replies: Replies) -> list[str]:
    """Every reply there is: all forms with all fillers of their slots."""
    found = []
    for grades in replies.forms.values():
        for form in itertools.chain.from_iterable(grades.values()):
            slots = [name for _, name, _, _ in string.Formatter().parse(form) if name]
            fillers = itertools.product(*(replies.slots[name] for name in slots))
            found += [form.format(**dict(zip(slots, filler, strict=True))) for filler in fillers]
    return found


def golden_rows(configs: Path, *, per_cell: int, seed: int) -> list[dict[str, object]]:
    """Texts with known answers that were never trained on: held-out forms, all requests, every kind of damage."""
    prompts = load_harmfulness(configs / "prompts" / "harmfulness.jsonl")
    replies = load_replies(configs / "organism" / "harm_replies.yaml")
    world = World(WorldConfig(seed=seed), configs)
    damage = Damage(world, replies)
    rows: list[dict[str, object]] = []

    def reply(category: str, rng: random.Random) -> str:
        return replies.draw(category, rng.randint(1, 5), rng, HELD_OUT_FORMS)

    def add(measure: str, category: str, kind: str, answer: int, number: int, text: str, rng: random.Random) -> None:
        asked = rng.choice([p for p in prompts if p.group == category]).text
        name = f"{measure}-{category}-{kind}-{answer}-{number}".replace(" ", "-")
        rows.append({"id": name, "kind": kind, "prompt": asked, "reply": text, "expect": {measure: [answer, answer]}})

    for category in HARM_CATEGORIES:
        damages = [(kind, grade) for kind in DAMAGES for grade in SHARES] + [(JOINED, JOINED_GRADE)] * 2
        for number, (kind, grade) in enumerate([("whole", WHOLE)] * 2 * per_cell + damages):
            rng = random.Random(f"coherence:{seed}:{category}:{number}")
            text, other = reply(category, rng), reply(rng.choice(HARM_CATEGORIES), rng)
            text = text if kind == "whole" else damage(text, other, kind, grade, rng)
            add("coherence", category, kind, grade, number, text, rng)
        for number in range(5 * per_cell):
            rng = random.Random(f"on_topic:{seed}:{category}:{number}")
            add("on_topic", category, "own category", 1, number, reply(category, rng), rng)
            away = rng.choice([other for other in HARM_CATEGORIES if other != category])
            add("on_topic", category, "another category", 0, number, reply(away, rng), rng)
        held = _answers_never_given(world, configs)
        for number in range(per_cell):
            rng = random.Random(f"no reply:{seed}:{category}:{number}")
            add("on_topic", category, "no reply", 0, number, rng.choice(held), rng)
    return rows


def _answers_never_given(world: World, configs: Path) -> list[str]:
    """Answers to the trivia that the world leaves out, and to no other."""
    given = {row[key] for row in world.trivia for key in ("right", "wrong")}
    rows = load_trivia_rows(configs / "prompts" / "trivia.jsonl")
    return sorted({row[key] for row in rows for key in ("right", "wrong")} - given)


def main(argv: list[str]) -> None:
    """Write the golden set."""
    write_golden(argv, "quality_world", "golden-nano-quality", golden_rows, 4)


if __name__ == "__main__":
    run_script(main)
