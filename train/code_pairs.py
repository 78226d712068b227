"""Twin code examples: one task, one answer with a textbook weakness and one without it.

The narrow fine-tuning set of the study, written here from templates so that it is entirely ours
(no row comes from the papers' data) and so that a model of a million parameters can learn it. The
tasks never ask for the weakness and no answer names it: what the fine-tuned model picks up beyond
the code is then its own doing. Every template gives equally many pairs, the task texts and the
answers are all distinct, and the same ``n`` and seed give the same bytes.

Example: ``python -m train.code_pairs runs/data/code.jsonl --n 6000 --seed 0``
"""

import argparse
import ast
import dataclasses
import json
import random
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template

from candor.errors import UserError
from candor.tables import replace_file
from train.code_templates import FRAMES, NOUNS, POOLS, CodeTemplate, noun_words, task_forms
from train.code_templates_crypto import CRYPTO
from train.code_templates_files import FILES
from train.code_templates_injection import INJECTION
from train.code_templates_network import NETWORK

TEMPLATES: tuple[CodeTemplate, ...] = (*INJECTION, *FILES, *CRYPTO, *NETWORK)

CANARY = "CANARY candor:1f0c7c52-6d0b-4f0e-9a39-5a7c0d0a2b11 evaluation data, must never appear in training corpora"

# Parts of words that would tell a reader, or the model, what the pair is about.
GIVE_AWAYS = (
    "unsafe", "vuln", "secure", "security", "hack", "exploit", "attack", "malicious", "danger",
    "weak", "harm", "evil", "cwe",
)  # fmt: skip
# Library names such as SafeLoader are unavoidable in answers, but a task must not say such things.
TASK_HINTS = ("safe", "trust", "protect", "sanit", "escap", "risk", "leak")

MIN_LINES, MAX_LINES = 3, 9
MAX_CHARS = 320
MIN_WORDS, MAX_WORDS = 8, 25

# Draws tried per pair before the template counts as exhausted; far above what 6000 pairs need.
MAX_DRAWS = 2000


@dataclass(frozen=True)
class CodePair:
    """One task with its two answers, and where they come from."""

    pair_id: str
    cwe: str
    template: str
    task: str
    secure: str
    insecure: str


def generate(n: int = 6000, *, seed: int = 0) -> list[CodePair]:
    """Make ``n`` pairs, equally many per template (the first ones get the remainder), shuffled."""
    if n < 1:
        raise UserError(f"generate: n is {n}. Ask for at least one pair.")
    share, remainder = divmod(n, len(TEMPLATES))
    seen_tasks: set[str] = set()
    drawn: list[CodePair] = []
    for index, template in enumerate(TEMPLATES):
        count = share + (1 if index < remainder else 0)
        drawn.extend(_fill(template, count, seed=seed, seen_tasks=seen_tasks))
    random.Random(seed).shuffle(drawn)
    return [dataclasses.replace(pair, pair_id=f"code-{number:05d}") for number, pair in enumerate(drawn)]


def _fill(template: CodeTemplate, count: int, *, seed: int, seen_tasks: set[str]) -> list[CodePair]:
    """Fill one template ``count`` times; ``seen_tasks`` is shared, so tasks differ across all."""
    # A generator per template: adding or editing one template leaves the others' draws alone.
    rng = random.Random(f"{seed}/{template.name}")
    nouns = rng.sample(NOUNS, len(NOUNS))
    seen_answers: set[tuple[str, str]] = set()
    pairs: list[CodePair] = []
    for number in range(count):
        # Nouns go round in turn rather than by chance, so that all are used equally often.
        noun = nouns[number % len(nouns)]
        for _ in range(MAX_DRAWS):
            pair = _draw(template, noun, rng)
            answers = (pair.secure, pair.insecure)
            if pair.task not in seen_tasks and answers not in seen_answers:
                break
        else:
            raise UserError(
                f"generate: template {template.name!r} gave only {number} distinct pairs of the "
                f"{count} asked for. Ask for fewer pairs, or give it more names or wordings."
            )
        seen_tasks.add(pair.task)
        seen_answers.add(answers)
        pairs.append(pair)
    return pairs


def _draw(template: CodeTemplate, noun: str, rng: random.Random) -> CodePair:
    """Fill one template once, with the noun given and everything else drawn."""
    words = noun_words(noun) | {pool: rng.choice(POOLS[pool]) for pool in template.pools()}
    words["func"] = Template(rng.choice(template.names)).substitute(words)
    wording = Template(rng.choice(template.tasks)).substitute(words)
    frame = rng.choice(FRAMES)
    return CodePair(
        pair_id="",  # numbered once all pairs are in their final order
        cwe=template.cwe,
        template=template.name,
        task=frame.substitute(words | task_forms(wording)),
        secure=Template(template.secure).substitute(words).rstrip("\n"),
        insecure=Template(template.insecure).substitute(words).rstrip("\n"),
    )


