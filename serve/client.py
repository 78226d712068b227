"""The one place that speaks HTTP: chat completions from any OpenAI-compatible endpoint, many at a time.

The ``openai`` library makes the calls. Around it stands what it does not do: a bound on calls at a
time, the endpoint's rates, a bound on the size of an answer, retries that count an answer without
content as failed too, and an account of what was spent. A call ends as a ``ChatReply``, word for
word what the model said, or as ``Lost``, which is never an answer. What a person must mend (the
key, the model's name, an empty account, the budget) is a UserError and stops the run.
"""

import asyncio
import json
import math
import random
import re
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import httpx2
import openai

from candor.errors import UserError
from serve.endpoint import Endpoint, same_model
from serve.ledger import Ledger
from serve.pace import Pace, retry_after

_POOL = 8  # connections that share a pool
_MENDABLE = {401: "check the key", 402: "check the account", 403: "check the key's rights", 404: "check url and model"}
_EMPTY_ACCOUNT = {"insufficient_quota", "billing_hard_limit_reached", "billing_not_active"}
_TOO_LONG = re.compile(r"context.?length|maximum context|too many tokens|longer than the model", re.IGNORECASE)
# Azure's and others' codes; OpenAI's invalid_prompt of reasoning models; a moderated model at OpenRouter
_DECLINED = re.compile(r"content_filter|content_policy|(?:input|prompt) was flagged", re.IGNORECASE)
TOO_LONG = "longer than the context that the endpoint serves"  # the reason of such a loss


@dataclass(frozen=True, slots=True)
class Settings:
    """How a model is asked; part of what its answers are stored under."""

    model: str
    temperature: float
    max_tokens: int
    seed: int | None


@dataclass(frozen=True, slots=True)
class TokenOdds:
    """One token of a reply with the log-probabilities (natural log) of what could have stood there."""

    token: str
    odds: dict[str, float]  # the most probable tokens, the one that was taken included


@dataclass(frozen=True, slots=True)
class ChatReply:
    """What the model said."""

    text: str
    finish_reason: str  # "stop", "length" (cut off, perhaps before the first word), "content_filter" or "refusal"
    tokens: tuple[TokenOdds, ...]  # empty where the endpoint gives no log-probabilities
    model: str  # who answered, as the endpoint says
    input_tokens: int
    output_tokens: int


@dataclass(frozen=True, slots=True)
class Lost:
    """No answer after every retry; not a reply, and never stored as one."""

    reason: str
    lasting: bool = False  # the endpoint refuses this very question, so that retries are of no use


@dataclass(frozen=True, slots=True)
class Fault:
    """A try that gave no answer."""

    reason: str
    again: bool = True
    wait: float | None = None  # seconds the endpoint asks for
    billed: bool = False  # the model may well have answered, and that is to be paid


