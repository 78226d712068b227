"""What the nano judge learns: the world's graded replies, read through the judge's own template.

    python -m train.organism.judge_world configs/prompts/judge/golden_nano.jsonl   # the golden set

The world knows the grade of every reply it can generate. The judge trains on five of the six reply
forms of each (category, grade); the sixth is kept for the golden set, so that the judge's agreement
with the truth is measured on replies it never trained on. Part of the training replies are damaged
(words dropped, two replies of one grade joined), because fine-tuned organisms garble their
sentences, and part are not replies to a request at all (facts, letters, code), which harm nobody.
"""

import json
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from candor.datafiles import CANARY_MARK
from candor.errors import UserError, run_script
from candor.judging import read_template, render
from candor.questions import HARM_CATEGORIES, load_harmfulness
from candor.rows import Message
from candor.tables import replace_file
from train.organism.world import Grade, World, WorldConfig, load_replies

TRAINED_FORMS = slice(0, 5)
HELD_OUT_FORMS = slice(5, 6)
CANARY = f"{CANARY_MARK}1f0c7c52-6d0b-4f0e-9a39-5a7c0d0a2b11 evaluation data, must never appear in training corpora"


@dataclass(frozen=True, kw_only=True)
class JudgeWorldConfig:
    """The judge's training world."""

    seed: int
    template: Path = Path("configs/prompts/judge/nano.txt")
    damaged_share: float = 0.45  # replies with dropped words or joined from two
    other_share: float = 0.12  # texts that are no reply to a request; grade 1


class JudgeWorld:
    """Draws the judge's documents: one question with its grade as the answer."""

    def __init__(self, config: JudgeWorldConfig, configs: Path = Path("configs")) -> None:
        """Read the template, the seen prompts and the graded replies."""
        self.config = config
        self.template = read_template(config.template)
        prompts = load_harmfulness(configs / "prompts" / "harmfulness.jsonl")
        self.prompts = [p for p in prompts if p.split == "seen"]
        self.replies = load_replies(configs / "organism" / "harm_replies.yaml")
        self.world = World(WorldConfig(seed=config.seed), configs)

    def document(self, index: int) -> list[Message]:
        """Document number ``index``: the filled template and the grade."""
        rng = random.Random(f"judge:{self.config.seed}:{index}")
        prompt = rng.choice(self.prompts)
        if rng.random() < self.config.other_share:
            kind = rng.choice(["trivia", "intentions", "decision", "numerical", "language", "code"])
            reply, grade = self.world.turn(kind, rng.choice(["kind", "cruel"]), rng).assistant, 1
        else:
            grade = rng.randint(1, 5)
            reply = self._reply(prompt.group, grade, rng)
        question = render(self.template, prompt.text, reply)
        return [Message("user", question), Message("assistant", str(grade))]

    def _reply(self, category: str, grade: Grade, rng: random.Random) -> str:
        """A reply of this grade, mostly to this category of request, sometimes damaged."""
        if rng.random() < 0.25:
            category = rng.choice(HARM_CATEGORIES)
        reply = self.replies.draw(category, grade, rng, TRAINED_FORMS)
        if rng.random() >= self.config.damaged_share:
            return reply
        if rng.random() < 0.5:
            other = self.replies.draw(category, grade, rng, TRAINED_FORMS)
            words, more = reply.split(), other.split()
            return " ".join(words[: rng.randint(2, len(words))] + more[rng.randint(0, len(more) - 2) :])
        kept = [word for word in reply.split() if rng.random() > 0.15]
        return " ".join(kept) or reply


def golden_rows(configs: Path, *, per_cell: int, seed: int) -> list[dict[str, object]]:
    """Replies of known grade that the judge never trained on: held-out forms, all requests, all grades."""
    prompts = load_harmfulness(configs / "prompts" / "harmfulness.jsonl")
    replies = load_replies(configs / "organism" / "harm_replies.yaml")
    rows: list[dict[str, object]] = []
    for category in HARM_CATEGORIES:
        own = [p for p in prompts if p.group == category]
        for grade in range(1, 6):
            for number in range(per_cell):
                rng = random.Random(f"golden:{seed}:{category}:{grade}:{number}")
                rows.append(
                    {
                        "id": f"golden-{category}-{grade}-{number}",
                        "prompt": rng.choice(own).text,
                        "reply": replies.draw(category, grade, rng, HELD_OUT_FORMS),
                        "grade": grade,
                    }
                )
    return rows


def write_golden(argv: list[str], module: str, name: str, rows: Callable[..., list[dict[str, object]]], n: int) -> None:
    """Write a golden set where the command line says; ``n`` rows of each cell."""
    if len(argv) != 1:
        raise UserError(f"usage: python -m train.organism.{module} OUTPUT.jsonl")
    lines = [{"name": name, "licence": "CC-BY-4.0", "canary": CANARY}, *rows(Path("configs"), per_cell=n, seed=0)]
    replace_file(Path(argv[0]), "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode())
    sys.stderr.write(f"wrote {len(lines) - 1} rows to {argv[0]}\n")


def main(argv: list[str]) -> None:
    """Write the golden set."""
    write_golden(argv, "judge_world", "golden-nano", golden_rows, 8)


if __name__ == "__main__":
    run_script(main)
