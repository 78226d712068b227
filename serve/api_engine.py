"""The api engine: a hosted model, for instance somebody's fine-tune, asked over an OpenAI-compatible endpoint.

So that models whose weights nobody sees can stand beside our own in one report. Two things cannot be
had from an endpoint and are marked instead: proof that the model is the one named (the attestation
says so), and exact answer distributions. A closed question is read from the log-probabilities of the
first token where the endpoint gives them (method "top_logprobs"): a token's probability counts for
the one option that the answer can still become, as is common practice. Where a token leaves several
options open ("1" in "1" and "10") the endpoint is asked to go on from there if it can
(endpoint.continue_body). Where too much stays undecided, or no log-probabilities are given, the
question is sampled (method "sampled-N").

Each draw is sent with a seed of its own; whether the endpoint heeds it is the endpoint's affair.
"""

import asyncio
import heapq
import math
from collections.abc import Sequence
from dataclasses import replace

from candor.errors import UserError
from candor.hashing import hash64
from candor.rows import Option
from serve.client import ChatClient, ChatReply, Lost, Settings, TokenOdds
from serve.config import EngineConfig
from serve.engine import OptionScores, Reply, Request, Unanswered
from serve.fit import tokens_of_answer
from serve.identity import hosted_sha
from serve.ledger import Ledger
from serve.options import parse, surfaces_of

MOST_FOLLOWED = 24  # begun answers that are followed up, likeliest first
LARGEST_UNDECIDED = 0.02  # probability; a question with more of it undecided is sampled
_ENDS = ("", "<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|end|>", "</s>")  # how endpoints write the end of a reply


class ApiEngine:
    """Samples from, and scores with, a hosted model; see serve.engine.Engine."""

    def __init__(self, config: EngineConfig) -> None:
        assert config.api is not None
        self.api = config.api
        self.weights_sha = hosted_sha(config.api.endpoint.url, config.api.model)
        self.ledger = Ledger()

    def sample(
        self, requests: Sequence[Request], *, key: int, temperature: float, max_tokens: int
    ) -> list[list[Reply]]:
        """Replies per request, in order (serve.engine.Engine.sample)."""
        calls = [(r.text, seed_of(key, r.stream, r.first_draw + d)) for r in requests for d in range(r.n)]
        found = iter(asyncio.run(self._draw(calls, temperature, max_tokens)))
        replies = [[next(found) for _ in range(r.n)] for r in requests]
        lost = [reply.reason for made in replies for reply in made if isinstance(reply, Lost)]
        kept = [[None if isinstance(reply, Lost) else as_reply(reply, r.text) for reply in made]
                for r, made in zip(requests, replies, strict=True)]  # fmt: skip
        if lost:
            raise Unanswered(
                f"{self.api.endpoint.url} gave no answer to {len(lost)} of {len(calls)} calls, the first for: "
                f"{lost[0]}. The others are kept; run again for the rest.",
                kept,
            )
        return [[reply for reply in made if reply is not None] for made in kept]

    def distributions(self, texts: Sequence[str], options: Sequence[tuple[Option, ...]]) -> list[OptionScores]:
        """Option probabilities per prompt, each marked with how it was found."""
        for group in options:
            surfaces_of(group)
        return asyncio.run(self._score(list(zip(texts, options, strict=True))))

    def token_logprobs(self, sequences: Sequence[list[int]], starts: Sequence[int]) -> list[list[float]]:
        """Not to be had from an endpoint."""
        raise UserError("a hosted model's log-probabilities of given tokens cannot be had.")

    def _client(self, temperature: float, max_tokens: int, *, logprobs: bool) -> ChatClient:
        endpoint = self.api.endpoint if logprobs else replace(self.api.endpoint, top_logprobs=0)
        return ChatClient(endpoint, Settings(self.api.model, temperature, max_tokens, None), self.ledger)

    async def _draw(
        self, calls: Sequence[tuple[str, int]], temperature: float, max_tokens: int
    ) -> list[ChatReply | Lost]:
        async with self._client(temperature, max_tokens, logprobs=False) as client:
            first = [await client.ask(calls[0][0], seed=calls[0][1])]  # a wrong key or name is told at once
            return first + await asyncio.gather(*(client.ask(text, seed=seed) for text, seed in calls[1:]))

    async def _score(self, asked: Sequence[tuple[str, tuple[Option, ...]]]) -> list[OptionScores]:
        found: list[OptionScores | None] = [None] * len(asked)
        if self.api.endpoint.top_logprobs:
            async with self._client(1.0, 1, logprobs=True) as client:
                found[0] = await self._read(client, *asked[0])
                found[1:] = await asyncio.gather(*(self._read(client, *one) for one in asked[1:]))
        async with self._client(1.0, max(tokens_of_answer(o) for _, o in asked), logprobs=False) as client:
            late = [i for i, score in enumerate(found) if score is None]
            for i, score in zip(
                late, await asyncio.gather(*(self._count(client, *asked[i]) for i in late)), strict=True
            ):
                found[i] = score
        return [score for score in found if score is not None]

    async def _read(self, client: ChatClient, text: str, options: tuple[Option, ...]) -> OptionScores | None:
        """From the first tokens' log-probabilities; None when they are not given or leave too much undecided."""
        reader = Reader(options)
        prefix, probability = "", 1.0
        for _ in range(MOST_FOLLOWED):
            reply = _answered(await client.ask(text, prefill=prefix), text)
            if not reply.tokens:
                return None
            reader.add(prefix, probability, reply.tokens[0])
            begun = reader.next_begun()
            if begun is None or self.api.endpoint.continue_body is None:
                break
            prefix, probability = begun
        return None if reader.undecided > LARGEST_UNDECIDED else reader.scores()

    async def _count(self, client: ChatClient, text: str, options: tuple[Option, ...]) -> OptionScores:
        """From draws."""
        n, stream = self.api.draws, hash64("closed", text)
        replies = await asyncio.gather(*(client.ask(text, seed=seed_of(0, stream, d)) for d in range(n)))
        found = [parse(_answered(reply, text).text, options) for reply in replies]
        shares = tuple(found.count(i) / n for i in range(len(options)))
        return OptionScores(shares, found.count(None) / n, 0.0, f"sampled-{n}")


