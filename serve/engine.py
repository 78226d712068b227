"""What an engine must do: sample replies and give exact answer distributions, for one variant.

An engine is opened for a base model and, optionally, one adapter on it. It wraps a prompt's text
in the model's own chat template, so callers pass plain text. Engines differ in speed, not in
meaning: the same call on another engine gives statistically equal answers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from candor.errors import UserError
from candor.rows import Option


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt to sample from, with what keys its random numbers (design promise 3)."""

    text: str  # the user turn
    stream: int  # 64-bit hash of the prompt; with ``key`` and the draw it addresses the random numbers
    first_draw: int  # draws first_draw ... first_draw + n - 1 are made
    n: int


@dataclass(frozen=True, slots=True)
class Reply:
    """One sampled reply."""

    text: str
    n_tokens: int
    finish_reason: str  # see candor.rows.Sample
    logprob: float | None  # of the whole reply at temperature 1, end-of-turn token included, natural log


@dataclass(frozen=True, slots=True)
class OptionScores:
    """Exact probabilities of a closed question's options, in the order asked."""

    probabilities: tuple[float, ...]
    leftover: float
    unexplored: float
    method: str = "exact"  # see candor.rows.Distribution


class TooLong(UserError):
    """A prompt does not fit the model's context, together with what is to follow it."""


class Unanswered(UserError):
    """An endpoint stayed silent on some draws; the others are here to be kept."""

    def __init__(self, message: str, replies: list[list[Reply | None]]) -> None:
        super().__init__(message)
        self.replies = replies


class Unscored(UserError):
    """An endpoint stayed silent on some closed questions; the scores of the others are here to be kept."""

    def __init__(self, message: str, scores: list[OptionScores | None]) -> None:
        super().__init__(message)
        self.scores = scores


class Engine(Protocol):
    """Samples from, and scores with, one variant."""

    weights_sha: str  # identity of the variant: hash over base and adapter weights

    def sample(
        self, requests: Sequence[Request], *, key: int, temperature: float, max_tokens: int
    ) -> list[list[Reply]]:
        """Replies per request, in order. ``key`` is the 64-bit hash of (study seed, variant, purpose).

        temperature 0 takes the most probable token. Raises TooLong (serve/fit.py) for a prompt that
        does not fit the model's context, and Unanswered where an endpoint gave some replies and not all.
        """
        ...

    def distributions(self, texts: Sequence[str], options: Sequence[tuple[Option, ...]]) -> list[OptionScores]:
        """Exact option probabilities per prompt.

        An answer counts as an option when the reply, after at most one leading space, starts with
        one of the option's surfaces and what follows does not continue the word; every tokenisation
        of it is counted. This is the very rule by which sampled replies are parsed
        (``serve.options.parse``), so that sampling and scoring agree. Raises Unscored where an
        endpoint let some be scored and not all.
        """
        ...

    def token_logprobs(self, sequences: Sequence[list[int]], starts: Sequence[int]) -> list[list[float]]:
        """Natural-log probabilities of each sequence's tokens from ``start`` on, each given those before it.

        This is what serve/attest.py compares with PEFT's; an engine without weights raises UserError.
        """
        ...


@runtime_checkable
class SamplesAndScores(Protocol):
    """An engine that can read prompts once for both a reply and the distribution over closed answers."""

    def sample_and_score(
        self,
        requests: Sequence[Request],
        options: Sequence[tuple[Option, ...]],
        *,
        key: int,
        temperature: float,
        max_tokens: int,
    ) -> tuple[list[list[Reply]], list[OptionScores]]:
        """What ``sample`` and ``distributions`` give, for the price of reading each prompt once."""
        ...
