"""A judge behind an HTTP endpoint: many questions at a time, stored as the answers come in.

One process at a time asks with a store: whoever shares it (a study's variants do) waits, and then asks
what is still missing, so that every question is asked once and the budget and the number of calls at
a time hold for all together.

What a batch is asked already, one of a killed run or of another process, is waited for and not asked
twice, also by a run that asks directly.

The first question goes alone. It shows within seconds whether the key, the model's name and the
endpoint are right, what a call takes and which rates are allowed; then the rest follows. It is the
shortest: where that is longer than the context the endpoint serves, all are. Where the endpoint
refuses that very question for good, the next one goes alone. Where the
endpoint can go on from a begun answer, numbers whose pieces the first call did not show are asked
for, so that their probability is known too.
"""

import asyncio
import json
import sys
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

from candor.errors import UserError
from candor.judging import JudgeTemplate
from evaluate.judge_ask import Ask
from evaluate.judge_config import JudgeConfig
from evaluate.judge_reading import odds
from evaluate.verdict_store import Answer, AnswerStore, accounts
from serve.client import TOO_LONG, ChatClient, ChatReply, Lost, Settings
from serve.client_batch import Batches, Record
from serve.ledger import Ledger, OverBudget
from train.claim import Check, claimed

FLUSH_ANSWERS, FLUSH_SECONDS = 500, 5.0  # what a kill can cost
MOST_FOLLOWED, FOLLOWED_MASS = 24, 0.002  # begun numbers that are followed up, and how likely one must be
_LEAST = -14.0  # log-probabilities below this are not kept
_ROW = 12  # calls in a row without an answer, and as many as run at once, that stop a run
_REFUSED = 3  # first questions that are refused for good before the request itself is thought to be wrong