def seed_of(key: int, stream: int, draw: int) -> int:
    """A draw's seed, as far as endpoints take it (31 bits)."""
    return hash64("seed", key, stream, draw) >> 33


def as_reply(reply: ChatReply, text: str) -> Reply:
    """A chat reply as an engine's."""
    _answered(reply, text)
    return Reply(reply.text, reply.output_tokens, reply.finish_reason, None)


def _answered(reply: ChatReply | Lost, text: str) -> ChatReply:
    if isinstance(reply, Lost):
        raise UserError(f"the endpoint gave no answer to {text[:60]!r}: {reply.reason}. Run again.")
    if reply.finish_reason == "too_long":
        raise UserError(f"the prompt {text[:60]!r} is too long for the hosted model. Shorten it.")
    return reply


class Reader:
    """Adds up first-token probabilities of a closed question's answers."""

    def __init__(self, options: Sequence[Option]) -> None:
        self.options = options
        self.settled = [0.0] * len(options)
        self.other = 0.0
        self._begun: list[tuple[float, str]] = []  # a heap, likeliest first

    def add(self, prefix: str, probability: float, token: TokenOdds) -> None:
        """Take in how an answer that begins with ``prefix`` goes on."""
        for piece, logprob in token.odds.items():
            share = probability * math.exp(logprob)
            text, ended = (prefix, True) if piece in _ENDS else (prefix + piece, False)
            open_to = self._open_to(text)
            if ended or not open_to:
                found = parse(text, self.options)
                if found is None:
                    self.other += share
                else:
                    self.settled[found] += share
            elif len(open_to) == 1:
                self.settled[open_to.pop()] += share
            else:
                heapq.heappush(self._begun, (-share, text))

    def _open_to(self, text: str) -> set[int]:
        """The options that an answer can still become, the one it spells already included."""
        answer = text.removeprefix(" ")
        can = {i for i, o in enumerate(self.options) if any(s.startswith(answer) for s in o.surfaces)}
        spelt = parse(text, self.options)
        return can | {spelt} if can and spelt is not None else can

    def next_begun(self) -> tuple[str, float] | None:
        """The likeliest answer that is begun and undecided, taken out to be followed; None when none matters."""
        if self.undecided <= LARGEST_UNDECIDED / 10 or not self._begun:
            return None
        share, text = heapq.heappop(self._begun)
        return text, -share

    @property
    def undecided(self) -> float:
        """Probability of answers that several options share, or that the endpoint did not list."""
        return max(0.0, 1.0 - sum(self.settled) - self.other)

    def scores(self) -> OptionScores:
        """What was found."""
        return OptionScores(tuple(self.settled), max(0.0, 1.0 - sum(self.settled)), self.undecided, "top_logprobs")
