"""A judge that runs in this process, on one of our own engines; it needs no network.

Its probabilities are exact: the engine sums over every way to write every possible answer.
"""

import sys
import time
from collections.abc import Sequence
from typing import Any

from candor.errors import UserError
from candor.hashing import hash64, sha256_json
from candor.judging import JudgeTemplate
from evaluate.judge_ask import Ask
from evaluate.judge_config import JudgeConfig
from evaluate.verdict_store import Answer, AnswerStore
from serve.engine import Engine, OptionScores, Reply, Request, SamplesAndScores
from serve.plan import judge_key


class LocalJudge:
    """An engine with a template."""

    def __init__(self, engine: Engine, config: JudgeConfig, template: JudgeTemplate, *, repeat: int = 1) -> None:
        self.engine, self.config, self.template = engine, config, template
        self._key = judge_key(config.name, repeat)

    def answer(self, asks: Sequence[Ask]) -> list[Answer]:
        """One answer per question, in order."""
        try:
            return self._answer(asks)
        except UserError:
            if len(asks) == 1:
                raise
        # one of them is too long for the judge: each on its own, so that it takes no other with it
        answers: list[Answer] = []
        errors: list[UserError] = []
        for ask in asks:
            try:
                answers += self._answer([ask])
            except UserError as error:
                errors.append(error)
                answers.append(Answer(ask.sha, "", "too_long", (), "", self.config.model, 0, 0))
        if len(errors) == len(asks):
            raise errors[0]
        return answers

    def _answer(self, asks: Sequence[Ask]) -> list[Answer]:
        texts = [ask.text(self.template) for ask in asks]
        requests = [Request(text, stream=hash64("judge", text), first_draw=0, n=1) for text in texts]
        options = [self.config.answers(ask.options) for ask in asks]
        how: dict[str, Any] = {
            "key": self._key,
            "temperature": self.config.temperature,
            "max_tokens": self.config.max_tokens,
        }
        if isinstance(self.engine, SamplesAndScores):
            replies, scores = self.engine.sample_and_score(requests, options, **how)
        else:
            replies, scores = self.engine.sample(requests, **how), self.engine.distributions(texts, options)
        return [_as_answer(a, r[0], s) for a, r, s in zip(asks, replies, scores, strict=True)]


def _as_answer(ask: Ask, reply: Reply, scores: OptionScores) -> Answer:
    return Answer(ask.sha, reply.text, reply.finish_reason, scores.probabilities, "", "", 0, reply.n_tokens)


def ask_engine(judge: LocalJudge, asks: Sequence[Ask], store: AnswerStore, known: set[str], *, size: int) -> None:
    """Put to the judge what the store lacks, ``size`` at a time.

    The units are cut from all questions, not from the open ones: what a batch is composed of can
    move a probability by rounding, and a rerun must end with the same table.
    """
    told = time.monotonic()
    for start in range(0, len(asks), size):
        unit = asks[start : start + size]
        if all(ask.sha in known for ask in unit):
            continue
        store.add(judge.answer(unit), name=f"unit-{sha256_json([ask.sha for ask in unit])[:24]}")
        if time.monotonic() - told > 5:
            told = time.monotonic()
            sys.stderr.write(f"judged {start + len(unit)} of {len(asks)} different replies\n")