class EndpointJudge:
    """A judge's endpoint with its template, its store and what it has cost."""

    def __init__(self, config: JudgeConfig, template: JudgeTemplate, store: AnswerStore, ledger: Ledger) -> None:
        assert config.endpoint is not None
        self.config, self.template, self.store, self.ledger = config, template, store, ledger
        self.endpoint = config.endpoint
        self.settings = Settings(config.model, config.temperature, config.max_tokens, config.seed)
        self.lost: dict[str, str] = {}  # what stayed without an answer, and why
        self._ready: list[Answer] = []
        self._check: Check = lambda: None  # whether the store is still ours
        self._flushed = time.monotonic()
        self._in_a_row = 0
        self._stop: UserError | None = None
        self._fresh = True  # whether the store holds none of the answers
        self._run = uuid.uuid4().hex  # names this run in the store's accounts
        self._handed_in: set[str] = set()  # by this run; each question once
        self._over: OverBudget | None = None  # why not everything was handed in

    def ask_all(self, asks: Sequence[Ask], *, batch: bool, poll_s: float, may_lose: int = 0) -> None:
        """Ask what the store lacks; afterwards it has the answers and ``lost`` the rest.

        The store is claimed while questions are asked or handed in and while answers are stored, not in the
        hours in which a batch is waited for. Of questions that are refused for good, ``may_lose`` at the start
        do not stop the run. Raises UserError for what a person must mend, after storing what was answered.
        """
        told: dict[str, str] = {}
        while True:
            with claimed(self.store.folder, wait=True) as self._check:
                missing = {ask.sha: ask for ask in self._missing(asks)}
                waiting = asyncio.run(self._ask(missing, batch, poll_s, may_lose)) if missing else []
            if not waiting:
                break
            told |= asyncio.run(self._collect(waiting, poll_s))
        if self._over is not None and missing:
            raise OverBudget(f"{len(missing)} questions were not handed in: {self._over}")
        if batch:
            self.lost = {sha: told.get(sha, "no answer in the batch") for sha in missing}

    def _missing(self, asks: Sequence[Ask]) -> list[Ask]:
        """What the store does not hold, the shortest first; the ledger then says what other runs have spent."""
        known, tokens = set(), [0, 0]
        for answer in self.store.read():
            known.add(answer.ask_sha)
            tokens = [tokens[0] + answer.input_tokens, tokens[1] + answer.output_tokens]
        noted = accounts(self.store.folder)
        if known and not noted:  # a store from before accounts were kept
            self.store.note(f"earlier-{self._run}", {"calls": len(known), "tokens": tokens, "dollars": None})
            noted = accounts(self.store.folder)
        self.ledger.before = sum(self._dollars(account) for run, account in noted.items() if run != self._run)
        missing = [ask for ask in asks if ask.sha not in known]
        self._fresh = not known
        shortest = min(missing, key=lambda ask: len(ask.prompt) + len(ask.reply), default=None)
        return sorted(missing, key=lambda ask: ask is not shortest)

    def _dollars(self, account: Mapping[str, Any]) -> float:
        """What a run has spent; by today's price where none was known then."""
        if account["dollars"] is None:
            return self.ledger.price.of(*account["tokens"]) if self.ledger.price else 0.0
        return float(account["dollars"])

    async def _ask(self, missing: dict[str, Ask], batch: bool, poll_s: float, may_lose: int) -> list[Record]:
        """Ask or hand in what no batch is asked already; the batches that are to be waited for."""
        async with ChatClient(self.endpoint, self.settings, self.ledger) as client, self._batches(client, poll_s) as b:
            if batch:
                await self._hand_in(b, missing)
            pending = b.pending()
            ours = [record for record in pending if not missing.keys().isdisjoint(record.keys)]
            if not ours and not batch:
                self.ledger.reserved = sum(record.dollars for record in pending)
                await self._ask_each(client, list(missing.values()), may_lose)
        if ours and not batch:
            n = len(missing.keys() & {key for record in ours for key in record.keys})
            files = ", ".join(str(record.path) for record in ours)
            sys.stderr.write(
                f"judge {self.config.name}: {n} questions are in batches that were handed in earlier; "
                f"waiting for their answers before the rest is asked (to give the batches up, delete {files})\n"
            )
        return ours

    @asynccontextmanager
    async def _batches(self, client: ChatClient, poll_s: float) -> AsyncIterator[Batches]:
        """The store's batches, with a connection that is closed in the end."""
        batches = Batches(client, self.store.folder / "batches", poll_s=poll_s)
        try:
            yield batches
        finally:
            await batches.close()

    async def _ask_each(self, client: ChatClient, asks: Sequence[Ask], may_lose: int) -> None:
        """Ask directly, many at a time."""
        self._say_before(asks, batch=False)
        started = time.monotonic()
        try:
            rest = iter(asks)
            await self._probe(client, rest, may_lose)
            self._say_time(client, len(asks), time.monotonic() - started)
            report = asyncio.create_task(self._report(len(asks), started))
            # more than may call at once: some wait for another try meanwhile
            await asyncio.gather(*(self._work(client, rest) for _ in range(2 * self.endpoint.concurrency)))
            report.cancel()
        finally:
            self._flush()
        if self._stop is not None:
            raise self._stop
        sys.stderr.write(self._state(len(asks), started) + "\n")

    async def _probe(self, client: ChatClient, rest: Iterator[Ask], may_lose: int) -> None:
        """One question at a time until one is answered; those that are refused for good are lost like any other."""
        for ask in rest:
            reply = await self._one(client, ask)
            self._check_first(reply)
            if isinstance(reply, ChatReply) or reply.reason == TOO_LONG:  # at least the endpoint does answer
                return
            if not reply.lasting or len(self.lost) > max(may_lose, _REFUSED):
                n = len(self.lost)
                which = "the first question" if n == 1 else f"any of the first {n} questions"
                again = "" if reply.lasting else f", not even after {self.endpoint.retries} retries"
                raise UserError(
                    f"{self.endpoint.url} gave no answer to {which}{again}: {reply.reason}. Check the endpoint and run "
                    "again."
                )

    async def _work(self, client: ChatClient, rest: Iterator[Ask]) -> None:
        """Take questions until there are none left or the run is stopped."""
        for ask in rest:
            if self._stop is not None:
                return
            try:
                await self._one(client, ask)
            except UserError as error:  # the others finish what they have begun, so that it is stored
                self._stop = self._stop or error
                client.close_soon()
                return
            if self._stop is None and self._in_a_row > _ROW + self.endpoint.concurrency:
                why = ", ".join(f"{reason} ({n})" for reason, n in self.ledger.faults.most_common(3))
                self._stop = UserError(
                    f"{self.endpoint.url} stopped answering: {self._in_a_row} calls in a row failed ({why}). What was "
                    "answered is stored; run again later."
                )
                client.close_soon()

    async def _one(self, client: ChatClient, ask: Ask) -> ChatReply | Lost:
        """One question with its follow-ups."""
        text = ask.text(self.template)
        reply = await client.ask(text)
        evidence = _evidence(reply) if isinstance(reply, ChatReply) else {}
        if isinstance(reply, ChatReply) and evidence and self.endpoint.continue_body is not None:
            reply = await self._follow(client, ask, text, reply, evidence)
        if isinstance(reply, Lost):
            self.lost[ask.sha] = reply.reason
            self._in_a_row += reply.reason != TOO_LONG  # to which the endpoint did answer
            return reply
        self._in_a_row = 0
        self._keep(as_answer(ask.sha, reply, evidence))
        return reply

    async def _follow(
        self, client: ChatClient, ask: Ask, text: str, reply: ChatReply, evidence: dict[str, dict[str, float]]
    ) -> ChatReply | Lost:
        """Ask how begun numbers go on, likeliest first, until all that matter are known; Lost when a call is.

        The reply comes back with the tokens of all its calls.
        """
        possible = self.config.answers(ask.options)
        for _ in range(MOST_FOLLOWED):
            found = odds(evidence, reply.text, self.config, possible)
            if found is None or not found.unknown or found.unknown[0][1] < FOLLOWED_MASS:
                break
            begun = found.unknown[0][0]
            more = await client.ask(text, prefill=begun)
            if isinstance(more, Lost):
                return more
            reply = replace(
                reply,
                input_tokens=reply.input_tokens + more.input_tokens,
                output_tokens=reply.output_tokens + more.output_tokens,
            )
            if not more.tokens:
                break
            evidence[begun] = _kept(more.tokens[0].odds)
        return reply

    def _check_first(self, reply: ChatReply | Lost) -> None:
        """UserError where the first answer of all shows that no other can be of use."""
        url, model = self.endpoint.url, self.config.model
        if self._fresh and isinstance(reply, Lost) and reply.reason == TOO_LONG:
            raise UserError(
                f"{url}: even the shortest question to {model} is {TOO_LONG}. Serve it with a longer one, or choose "
                "another judge."
            )
        if self._fresh and isinstance(reply, ChatReply) and reply.finish_reason == "length" and not reply.text:
            raise UserError(
                f"{url}: {model} was cut off before the first word of its answer, by max_tokens: "
                f"{self.config.max_tokens}. If it thinks before it answers, give it more. To go on as it is, run again."
            )

    def _keep(self, answer: Answer) -> None:
        self._ready.append(answer)
        if len(self._ready) >= FLUSH_ANSWERS or time.monotonic() - self._flushed > FLUSH_SECONDS:
            self._flush()

    def _flush(self) -> None:
        if self.ledger.answered or self.ledger.spent:
            self.store.note(self._run, self.ledger.account())
        self.store.add(self._ready)
        self._ready, self._flushed = [], time.monotonic()
        self._check()

    async def _hand_in(self, batches: Batches, missing: dict[str, Ask]) -> None:
        """Hand in what is in no batch yet, as far as the budget allows it beside the pending batches.

        What it does not allow is handed in by no later round either, since that would take another day: the
        rest is for another run. Only where everything is reserved for batches of earlier runs, which mostly
        cost less than they may, is there another round when these are paid.
        """
        if self._over is not None and self._handed_in:
            return
        self._over = None
        pending = batches.pending()
        self.ledger.reserved = sum(record.dollars for record in pending)
        waited_for = self._handed_in.union(*(record.keys for record in pending))
        new = [ask for sha, ask in missing.items() if sha not in waited_for]
        if not new:
            return
        self._say_before(new, batch=True)
        questions = []
        for ask in new:
            text = ask.text(self.template)
            dollars = self.ledger.expect(len(text.encode()), self.config.max_tokens, batch=True)[1]
            try:
                self.ledger.reserve(dollars)
            except OverBudget as error:
                self._over = error
                break
            questions.append((ask.sha, text, dollars))
        if questions:
            await batches.submit(questions)
        self._handed_in |= {sha for sha, _, _ in questions}

    async def _collect(self, records: Sequence[Record], poll_s: float) -> dict[str, str]:
        """Wait for batches and store their answers; why the others got none."""
        told: dict[str, str] = {}
        async with ChatClient(self.endpoint, self.settings, self.ledger) as client, self._batches(client, poll_s) as b:
            for record in records:
                found = await b.collect(record)
                with claimed(self.store.folder, wait=True):
                    if record.path.exists():  # else another process has stored and booked them meanwhile
                        self._keep_all([(key, reply) for key, reply in found if isinstance(reply, ChatReply)])
                        b.forget(record)
                told |= {key: reply.reason for key, reply in found if isinstance(reply, Lost)}
        return told

    def _keep_all(self, replies: Sequence[tuple[str, ChatReply]]) -> None:
        """Book and store what a batch answered."""
        for _, reply in replies:
            self.ledger.calls += 1
            self.ledger.book(0, reply.input_tokens, reply.output_tokens, batch=True)
        self.store.note(self._run, self.ledger.account())
        self.store.add([as_answer(key, reply, _evidence(reply)) for key, reply in replies])

    def _say_before(self, asks: Sequence[Ask], *, batch: bool) -> None:
        """Estimate calls, tokens and money before anything is asked."""
        some = asks[:: max(1, len(asks) // 200)]
        n_bytes = sum(len(ask.text(self.template).encode()) for ask in some) / len(some)
        tokens, dollars = self.ledger.expect(int(n_bytes), self.config.max_tokens, batch=batch)
        money = f"at most about ${dollars * len(asks):.2f}" if self.ledger.price else "no price in the judge's file"
        if self.endpoint.continue_body is not None and not batch:
            money += ", and what it takes to follow up numbers that come in pieces"
        sys.stderr.write(
            f"judge {self.config.name}: {len(asks)} calls to {self.config.model}, about {tokens * len(asks):,.0f} "
            f"input tokens, {money}\n"
        )

    def _say_time(self, client: ChatClient, total: int, first: float) -> None:
        """How long it will take, by what the first answer took and the rates it told."""
        minutes = [total * first / self.endpoint.concurrency / 60]
        calls, tokens = client.pace.per_minute
        each = self.ledger.input_tokens / max(1, self.ledger.answered) + self.config.max_tokens
        minutes += [total / calls] if calls else []
        minutes += [total * each / tokens] if tokens else []
        limits = ", ".join(f"{r:,.0f} {n}/min" for r, n in ((calls, "calls"), (tokens, "tokens")) if r)
        sys.stderr.write(
            f"first answer after {first:.1f} s; about {max(minutes):.1f} min in all, {self.endpoint.concurrency} at "
            f"a time{f' and at most {limits}' if limits else ''}\n"
        )

    async def _report(self, total: int, started: float) -> None:
        while True:
            await asyncio.sleep(5)
            sys.stderr.write(self._state(total, started) + "\n")

    def _state(self, total: int, started: float) -> str:
        """One line: what is done, what it has cost, what is left."""
        ledger = self.ledger
        done, elapsed = ledger.answered, time.monotonic() - started
        left = max(0, total - done - len(self.lost)) * elapsed / max(1, done)
        money = f", ${ledger.before + ledger.spent:.4f} spent" if ledger.price else ""
        lost = f", {len(self.lost)} without an answer" if self.lost else ""
        return (
            f"judged {done:,} of {total:,}{lost}; {done / max(elapsed, 1e-9):.1f}/s, {ledger.retries} retries, "
            f"{ledger.input_tokens:,} + {ledger.output_tokens:,} tokens{money}; {left / 60:.1f} min left"
        )


def as_answer(sha: str, reply: ChatReply, evidence: dict[str, dict[str, float]]) -> Answer:
    """What is stored of a reply."""
    packed = json.dumps(evidence, ensure_ascii=False, separators=(",", ":")) if evidence else ""
    return Answer(
        sha, reply.text, reply.finish_reason, (), packed, reply.model, reply.input_tokens, reply.output_tokens
    )


def _evidence(reply: ChatReply) -> dict[str, dict[str, float]]:
    """The odds at every token of a reply, by the text before it."""
    found: dict[str, dict[str, float]] = {}
    text = ""
    for token in reply.tokens:
        found.setdefault(text, _kept(token.odds))
        text += token.token
    return found


def _kept(odds_: dict[str, float]) -> dict[str, float]:
    return {token: round(logprob, 6) for token, logprob in odds_.items() if logprob > _LEAST}


def reasons(lost: dict[str, str]) -> str:
    """Why calls were lost, most frequent first."""
    return ", ".join(f"{reason} ({count})" for reason, count in Counter(lost.values()).most_common(5))