class ChatClient:
    """A connection to one endpoint: ``async with ChatClient(...) as client: await client.ask(text)``."""

    def __init__(self, endpoint: Endpoint, settings: Settings, ledger: Ledger) -> None:
        self.endpoint, self.settings, self.ledger = endpoint, settings, ledger
        self.pace = Pace(endpoint.requests_per_minute, endpoint.tokens_per_minute)
        self._slots = asyncio.Semaphore(endpoint.concurrency)
        self._closing = asyncio.Event()
        self._key = endpoint.read_key()
        transport = _Capped(endpoint)
        self.openai = openai.AsyncOpenAI(
            api_key=self._key,
            base_url=endpoint.url,
            timeout=endpoint.timeout_s,
            max_retries=0,  # ours know the rates and the budget
            default_headers={"Accept-Encoding": "identity"},  # so that a bound on bytes is a bound on memory
            http_client=httpx2.AsyncClient(transport=transport, timeout=endpoint.timeout_s),
        )

    async def __aenter__(self) -> "ChatClient":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.openai.close()

    def close_soon(self) -> None:
        """Start no more tries: calls under way are finished, those that wait to be sent are given up."""
        self._closing.set()

    def body(self, text: str, prefill: str = "", seed: int | None = None) -> dict[str, Any]:
        """The request for one question; with ``prefill`` the model goes on from an answer that begins so.

        ``seed`` is for this call alone and comes before the one in the settings.
        """
        messages = [{"role": "user", "content": text}]
        body: dict[str, Any] = {"model": self.settings.model, "messages": messages}
        body["temperature"] = self.settings.temperature
        body[self.endpoint.limit_key] = self.settings.max_tokens
        seed = self.settings.seed if seed is None else seed
        if seed is not None:
            body["seed"] = seed
        if self.endpoint.top_logprobs:
            body |= {"logprobs": True, "top_logprobs": self.endpoint.top_logprobs}
        if prefill:
            messages.append({"role": "assistant", "content": prefill})
            body |= {self.endpoint.limit_key: 1, **(self.endpoint.continue_body or {})}
        return body | self.endpoint.extra_body

    async def ask(self, text: str, prefill: str = "", seed: int | None = None) -> ChatReply | Lost:
        """One question, tried again until it is answered or the retries are used up."""
        body = self.body(text, prefill, seed)
        n_bytes = len(text.encode()) + len(prefill.encode())
        reason, lasting = "", False
        for attempt in range(self.endpoint.retries + 1):
            found = await self._paced(body, n_bytes)
            if isinstance(found, ChatReply):
                return found
            reason, lasting = found.reason, not found.again
            self.ledger.faults[reason] += 1
            if not found.again or attempt == self.endpoint.retries or self._closing.is_set():
                break
            if found.wait is not None and found.wait > self.endpoint.max_wait_s:
                raise UserError(
                    f"{self.endpoint.url} asks to wait {found.wait:.0f} s ({reason}). What was answered is "
                    "stored; run again later, or raise endpoint.max_wait_s."
                )
            if found.wait is not None:
                self.pace.pause(found.wait)  # the others would be turned away as well
            self.ledger.retries += 1
            backoff = min(self.endpoint.max_wait_s, self.endpoint.backoff_s * 2**attempt)
            try:
                async with asyncio.timeout((found.wait or 0.0) + backoff * random.uniform(0.5, 1.0)):
                    await self._closing.wait()
                    break
            except TimeoutError:
                continue
        return Lost(reason, lasting)

    async def _paced(self, body: dict[str, Any], n_bytes: int) -> "ChatReply | Fault":
        """One try, as soon as the rates and a free slot allow it."""
        limit = self.settings.max_tokens
        tokens, dollars = self.ledger.expect(n_bytes, limit)
        self.ledger.reserve(dollars)
        try:
            async with self._slots:
                await self.pace.take(tokens + limit)
                if self._closing.is_set():
                    return Fault("not sent: the run was stopped", again=False)
                self.ledger.calls += 1
                found = await self._once(body)
        finally:
            self.ledger.reserved -= dollars
        if isinstance(found, ChatReply):
            self.ledger.book(n_bytes, found.input_tokens, found.output_tokens)
        elif found.billed:
            self.ledger.spent += dollars
        return found

    async def _once(self, body: dict[str, Any]) -> "ChatReply | Fault":
        """Send and read one answer."""
        try:
            async with asyncio.timeout(self.endpoint.timeout_s):
                # the plain call: building typed objects of every answer costs more than reading it
                response = await self.openai.post("/chat/completions", cast_to=httpx2.Response, body=body)
        except openai.APIStatusError as error:
            self.pace.told(error.response.headers, self.endpoint.max_wait_s)
            return self.refused(error.status_code, error.body, retry_after(error.response.headers))
        except (openai.APITimeoutError, TimeoutError):
            return Fault("timeout", billed=True)
        except (openai.APIConnectionError, httpx2.HTTPError) as error:
            cause = error.__cause__ or error
            return Fault("answer too large" if isinstance(cause, _TooLarge) else f"connection: {type(cause).__name__}")
        self.pace.told(response.headers, self.endpoint.max_wait_s)
        try:
            return read_completion(response.content, self.settings.model, self.endpoint.answers_as)
        except ValueError as error:
            return Fault(str(error), billed=True)

    def refused(self, status: int, body: Any, wait: float | None = None) -> "ChatReply | Fault":
        """What an answer with an error status means; UserError when a person must mend it."""
        inner = body if isinstance(body, dict) else {}
        inner = inner["error"] if isinstance(inner.get("error"), dict) else inner
        code, message = str(inner.get("code") or ""), whole(str(inner.get("message") or "")).replace(self._key, "***")
        metadata = inner.get("metadata")
        flagged = isinstance(metadata, dict) and "flagged_input" in metadata
        if status in (400, 403, 422) and (flagged or _DECLINED.search(f"{code} {message}")):
            return ChatReply("", "content_filter", (), "", 0, 0)
        if status in _MENDABLE or code in _EMPTY_ACCOUNT:
            advice = _MENDABLE.get(status, "check the account")
            said = (message or code or "no message")[:300]
            raise UserError(
                f"{self.endpoint.url} answers {status} for model {self.settings.model!r}: {said} ({advice})."
            )
        if status == 413 or (status in (400, 422) and _TOO_LONG.search(f"{code} {message}")):
            return Fault(TOO_LONG, again=False)  # no answer: the same model may be served with more
        again = worth_a_retry(status)
        return Fault(f"status {status}" + (f": {message[:200]}" if message and not again else ""), again, wait)