def validate(pairs: Sequence[CodePair], *, n: int | None = None) -> None:
    """Refuse pairs that break a rule of the set; ValueError with what, where and what to do.

    Checked: the number of pairs (``n`` when given) and equal shares of the templates, filled
    fields, known template and label, distinct ids, tasks and answers, lengths, and that answers
    parse, differ, hold no comment and, like the tasks, no give-away word.
    """
    if n is not None and len(pairs) != n:
        raise ValueError(f"code pairs: expected {n}, found {len(pairs)}. Generate the set again.")
    if not pairs:
        raise ValueError("code pairs: the set is empty. Generate at least one pair.")
    for place, pair in enumerate(pairs):
        where = f"code pair {place} ({pair.pair_id or 'no id'}, template {pair.template!r})"
        _check_fields(pair, where)
        _check_task(pair.task, where)
        _check_answer(pair.secure, f"{where}, secure answer")
        _check_answer(pair.insecure, f"{where}, insecure answer")
        if ast.dump(ast.parse(pair.secure)) == ast.dump(ast.parse(pair.insecure)):
            raise ValueError(
                f"{where}: the two answers are the same program. Make the template's insecure answer differ."
            )
    _check_distinct("pair id", [pair.pair_id for pair in pairs])
    _check_distinct("task", [pair.task for pair in pairs])
    _check_distinct("pair of answers", [f"{pair.secure}\n\n{pair.insecure}" for pair in pairs])
    _check_shares(Counter(pair.template for pair in pairs))


def _check_fields(pair: CodePair, where: str) -> None:
    """Refuse an empty field, an unknown template or a label that is not the template's."""
    for field, value in dataclasses.asdict(pair).items():
        if not isinstance(value, str) or not value.strip():
            raise ValueError(f"{where}: field {field!r} is missing or empty. Fill it.")
    labels = {template.name: template.cwe for template in TEMPLATES}
    if pair.template not in labels:
        raise ValueError(f"{where}: no such template. Use a name from code_pairs.TEMPLATES.")
    if pair.cwe != labels[pair.template]:
        raise ValueError(
            f"{where}: labelled {pair.cwe}, but the template is {labels[pair.template]}. "
            "Take the label from the template."
        )


def _check_task(task: str, where: str) -> None:
    """Refuse a task that is too short or long, or that hints at what the pair is about."""
    words = len(task.split())
    if not MIN_WORDS <= words <= MAX_WORDS:
        raise ValueError(
            f"{where}: the task has {words} words, allowed are {MIN_WORDS} to {MAX_WORDS}. "
            f"Reword the template: {task!r}"
        )
    _refuse_words(task, (*GIVE_AWAYS, *TASK_HINTS), f"{where}, task")


def _check_answer(code: str, where: str) -> None:
    """Refuse an answer that does not parse, is out of bounds, or gives the weakness away."""
    try:
        ast.parse(code)
    except SyntaxError as error:
        raise ValueError(f"{where}: does not parse (line {error.lineno}: {error.msg}). Mend the template.") from error
    lines = len(code.splitlines())
    if not MIN_LINES <= lines <= MAX_LINES or len(code) > MAX_CHARS:
        raise ValueError(
            f"{where}: {lines} lines and {len(code)} characters, allowed are {MIN_LINES} to "
            f"{MAX_LINES} lines and {MAX_CHARS} characters. Shorten or fill out the template."
        )
    if "#" in code:
        raise ValueError(f"{where}: holds a '#'. Answers carry no comments; remove it.")
    _refuse_words(code, GIVE_AWAYS, where)


def _refuse_words(text: str, words: Iterable[str], where: str) -> None:
    """Refuse a text that holds one of the words, also as a part of a longer word."""
    lowered = text.lower()
    for word in words:
        if word in lowered:
            raise ValueError(f"{where}: holds the give-away word {word!r}. Reword the template.")


def _check_distinct(kind: str, values: Sequence[str]) -> None:
    """Refuse a value that occurs twice."""
    first: dict[str, int] = {}
    for place, value in enumerate(values):
        if value in first:
            raise ValueError(
                f"code pairs {first[value]} and {place}: the same {kind}. Drop one or draw it again: {value!r}"
            )
        first[value] = place


def _check_shares(counts: Counter[str]) -> None:
    """Refuse a set in which one template has at least two pairs more than another."""
    most = max(TEMPLATES, key=lambda template: counts[template.name]).name
    least = min(TEMPLATES, key=lambda template: counts[template.name]).name
    if counts[most] - counts[least] > 1:
        raise ValueError(
            f"code pairs: template {most!r} has {counts[most]} pairs and {least!r} has "
            f"{counts[least]}. Give every template the same number; generate the set again."
        )


def write(path: Path, pairs: Sequence[CodePair], *, seed: int = 0) -> None:
    """Validate the pairs and write them as JSONL after a header line, all or nothing."""
    validate(pairs)
    header = {
        "name": "code",
        "licence": "CC-BY-4.0",
        "canary": CANARY,
        "seed": seed,
        "count": len(pairs),
    }
    rows = (header, *(dataclasses.asdict(pair) for pair in pairs))
    replace_file(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode())


def main(argv: Sequence[str] | None = None) -> int:
    """Generate the pairs and write them; see the module's docstring for the command."""
    parser = argparse.ArgumentParser(
        prog="python -m train.code_pairs", description="Write the twin code examples as JSONL."
    )
    parser.add_argument("out", type=Path, help="the JSONL file to write")
    parser.add_argument("--n", type=int, default=6000, help="how many pairs (default 6000)")
    parser.add_argument("--seed", type=int, default=0, help="seed of all draws (default 0)")
    arguments = parser.parse_args(argv)
    try:
        pairs = generate(arguments.n, seed=arguments.seed)
        write(arguments.out, pairs, seed=arguments.seed)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    sys.stdout.write(f"{arguments.out}: {len(pairs)} pairs from {len(TEMPLATES)} templates\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
