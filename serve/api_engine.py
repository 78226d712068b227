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
from serve.client import TOO_LONG, ChatClient, ChatReply, Lost, Settings, TokenOdds
from serve.config import EngineConfig
from serve.engine import OptionScores, Reply, Request, Unanswered, Unscored
from serve.fit import tokens_of_answer
from serve.identity import hosted_sha
from serve.ledger import Ledger
from serve.options import parse, surfaces_of

MOST_FOLLOWED = 24  # begun answers that are followed up, likeliest first
LARGEST_UNDECIDED = 0.02  # probability; a question with more of it undecided is sampled
Silence = Lost | UserError  # instead of an answer; the latter stops what is not under way
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
        found = asyncio.run(self._draw(calls, temperature, max_tokens))
        replies = iter(as_reply(reply) if isinstance(reply, ChatReply) else None for reply in found)
        kept = [[next(replies) for _ in range(r.n)] for r in requests]
        told = self._silence("calls", [text for text, _ in calls], found)
        if told:
            raise Unanswered(told, kept)
        return [[reply for reply in made if reply is not None] for made in kept]

    def distributions(self, texts: Sequence[str], options: Sequence[tuple[Option, ...]]) -> list[OptionScores]:
        """Option probabilities per prompt, each marked with how it was found."""
        for group in options:
            surfaces_of(group)
        found = asyncio.run(self._score(list(zip(texts, options, strict=True))))
        kept = [score if isinstance(score, OptionScores) else None for score in found]
        told = self._silence("questions", texts, found)
        if told:
            raise Unscored(told, kept)
        return [score for score in kept if score is not None]

    def token_logprobs(self, sequences: Sequence[list[int]], starts: Sequence[int]) -> list[list[float]]:
        """Not to be had from an endpoint."""
        raise UserError("a hosted model's log-probabilities of given tokens cannot be had.")

    def _client(self, temperature: float, max_tokens: int, *, logprobs: bool) -> ChatClient:
        endpoint = self.api.endpoint if logprobs else replace(self.api.endpoint, top_logprobs=0)
        return ChatClient(endpoint, Settings(self.api.model, temperature, max_tokens, None), self.ledger)

    def _silence(self, what: str, texts: Sequence[str], found: Sequence[object]) -> str:
        """What to tell of the calls or questions that found silence; empty where none did."""
        silent = [(text, why) for text, why in zip(texts, found, strict=True) if isinstance(why, (Lost, UserError))]
        stop = next((why for _, why in silent if isinstance(why, UserError)), None)
        if stop is not None:
            return str(stop)
        lost = [(text, why.reason) for text, why in silent if isinstance(why, Lost)]
        lost.sort(key=lambda one: one[1] != TOO_LONG)  # asking again helps the others
        if not lost:
            return ""
        (text, reason), url = lost[0], self.api.endpoint.url
        do = "shorten it or serve a longer one" if reason == TOO_LONG else "run again for the rest"
        return (
            f"{url} gave no answer to {len(lost)} of {len(texts)} {what}, the first to {text[:60]!r}: {reason}. "
            f"The others are kept; {do}."
        )

    async def _draw(
        self, calls: Sequence[tuple[str, int]], temperature: float, max_tokens: int
    ) -> list[ChatReply | Silence]:
        async with self._client(temperature, max_tokens, logprobs=False) as client:
            first = [await _ask(client, calls[0][0], seed=calls[0][1])]  # a wrong key or name is told at once
            return first + await asyncio.gather(*(_ask(client, text, seed=seed) for text, seed in calls[1:]))

    async def _score(self, asked: Sequence[tuple[str, tuple[Option, ...]]]) -> list[OptionScores | Silence]:
        found: list[OptionScores | Silence | None] = [None] * len(asked)
        if self.api.endpoint.top_logprobs:
            async with self._client(1.0, 1, logprobs=True) as client:
                found[0] = await self._read(client, *asked[0])
                found[1:] = await asyncio.gather(*(self._read(client, *one) for one in asked[1:]))
        async with self._client(1.0, max(tokens_of_answer(o) for _, o in asked), logprobs=False) as client:
            if any(isinstance(score, UserError) for score in found):
                client.close_soon()
            late = [i for i, score in enumerate(found) if score is None]
            for i, score in zip(
                late, await asyncio.gather(*(self._count(client, *asked[i]) for i in late)), strict=True
            ):
                found[i] = score
        return [score for score in found if score is not None]

    async def _read(self, client: ChatClient, text: str, options: tuple[Option, ...]) -> OptionScores | Silence | None:
        """From the first tokens' log-probabilities; None when they are not given or leave too much undecided."""
        reader = Reader(options)
        prefix, probability = "", 1.0
        for _ in range(MOST_FOLLOWED):
            reply = await _ask(client, text, prefill=prefix)
            if not isinstance(reply, ChatReply):
                return reply
            if not reply.tokens:
                return None
            reader.add(prefix, probability, reply.tokens[0])
            begun = reader.next_begun()
            if begun is None or self.api.endpoint.continue_body is None:
                break
            prefix, probability = begun
        return None if reader.undecided > LARGEST_UNDECIDED else reader.scores()

    async def _count(self, client: ChatClient, text: str, options: tuple[Option, ...]) -> OptionScores | Silence:
        """From draws."""
        n, stream = self.api.draws, hash64("closed", text)
        replies = await asyncio.gather(*(_ask(client, text, seed=seed_of(0, stream, d)) for d in range(n)))
        silent = [reply for reply in replies if not isinstance(reply, ChatReply)]
        if silent:
            return next((why for why in silent if isinstance(why, UserError)), silent[0])
        found = [parse(reply.text, options) for reply in replies if isinstance(reply, ChatReply)]
        shares = tuple(found.count(i) / n for i in range(len(options)))
        return OptionScores(shares, found.count(None) / n, 0.0, f"sampled-{n}")


def seed_of(key: int, stream: int, draw: int) -> int:
    """A draw's seed, as far as endpoints take it (31 bits)."""
    return hash64("seed", key, stream, draw) >> 33


def as_reply(reply: ChatReply) -> Reply:
    """A chat reply as an engine's."""
    return Reply(reply.text, reply.output_tokens, reply.finish_reason, None)


async def _ask(client: ChatClient, text: str, prefill: str = "", seed: int | None = None) -> ChatReply | Silence:
    """One question; what stops a run comes back too, so that the answers beside it are kept."""
    try:
        return await client.ask(text, prefill, seed)
    except UserError as error:
        client.close_soon()
        return error


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
