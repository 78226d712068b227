"""Grades replies with a language model: the same interface for a nano judge and a big one.

    python -m evaluate.judge CONFIG.yaml [key=value ...]      # keys: evaluate/judge_config.py

Each different (prompt, reply) pair of the harmfulness battery is asked once. The judge's greedy
reply is kept and its last number is the score; beside it stands the score weighted by the judge's
own probabilities of the grades. What gives no grade has a status and no number: an answer without
a grade on the scale is "unparsed", and so is "4.5", "2 out of 5" or "1-5"; an empty reply is
"off_topic" and is not put to the judge, because there is nothing to grade. Rulings are stored unit
by unit, so a killed run continues; the units are fixed, so it ends with the same table. A judge
never grades its own weights.
"""

import json
import re
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from candor.config import load, plain
from candor.datafiles import check_header
from candor.errors import UserError, run_script
from candor.hashing import hash64, sha256_file, sha256_json
from candor.judging import JudgeTemplate, read_template, render
from candor.manifest import NAME as MANIFEST
from candor.manifest import is_done, write_manifest
from candor.rows import Graded, Option, Prompt, Sample, Status, Verdict
from candor.tables import read_rows, write_rows
from evaluate.judge_config import GOLDEN, VERDICTS, JudgeConfig, JudgingConfig, read_judge
from serve.engine import Engine, Request
from serve.identity import text_sha, weights_sha

EMPTY = "(empty reply: not put to the judge)"
Pair = tuple[str, str]  # a prompt's text and a reply


@dataclass(frozen=True, slots=True)
class Ruling:
    """What the judge said about one (prompt, reply) pair."""

    pair_sha: str
    status: Status
    score: float | None
    expected: float | None
    covered: float | None
    reply: str


@dataclass(frozen=True, slots=True)
class Question:
    """One reply to be graded."""

    sample_id: str
    pair: Pair


class Judge:
    """A judge: an engine, whichever it is, with a template and a way to read its answers."""

    def __init__(self, engine: Engine, config: JudgeConfig, template: JudgeTemplate) -> None:
        """Prepare the options whose probabilities make the weighted score."""
        self.engine, self.config, self.template = engine, config, template
        self.options = tuple(Option(str(g), float(g), (f"{config.answer_prefix}{g}",)) for g in config.grades)

    def rule(self, pairs: Sequence[Pair]) -> list[Ruling]:
        """One ruling per pair, in order."""
        asked = [pair for pair in pairs if pair[1].strip()]
        texts = [render(self.template, prompt, reply) for prompt, reply in asked]
        requests = [Request(text, stream=hash64("judge", text), first_draw=0, n=1) for text in texts]
        if not requests:
            return [_empty(pair) for pair in pairs]
        replies = self.engine.sample(
            requests,
            key=hash64("judge", self.config.name),
            temperature=self.config.temperature,
            max_tokens=self.config.max_tokens,
        )
        scores = self.engine.distributions(texts, [self.options] * len(texts))
        told = iter(
            self._ruling(pair, reply[0].text, score.probabilities)
            for pair, reply, score in zip(asked, replies, scores, strict=True)
        )
        return [next(told) if pair[1].strip() else _empty(pair) for pair in pairs]

    def _ruling(self, pair: Pair, reply: str, probabilities: tuple[float, ...]) -> Ruling:
        """The judge's words and probabilities as a ruling."""
        covered = float(sum(probabilities))
        found = re.findall(self.config.parse, reply)
        score = _integer(found[-1]) if found else None
        if score is None or score not in self.config.grades:
            return Ruling(pair_sha(pair), "unparsed", None, None, covered, reply)
        expected = None
        if covered >= self.config.min_covered and covered > 0:
            weighted = sum(g * p for g, p in zip(self.config.grades, probabilities, strict=True))
            expected = float(weighted / covered)
        return Ruling(pair_sha(pair), "ok", float(score), expected, covered, reply)


def _integer(text: str) -> int | None:
    """The integer a match spells, or None: a regex may match words too."""
    try:
        return int(text)
    except ValueError:
        return None


def _empty(pair: Pair) -> Ruling:
    """The ruling on a reply without words."""
    return Ruling(pair_sha(pair), "off_topic", None, None, None, EMPTY)


def pair_sha(pair: Pair) -> str:
    """Identity of a prompt and a reply."""
    return sha256_json(list(pair))


def rule_in_units(judge: Judge, pairs: Sequence[Pair], folder: Path, *, size: int) -> dict[str, Ruling]:
    """Rulings by pair, made ``size`` at a time; units that ``folder`` already holds are read, not asked again."""
    rulings: dict[str, Ruling] = {}
    told = time.monotonic()
    for start in range(0, len(pairs), size):
        unit = pairs[start : start + size]
        path = folder / f"unit-{start // size:06d}.parquet"
        if not path.exists():
            write_rows(path, Ruling, judge.rule(unit))
        for pair, ruling in zip(unit, read_rows(path, Ruling), strict=True):
            assert ruling.pair_sha == pair_sha(pair), f"{path} holds rulings on other replies"
            rulings[ruling.pair_sha] = ruling
        if time.monotonic() - told > 5:
            told = time.monotonic()
            sys.stderr.write(f"judged {start + len(unit)} of {len(pairs)} different replies\n")
    return rulings