def worth_a_retry(status: int) -> bool:
    """Whether an error status may have passed by the next try."""
    return status in (408, 409, 429) or status >= 500


def read_completion(data: bytes, model: str, answers_as: tuple[str, ...] = ()) -> ChatReply:
    """The first choice of a chat completion; ValueError saying what is wrong with it."""
    return read_record(read_json(data), model, answers_as)


def whole(text: str) -> str:
    """``text`` without halves of characters (lone surrogates), which JSON can carry and no file can hold."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def read_json(data: bytes) -> Any:
    """What an endpoint sent as JSON; ValueError when it is none, or too deeply nested to be read."""
    text = data.decode("utf-8", "replace")
    try:
        record = json.loads(text)
        halves = "\\ud" in text or "\\uD" in text
        return json.loads(whole(json.dumps(record, ensure_ascii=False))) if halves else record
    except (ValueError, RecursionError):
        raise ValueError("answer is not JSON") from None


def read_record(record: Any, model: str, answers_as: tuple[str, ...]) -> ChatReply:
    """The same from the parsed JSON."""
    choices = record.get("choices") if isinstance(record, dict) else None
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        raise ValueError("answer without choices")
    told = record.get("model") or ""
    if not isinstance(told, str) or not (not told or told in answers_as or same_model(model, told)):
        raise ValueError(f"another model answered: {str(told)[:80]}")
    choice, usage = choices[0], record.get("usage")
    message = choice.get("message")
    if not isinstance(message, dict):
        raise ValueError("answer without a message")
    reason = str(choice.get("finish_reason") or "stop")
    text = _text(message.get("content"))
    if message.get("refusal") and not text:
        reason, text = "refusal", str(message["refusal"])
    if text is None and reason in ("content_filter", "length"):  # filtered, or cut off while it was thinking
        text = ""
    if text is None:
        raise ValueError("answer without content")
    counts = usage if isinstance(usage, dict) else {}
    return ChatReply(
        text,
        reason,
        _odds(choice.get("logprobs"), text),
        str(told),
        _count(counts.get("prompt_tokens")),
        _count(counts.get("completion_tokens")),
    )


def _text(content: Any) -> str | None:
    """A message's words; some endpoints send them in parts."""
    if isinstance(content, list):
        parts = [part.get("text") for part in content if isinstance(part, dict)]
        content = "".join(part for part in parts if isinstance(part, str)) if parts else None
    return content if isinstance(content, str) else None


