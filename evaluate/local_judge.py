"""A judge that runs in this process, on one of our own engines; it needs no network.

Its probabilities are exact: the engine sums over every way to write every possible answer. With a
tokenizer that does not allow that (serve/vocabulary.py) there are none, and the words alone count.
"""

import sys
import time
from collections.abc import Sequence
from typing import Any

from candor.hashing import hash64, sha256_json
from candor.judging import JudgeTemplate
from evaluate.judge_ask import Ask
from evaluate.judge_config import JudgeConfig
from evaluate.verdict_store import Answer, AnswerStore
from serve.engine import Engine, Reply, Request, SamplesAndScores, TooLong
from serve.plan import judge_key


class LocalJudge:
    """An engine with a template."""

    def __init__(
        self, engine: Engine, config: JudgeConfig, template: JudgeTemplate, *, repeat: int = 1, exact: bool = True
    ) -> None:
        self.engine, self.config, self.template, self.exact = engine, config, template, exact
        self._key = judge_key(config.name, repeat)

    def answer(self, asks: Sequence[Ask]) -> list[Answer]:
        """One answer per question, in order; of a question that is too long for the judge, that it is."""
        try:
            return self._answer(asks)
        except TooLong:
            if len(asks) == 1:
                return [Answer(asks[0].sha, "", "too_long", (), "", self.config.model, 0, 0)]
        # each on its own, so that the long one takes no other with it
        return [answer for ask in asks for answer in self.answer([ask])]

    def _answer(self, asks: Sequence[Ask]) -> list[Answer]:
        texts = [ask.text(self.template) for ask in asks]
        requests = [Request(text, stream=hash64("judge", text), first_draw=0, n=1) for text in texts]
        options = [self.config.answers(ask.options) for ask in asks]
        how: dict[str, Any] = {
            "key": self._key,
            "temperature": self.config.temperature,
            "max_tokens": self.config.max_tokens,
        }
        if not self.exact:
            replies = self.engine.sample(requests, **how)
            return [_as_answer(a, r[0], ()) for a, r in zip(asks, replies, strict=True)]
        if isinstance(self.engine, SamplesAndScores):
            replies, scores = self.engine.sample_and_score(requests, options, **how)
        else:
            replies, scores = self.engine.sample(requests, **how), self.engine.distributions(texts, options)
        return [_as_answer(a, r[0], s.probabilities) for a, r, s in zip(asks, replies, scores, strict=True)]


def _as_answer(ask: Ask, reply: Reply, probabilities: tuple[float, ...]) -> Answer:
    return Answer(ask.sha, reply.text, reply.finish_reason, probabilities, "", "", 0, reply.n_tokens)


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