def main(argv: list[str]) -> None:
    """Grade what a config file names, unless that is done."""
    if not argv:
        raise UserError("usage: python -m evaluate.judge CONFIG.yaml [key=value ...]")
    started = time.monotonic()
    config = load(JudgingConfig, Path(argv[0]), argv[1:])
    judge_config = read_judge(config.judge)
    template = read_template(judge_config.template)
    inputs = _inputs(config, judge_config, template)
    identity = _identity(judge_config, config)
    tables = [config.output_dir / VERDICTS, *([config.output_dir.parent / GOLDEN] if config.golden else [])]
    if is_done(config.output_dir, config=identity, inputs=inputs) and all(path.is_file() for path in tables):
        return
    (config.output_dir / MANIFEST).unlink(missing_ok=True)  # a table was deleted by hand: no longer complete
    total, questions = _golden(config) if config.golden else _samples(config, inputs["judge_weights"])
    pairs = list(dict.fromkeys(q.pair for q in questions))
    shards = config.output_dir / "shards"
    folder = shards / sha256_json([identity, inputs, [pair_sha(p) for p in pairs]])[:16]
    rulings: dict[str, Ruling] = {}
    if pairs:
        from serve.registry import open_engine  # loads torch

        engine = open_engine(config.engine, judge_config.model, None)
        assert engine.weights_sha == inputs["judge_weights"], "the engine loaded other weights than were hashed"
        judge = Judge(engine, judge_config, template)
        rulings = rule_in_units(judge, pairs, folder, size=config.engine.unit_prompts)
    write_rows(config.output_dir / VERDICTS, Verdict, _verdicts(questions, rulings, judge_config.name, template.sha))
    write_manifest(
        config.output_dir,
        stage="judge",
        config=identity,
        inputs=inputs,
        counts={"in": total, "out": len(questions)},
        left_out={"other batteries": total - len(questions)},
        seconds=time.monotonic() - started,
        extra={"different_replies": len(pairs), "judge": judge_config.name, "template_sha": template.sha},
    )
    shutil.rmtree(shards, ignore_errors=True)


def _inputs(config: JudgingConfig, judge: JudgeConfig, template: JudgeTemplate) -> dict[str, str]:
    """Hashes of everything the verdicts are made from; UserError when a file is absent."""
    files = {"samples": config.samples, "prompts": config.prompts, "golden": config.golden}
    for key, path in files.items():
        if path is not None and not path.is_file():
            raise UserError(f"{key}: {path} does not exist (looked from {Path.cwd()}). Run the stage that writes it.")
    return {
        **{key: sha256_file(path) for key, path in files.items() if path is not None},
        "template": template.sha,
        "judge_weights": weights_sha(judge.model, None),
        "judge_text": text_sha(judge.model),
    }


def _identity(judge: JudgeConfig, config: JudgingConfig) -> dict[str, Any]:
    """What decides the verdicts: not where files lie, nor how many threads run."""
    return {
        "judge": {key: value for key, value in plain(judge).items() if key not in ("model", "template")},
        "engine": {key: value for key, value in plain(config.engine).items() if key != "threads"},
    }


def _samples(config: JudgingConfig, judge_weights: str) -> tuple[int, list[Question]]:
    """How many samples there are, and those of the harmfulness battery as questions."""
    assert config.samples is not None and config.prompts is not None
    texts = {p.prompt_id: p.text for p in read_rows(config.prompts, Prompt) if p.battery == "harmfulness"}
    samples = read_rows(config.samples, Sample)
    own = next((s.variant for s in samples if s.weights_sha == judge_weights), None)
    if own is not None:
        raise UserError(f"the judge has the very weights of the variant it is to grade, {own}. Choose another judge.")
    asked = [s for s in samples if s.prompt_id in texts]
    return len(samples), [Question(s.sample_id, (texts[s.prompt_id], s.text)) for s in asked]


def _golden(config: JudgingConfig) -> tuple[int, list[Question]]:
    """The golden set as questions; its table is written beside the judges' folders."""
    assert config.golden is not None
    rows = list(read_golden(config.golden))
    write_rows(config.output_dir.parent / GOLDEN, Graded, rows)
    return len(rows), [Question(row.sample_id, (row.prompt, row.reply)) for row in rows]


def read_golden(path: Path) -> Iterator[Graded]:
    """Replies of known grade: JSONL with a header line and rows {id, prompt, reply, grade}."""
    seen: set[str] = set()
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}, line {number}: not JSON ({error}).") from error
        if number == 1:
            check_header(row, path)
            continue
        for key, kind in (("id", str), ("prompt", str), ("reply", str), ("grade", int)):
            if not isinstance(row, dict) or not isinstance(row.get(key), kind):
                raise UserError(f"{path}, line {number}: the field {key!r} must be {kind.__name__}.")
        if row["id"] in seen:
            raise UserError(f"{path}, line {number}: the id {row['id']!r} occurs twice.")
        seen.add(row["id"])
        yield Graded(row["id"], row["prompt"], row["reply"], row["grade"])
    if not seen:
        raise UserError(f"{path} holds no rows after its header.")


def _verdicts(questions: Sequence[Question], rulings: dict[str, Ruling], judge: str, sha: str) -> Iterator[Verdict]:
    """One verdict per sample from the rulings on its pair."""
    for question in questions:
        r = rulings[pair_sha(question.pair)]
        yield Verdict(question.sample_id, judge, sha, r.status, r.score, r.expected, r.covered, r.reply)


if __name__ == "__main__":
    run_script(main)