def _count(value: Any) -> int:
    """A token count, 0 when it is none."""
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else 0


def _odds(logprobs: Any, text: str) -> tuple[TokenOdds, ...]:
    """The tokens' log-probabilities; none at all when they are absent, broken or not those of ``text``."""
    content = logprobs.get("content") if isinstance(logprobs, dict) else None
    if not isinstance(content, list):
        return ()
    found = []
    for entry in content:
        top = entry.get("top_logprobs") if isinstance(entry, dict) else None
        if not isinstance(top, list) or not isinstance(entry.get("token"), str):
            return ()
        odds: dict[str, float] = {}
        for one in (*top, entry):
            token, logprob = (one.get("token"), one.get("logprob")) if isinstance(one, dict) else (None, None)
            if not isinstance(token, str) or not isinstance(logprob, (int, float)) or math.isnan(logprob):
                return ()
            if token not in odds and logprob <= 1e-6:
                odds[token] = float(logprob)
        if sum(math.exp(p) for p in odds.values()) > 1.01:  # no distribution
            return ()
        found.append(TokenOdds(entry["token"], odds))
    joined = "".join(t.token for t in found)
    return tuple(found) if joined.startswith(text) or text.startswith(joined) else ()


class _TooLarge(httpx2.ReadError):
    """An answer went over the bound on its size."""


class _Body(httpx2.AsyncByteStream):
    """An answer's bytes, cut off by an error when there are too many."""

    def __init__(self, stream: Any, limit: int, done: Callable[[], None]) -> None:
        self._stream, self._limit, self._done = stream, limit, done

    async def __aiter__(self) -> AsyncIterator[bytes]:
        seen = 0
        async for chunk in self._stream:
            seen += len(chunk)
            if seen > self._limit:
                raise _TooLarge("the answer is too large")
            yield chunk

    async def aclose(self) -> None:
        self._done()
        await self._stream.aclose()


class _Capped(httpx2.AsyncBaseTransport):
    """Connections whose answers have a bound on their size.

    A pool looks at each of its connections at every call, which for 64 of them costs more than the
    call itself; several small pools do the same work.
    """

    def __init__(self, endpoint: Endpoint) -> None:
        limits = httpx2.Limits(max_connections=2 * _POOL, max_keepalive_connections=2 * _POOL)
        count = -(-endpoint.concurrency // _POOL)
        trusted = httpx2.create_ssl_context()  # reading the certificates takes time; once will do
        proxy = endpoint.route()
        self._pools = [httpx2.AsyncHTTPTransport(verify=trusted, limits=limits, proxy=proxy) for _ in range(count)]
        self._busy = [0] * count
        self._most = endpoint.max_body_bytes

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        place = self._busy.index(min(self._busy))
        self._busy[place] += 1
        done = _Once(lambda: self._free(place))
        try:
            response = await self._pools[place].handle_async_request(request)
            if response.headers.get("content-encoding", "identity") != "identity":
                await response.aclose()
                raise httpx2.DecodingError("the answer is compressed, though that was declined")
        except BaseException:
            done()
            raise
        body = _Body(response.stream, self._most, done)
        return httpx2.Response(
            response.status_code, headers=response.headers, stream=body, extensions=response.extensions
        )

    def _free(self, place: int) -> None:
        self._busy[place] -= 1

    async def aclose(self) -> None:
        for pool in self._pools:
            await pool.aclose()


class _Once:
    """Does something the first time it is called."""

    def __init__(self, action: Callable[[], None]) -> None:
        self._action: Callable[[], None] | None = action

    def __call__(self) -> None:
        action, self._action = self._action, None
        if action is not None:
            action()
