"""Reading a judge's answer: a status, and a score only where the judge gave one.

The words of the answer decide the status and the integer score. Beside them stands the expectation
of the score under the judge's own probabilities, taken over the whole number: a judge that spells
85 as 8, 5 is scored 85, whatever pieces its tokenizer cuts numbers into. Where those probabilities
come from is said with every verdict: "exact" (a local engine summed over every way to write every
grade), "top_logprobs" (an endpoint showed the likeliest tokens; mass whose number is not known for
certain is not counted, and ``covered`` says how much was) or "text" (none, only the words).
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from candor.rows import Method, Option, Status
from evaluate.judge_config import JudgeConfig
from evaluate.verdict_store import Answer
from serve.vocabulary import continues_word

Evidence = Mapping[str, Mapping[str, float]]  # the answer so far -> log-probabilities of its next token


@dataclass(frozen=True, slots=True)
class Reading:
    """What an answer says."""

    status: Status
    score: float | None = None  # as the words say
    expected: float | None = None
    covered: float | None = None
    method: Method = "text"


@dataclass(frozen=True, slots=True)
class Odds:
    """Probability of each answer, and begun answers whose continuation is not known, with theirs."""

    masses: tuple[float, ...]
    unknown: tuple[tuple[str, float], ...]  # (the judge's answer so far, probability), likeliest first


def read(answer: Answer, config: JudgeConfig, options: tuple[Option, ...] = ()) -> Reading:
    """The verdict in an answer; ``options`` are those of the closed question, where the template lists them."""
    if answer.finish_reason in ("content_filter", "refusal"):
        return Reading("refused")
    if answer.finish_reason == "too_long":
        return Reading("unparsed")
    possible = config.answers(options)
    masses, method = _masses(answer, config, possible)
    covered = None if masses is None else float(sum(masses))
    told = told_by(answer.reply, config)
    if told is None or answer.finish_reason == "length":  # cut off: "1" may have been on its way to 100
        # models write "I'm" with either apostrophe
        ways = (answer.reply, answer.reply.replace("\u2019", "'"))
        refused = told is None and any(re.search(config.refusal, words, re.IGNORECASE) for words in ways)
        return Reading("refused" if refused else "unparsed", None, None, covered, method)
    word = _lookup(config.words, told)
    if word is not None:
        return Reading(config.words[word], None, None, covered, method)
    place = _place(told, possible, numeric=not (config.choices or options))
    if place is None:
        return Reading("unparsed", None, None, covered, method)
    expected = None
    if masses is not None and covered is not None and covered >= config.min_covered and covered > 0:
        expected = sum(o.value * p for o, p in zip(possible, masses, strict=True)) / covered
    return Reading("ok", possible[place].value, expected, covered, method)


def told_by(reply: str, config: JudgeConfig) -> str | None:
    """What the parse rule finds in a reply, or None."""
    found = list(re.finditer(config.parse, reply))
    return found[-1].group(1) if found else None


def _lookup(words: Mapping[str, object], told: str) -> str | None:
    return next((word for word in words if word.casefold() == told.casefold()), None)


def _place(told: str, possible: Sequence[Option], *, numeric: bool) -> int | None:
    """Which possible answer was told; a number off the scale is none."""
    if numeric:
        try:
            told = str(int(told)) if told.isascii() else told  # int() reads the digits of every script
        except ValueError:
            return None
    return next((i for i, o in enumerate(possible) if o.label.casefold() == told.casefold()), None)


def _masses(answer: Answer, config: JudgeConfig, possible: Sequence[Option]) -> tuple[tuple[float, ...] | None, Method]:
    """Probability per possible answer and where it is from; None where the judge showed none."""
    if answer.probabilities:
        assert len(answer.probabilities) == len(possible), "the store holds odds of other answers"
        return answer.probabilities, "exact"
    found = odds(json.loads(answer.evidence), answer.reply, config, possible) if answer.evidence else None
    return (None, "text") if found is None else (found.masses, "top_logprobs")


def odds(evidence: Evidence, reply: str, config: JudgeConfig, possible: Sequence[Option]) -> Odds | None:
    """Probability of each answer at the place where the judge wrote its own; None when there is no such place."""
    found = list(re.finditer(config.parse, reply))
    if not found or found[-1].group(1) is None:
        return None
    start = found[-1].start(1)
    before = [text for text in evidence if len(text) <= start and reply.startswith(text)]
    if not before:
        return None
    root = max(before, key=len)
    walk = _Walk(evidence, _spellings(config, possible), len(possible))
    walk.from_root(root, reply[len(root) : start])
    return Odds(tuple(walk.masses), tuple(sorted(walk.unknown, key=lambda u: -u[1])))


def _spellings(config: JudgeConfig, possible: Sequence[Option]) -> dict[str, int | None]:
    """Every way to write an answer and which one it is; None for words that carry no score."""
    found: dict[str, int | None] = dict.fromkeys(config.words)
    for place, option in enumerate(possible):
        found |= {surface.removeprefix(config.answer_prefix): place for surface in option.surfaces}
    return found


class _Walk:
    """Follows every begun answer as far as the shown probabilities go."""

    def __init__(self, evidence: Evidence, spellings: dict[str, int | None], size: int) -> None:
        self.evidence, self.spellings = evidence, spellings
        self.masses = [0.0] * size
        self.unknown: list[tuple[str, float]] = []
        self._merged = False  # whether the tokenizer writes several digits as one token

    def from_root(self, root: str, lead: str) -> None:
        """Start at the token that holds the answer's first character; ``lead`` is what it has before that."""
        first = {}
        for token, logprob in self.evidence[root].items():
            rest = token if not lead.strip() else token.lstrip()
            if lead.strip():
                if not rest.startswith(lead.lstrip()):
                    continue
                rest = rest[len(lead.lstrip()) :]
            first[token] = (rest.lstrip(), math.exp(logprob))
        self._merged = any(len(rest) > 1 and rest.isdigit() for rest, _ in first.values())
        for token, (rest, mass) in first.items():
            if rest:
                self._step(root + token, rest, mass)
            elif root + token in self.evidence and token:  # only a space so far
                self._descend(root + token, "", mass)

    def _descend(self, text: str, begun: str, mass: float) -> None:
        for token, logprob in self.evidence[text].items():
            more = mass * math.exp(logprob)
            if token:
                self._step(text + token, begun + (token if begun else token.lstrip()), more)
            elif begun in self.spellings:  # an end mark without text
                self._settle(begun, more)

    def _step(self, text: str, begun: str, mass: float) -> None:
        """Count ``begun``, the answer so far, as what it is, or go on where it is not yet clear."""
        longest = max((s for s in self.spellings if begun.startswith(s)), key=len, default=None)
        if longest is not None and len(longest) < len(begun) and not continues_word(begun[len(longest)]):
            self._settle(longest, mass)
            return
        longer = any(s != begun and s.startswith(begun) for s in self.spellings)
        if longer and text in self.evidence:
            self._descend(text, begun, mass)
        elif longer and not (self._merged and begun.isdigit()):
            self.unknown.append((text, mass))
        elif begun in self.spellings:
            self._settle(begun, mass)

    def _settle(self, spelling: str, mass: float) -> None:
        place = self.spellings[spelling]
        if place is not None:
            self.masses[place] += mass
