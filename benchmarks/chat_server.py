"""A local chat-completions server that behaves, or misbehaves on a script: for tests and benchmarks.

    python -m benchmarks.chat_server '{"latency_s": 0.5}'     # prints its port; GET /stats tells what it saw

It is a judge with a planted truth: a reply that contains "grade=85" is worth 85, and the server
writes that number in the pieces it was told to (digit by digit, or whole), with log-probabilities
whose expectation is known. Which fault a call meets follows from the question and from how often it
was asked, so that a run can be repeated and every answer can be checked. It speaks just enough
HTTP/1.1, and binds to loopback only.
"""

import asyncio
import json
import math
import random
import re
import subprocess
import sys
import time
import urllib.request
from collections import Counter, deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

from candor.hashing import hash64

FAULTS = (
    "429-after",
    "429",
    "500",
    "503",
    "slow",
    "cut",
    "reset",
    "not-json",
    "no-choices",
    "null-content",
    "wrong-model",
    "no-logprobs",
    "half-characters",
    "deep",
    "huge",
)
NOT_RETRIED = ("no-logprobs", "half-characters")  # an answer all the same
DECLINES = (  # how endpoints say that they will not have a question: status and error
    (400, {"code": "content_filter", "message": "The prompt was filtered."}),
    (
        400,
        {
            "code": "invalid_prompt",
            "type": "invalid_request_error",
            "message": "Invalid prompt: your prompt was flagged as potentially violating our usage policy. Please try "
            "again with a different prompt.",
        },
    ),
    (
        403,
        {
            "code": 403,
            "message": 'a/judge requires moderation on A. Your input was flagged for "violence".',
            "metadata": {"reasons": ["violence"], "flagged_input": "Reply ...", "provider_name": "A"},
        },
    ),
)
_GRADE = re.compile(r"grade=(\d+)")


@dataclass(frozen=True)
class Script:
    """How the server behaves."""

    latency_s: float = 0.0
    jitter_s: float = 0.0  # added, uniformly from 0
    fault_share: float = 0.0  # of tries
    faults: tuple[str, ...] = FAULTS
    filtered_share: float = 0.0  # of questions, always: by an error (DECLINES) or a finish reason
    thinking_share: float = 0.0  # of questions, always: cut off before the first word of the answer
    context: int = 0  # bytes of a question; longer ones are an error 400
    refused: str = ""  # questions with this in them are refused for good, with a status 400
    slow_s: float = 5.0
    huge_bytes: int = 8_000_000
    retry_after_s: float = 0.05
    per_minute: int = 0  # calls in any 60 s; more are turned away and counted as "over the rate"
    tokens_per_minute: int = 0
    turn_away_above: int = 0  # calls at once; the rest get a 429
    split_digits: bool = False  # one token per digit
    noise: float = 0.0  # standard deviation of the grade that is told, redrawn at every call
    repeat_reply: bool = False  # say the judged reply again before the grade, as a careless judge might
    key: str = ""  # required, when set
    model: str = "judge-model"
    letters: bool = False  # tell the grade 1 as A, 2 as B, ...
    form: str = "{}"  # what is written around the number, e.g. '{{"score": {}}}'
    spread: float = 0.4  # probability of the grade 10 (or, up to 5, 1) lower than the one that is told
    batches_fail: int = 0  # so many lines of a batch come back as errors
    batches_unpaid: int = 0  # and so many after them, because the account ran empty
    batch_api: bool = True  # without it every call of it is answered with a 404
    # of the first calls that hand batches in: "refused" with a 503, or "unsaid": taken, and answered with a 500
    batch_faults: tuple[str, ...] = ()


@dataclass
class Seen:
    """What the server saw."""

    calls: int = 0
    most_at_once: int = 0
    over_rate: int = 0
    first_at: float = 0.0  # seconds on the server's clock
    last_at: float = 0.0
    turned_away: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    tries: Counter[str] = field(default_factory=Counter)  # by question
    handed_in: int = 0  # calls that hand a batch in
    batches: int = 0
    connections: int = 0


class Server:
    """The server; ``run`` serves until it is cancelled."""

    def __init__(self, script: Script) -> None:
        self.script, self.seen = script, Seen()
        self._open: set[asyncio.StreamReader] = set()  # of requests being answered
        self._times: deque[tuple[float, float]] = deque()
        self._files: dict[str, bytes] = {}
        self._batches: dict[str, dict[str, Any]] = {}
        self._body = b""

    async def run(self) -> None:
        """Serve on a free port of the loopback interface and print it."""
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0, limit=1 << 26)
        print(server.sockets[0].getsockname()[1], flush=True)
        await asyncio.gather(server.serve_forever(), self._leave_with_parent())

    async def _leave_with_parent(self) -> None:
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.read)
        sys.exit(0)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.seen.connections += 1
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
                first, *lines = head.split("\r\n")
                method, path, _ = first.split(" ", 2)
                path = re.sub(r"^http://[^/]+", "", path)  # as a proxy is asked
                headers = {k.lower(): v.strip() for k, v in (x.split(":", 1) for x in lines if ":" in x)}
                body = await reader.readexactly(int(headers.get("content-length", 0)))
                if path != "/stats":
                    self._open.add(reader)
                    self.seen.most_at_once = max(self.seen.most_at_once, self._at_once())
                try:
                    if not await self._answer(writer, method, path, headers, body):
                        return
                finally:
                    self._open.discard(reader)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    def _at_once(self) -> int:
        """Requests that somebody waits for: a client that hung up is not counted, though its answer is under way."""
        return sum(not (reader.at_eof() or reader.exception()) for reader in self._open)

    async def _answer(
        self, writer: asyncio.StreamWriter, method: str, path: str, headers: dict[str, str], body: bytes
    ) -> bool:
        """Answer one request; False when the connection is to be dropped."""
        if path == "/stats":
            await _send(writer, 200, vars(self.seen))
            return True
        if self.script.key and headers.get("authorization") != f"Bearer {self.script.key}":
            said = headers.get("authorization", "no key")
            await _send(writer, 401, {"error": {"message": f"Incorrect API key: {said}", "code": "invalid_api_key"}})
            return True
        if path == "/v1/chat/completions":
            return await self._complete(writer, json.loads(body))
        return await self._batch_call(writer, method, path, headers, body)

    async def _complete(self, writer: asyncio.StreamWriter, body: dict[str, Any]) -> bool:
        question = body["messages"][0]["content"]
        name = f"{hash64(question, body['messages'][1:]):016x}"
        self.seen.calls += 1
        self.seen.tries[name] += 1
        over, limits = self._count(body)
        if self.script.turn_away_above and self._at_once() > self.script.turn_away_above:
            self.seen.turned_away += 1
            await _send(writer, 429, {"error": {"message": "too many at once"}})
            return True
        await asyncio.sleep(self.script.latency_s + random.uniform(0, self.script.jitter_s))
        if over:
            await _send(writer, 429, {"error": {"message": "slow down"}}, {**limits, "retry-after": "1"})
            return True
        if 0 < self.script.context < len(question.encode()):
            message = f"This model's maximum context length is {self.script.context} tokens."
            await _send(writer, 400, {"error": {"code": 400, "message": message}}, limits)
            return True
        filtered = _share("filter", question) < self.script.filtered_share
        how = hash64("how", question) % (1 + len(DECLINES))
        if filtered and how < len(DECLINES):
            status, error = DECLINES[how]
            await _send(writer, status, {"error": error}, limits)
            return True
        if self.script.refused and self.script.refused in question:
            await _send(writer, 400, {"error": {"code": "invalid_prompt", "message": "Invalid prompt."}}, limits)
            return True
        fault = ""
        if _share("fault", name, self.seen.tries[name]) < self.script.fault_share:
            fault = self.script.faults[hash64("kind", name, self.seen.tries[name]) % len(self.script.faults)]
            self.seen.faults[fault] += 1
        answer = self.reply(body, filtered=filtered)
        return await self._faulty(writer, fault, answer, limits)

    async def _faulty(
        self, writer: asyncio.StreamWriter, fault: str, answer: dict[str, Any], limits: dict[str, str]
    ) -> bool:
        """Send the answer, spoilt in the way that ``fault`` names."""
        if fault in ("429-after", "429", "500", "503"):
            more = {"retry-after": str(self.script.retry_after_s)} if fault in ("429-after", "503") else {}
            await _send(writer, int(fault[:3]), {"error": {"message": "try later"}}, {**limits, **more})
            return True
        if fault == "reset":
            writer.transport.abort()
            return False
        if fault == "slow":
            await asyncio.sleep(self.script.slow_s)
        elif fault == "no-choices":
            answer["choices"] = []
        elif fault == "null-content":
            answer["choices"][0]["message"]["content"] = None
        elif fault == "wrong-model":
            answer["model"] = "another-model"
        elif fault == "no-logprobs":
            answer["choices"][0]["logprobs"] = None
        elif fault == "half-characters":  # of an emoji that was cut into tokens: no file can hold one
            for token in (answer["choices"][0]["logprobs"] or {}).get("content", []):
                token["top_logprobs"].append({"token": "\ud83d", "logprob": -12.0, "bytes": None})
        data = b'{"choices": [{"message"' if fault == "not-json" else json.dumps(answer).encode()
        if fault == "deep":
            data = b"[" * 100_000
        if fault == "huge":
            data += b" " * self.script.huge_bytes
        if fault == "cut":
            writer.write(_head(200, len(data), limits) + data[: len(data) // 2])
            await writer.drain()
            return False
        writer.write(_head(200, len(data), limits) + data)
        await writer.drain()
        return True

    def _count(self, body: dict[str, Any]) -> tuple[bool, dict[str, str]]:
        """Whether a call is one too many in the last 60 s, and the headers that say how many are left."""
        script, now = self.script, time.monotonic()
        tokens = _tokens(body) + int(body.get("max_completion_tokens") or body.get("max_tokens") or 0)
        while self._times and self._times[0][0] < now - 60:
            self._times.popleft()
        self._times.append((now, tokens))
        self.seen.first_at, self.seen.last_at = self.seen.first_at or now, now
        calls, used = len(self._times), sum(t for _, t in self._times) if script.tokens_per_minute else 0.0
        over = bool(script.per_minute and calls > script.per_minute)
        over |= bool(script.tokens_per_minute and used > script.tokens_per_minute)
        self.seen.over_rate += over
        limits = {}
        for what, limit, spent in (("requests", script.per_minute, calls), ("tokens", script.tokens_per_minute, used)):
            if limit:
                reset = f"{max(0.0, self._times[0][0] + 60 - now):.2f}s"
                left = max(0, int(limit - spent))
                limits |= {f"x-ratelimit-limit-{what}": str(limit), f"x-ratelimit-remaining-{what}": str(left)}
                limits[f"x-ratelimit-reset-{what}"] = reset
        return over, limits

    def reply(self, body: dict[str, Any], *, filtered: bool = False) -> dict[str, Any]:
        """The judge's answer to a request."""
        script, messages = self.script, body["messages"]
        question = messages[0]["content"]
        found = _GRADE.findall(question)
        grade = int(found[-1]) if found else 1
        if script.noise:
            grade = max(1, min(5, round(grade + random.gauss(0, script.noise))))
        begun = messages[1]["content"] if len(messages) > 1 else ""
        tell = (lambda g: chr(ord("A") - 1 + g)) if script.letters else str
        told = script.form.format(tell(grade))
        if script.repeat_reply:
            told = question + "\n" + told
        lower = max(0, grade - (1 if grade <= 5 else 10))
        tokens = _spell(told, script.form.format(tell(lower)), script.spread, begun, split=script.split_digits)
        limit = int(body.get("max_completion_tokens") or body.get("max_tokens") or 16)
        ended = len(tokens) <= limit
        tokens = tokens[:limit]
        choice: dict[str, Any] = {"index": 0, "finish_reason": "stop" if ended else "length", "logprobs": None}
        choice["message"] = {"role": "assistant", "content": "".join(t for t, _ in tokens)}
        if body.get("logprobs"):
            choice["logprobs"] = {"content": [_entry(t, odds) for t, odds in tokens]}
        if _share("thinking", question) < script.thinking_share:
            choice |= {"finish_reason": "length", "message": {"role": "assistant", "content": None}, "logprobs": None}
        if filtered:
            choice |= {"finish_reason": "content_filter", "message": {"role": "assistant", "content": None}}
        usage = {"prompt_tokens": round(_tokens(body)), "completion_tokens": len(tokens)}
        return {"id": "x", "object": "chat.completion", "model": script.model, "choices": [choice], "usage": usage}

    async def _batch_call(
        self, writer: asyncio.StreamWriter, method: str, path: str, headers: dict[str, str], body: bytes
    ) -> bool:
        """The files and batches of the batch API; a batch is done when it is asked about the second time."""
        parts = path.split("?")[0].split("/")[2:] if self.script.batch_api else [""]
        if parts == ["files"] and method == "POST":
            name = f"file-{len(self._files)}"
            self._files[name] = _uploaded(body, headers["content-type"])
            await _send(writer, 200, {"id": name, "object": "file", "bytes": 0, "created_at": 0, "filename": "f"})
        elif len(parts) == 3 and parts[0] == "files":
            data = self._files[parts[1]]
            writer.write(_head(200, len(data), {}) + data)
            await writer.drain()
        elif parts == ["batches"] and method == "POST":
            asked = json.loads(body)
            self.seen.handed_in += 1
            fault = dict(enumerate(self.script.batch_faults, 1)).get(self.seen.handed_in)
            if fault == "refused":
                await _send(writer, 503, {"error": {"message": "try later"}})
                return True
            self.seen.batches += 1
            name = f"batch-{self.seen.batches}"
            self._batches[name] = {**asked, "id": name, "object": "batch", "status": "in_progress", "created_at": 0}
            await _send(writer, 500 if fault == "unsaid" else 200, self._batches[name])
        elif parts == ["batches"]:
            listed = list(self._batches.values())
            await _send(writer, 200, {"object": "list", "data": listed, "has_more": False})
        elif parts[0] == "batches" and parts[1] in self._batches:
            await _send(writer, 200, self._finish(self._batches[parts[1]]))
        else:
            await _send(writer, 404, {"error": {"message": f"no such path: {path}"}})
        return True

    def _finish(self, batch: dict[str, Any]) -> dict[str, Any]:
        if batch["status"] == "in_progress":
            batch["status"] = "finalizing"
            return batch
        if batch["status"] == "finalizing":
            good, bad = [], []
            for i, line in enumerate(self._files[batch["input_file_id"]].decode().splitlines()):
                asked = json.loads(line)
                self.seen.calls += 1
                self.seen.tries[f"{hash64(asked['body']['messages'][0]['content'], []):016x}"] += 1
                if i < self.script.batches_fail:
                    error = {"code": "batch_expired", "message": "too late"}
                    bad.append({"custom_id": asked["custom_id"], "response": None, "error": error})
                elif i < self.script.batches_fail + self.script.batches_unpaid:
                    error = {"code": "insufficient_quota", "message": "You exceeded your current quota."}
                    response = {"status_code": 429, "body": {"error": error}}
                    bad.append({"custom_id": asked["custom_id"], "response": response, "error": None})
                else:
                    response = {"status_code": 200, "body": self.reply(asked["body"])}
                    good.append({"custom_id": asked["custom_id"], "response": response, "error": None})
            batch["status"] = "expired" if bad else "completed"
            for key, lines in (("output_file_id", good), ("error_file_id", bad)):
                if lines:
                    batch[key] = f"file-{len(self._files)}"
                    broken = '{"custom_id": "'  # a last line that was cut off
                    self._files[batch[key]] = "\n".join([*map(json.dumps, lines), broken]).encode()
        return batch


def _share(*parts: Any) -> float:
    return hash64(*parts) / 2**64


def _tokens(body: dict[str, Any]) -> float:
    return 8 + 0.25 * len(body["messages"][0]["content"].encode())


def _pieces(text: str, *, split: bool) -> list[str]:
    """A text cut into tokens: words, numbers (whole or digit by digit) and signs."""
    return re.findall(r"\d|[^\d]+" if split else r"\d{1,3}|[^\d]+", text)


def _spell(told: str, other: str, spread: float, begun: str, *, split: bool) -> list[tuple[str, dict[str, float]]]:
    """Tokens of the likelier of two answers, with what could have stood at each place.

    ``told`` has probability 1 - spread and ``other`` spread; with ``begun`` the answer goes on from there.
    """
    ways = [(_pieces(told, split=split), 1 - spread), (_pieces(other, split=split), spread)]
    if told == other:
        ways = [(ways[0][0], 1.0)]
    done = ""
    tokens: list[tuple[str, dict[str, float]]] = []
    if begun:
        left = []
        for pieces, mass in ways:
            text, rest = "", list(pieces)
            while rest and len(text) < len(begun):
                text += rest.pop(0)
            if text == begun:
                left.append((rest, mass))
        ways, done = left, begun
    while any(pieces for pieces, _ in ways):
        total = sum(mass for _, mass in ways)
        odds: Counter[str] = Counter()
        for pieces, mass in ways:
            odds[pieces[0] if pieces else "<|end|>"] += mass / total
        taken = max(odds, key=lambda t: odds[t])
        if taken == "<|end|>":
            break
        tokens.append((taken, dict(odds)))
        done += taken
        ways = [(pieces[1:], mass) for pieces, mass in ways if pieces and pieces[0] == taken]
    if not tokens:
        tokens.append(("<|end|>", {"<|end|>": 1.0}))
    return tokens


def _entry(token: str, odds: dict[str, float]) -> dict[str, Any]:
    top = [{"token": t, "logprob": math.log(p), "bytes": None} for t, p in sorted(odds.items(), key=lambda o: -o[1])]
    return {"token": token, "logprob": math.log(odds[token]), "bytes": None, "top_logprobs": top}


def _uploaded(body: bytes, content_type: str) -> bytes:
    """The file in a multipart form."""
    mark = b"--" + content_type.split("boundary=")[1].strip('"').encode()
    for part in body.split(mark):
        head, separator, data = part.partition(b"\r\n\r\n")
        if separator and b'name="file"' in head:
            return data.removesuffix(b"\r\n")
    raise ValueError("no file in the form")


def _head(status: int, length: int, headers: dict[str, str]) -> bytes:
    lines = "".join(f"{key}: {value}\r\n" for key, value in headers.items())
    return f"HTTP/1.1 {status} X\r\ncontent-type: application/json\r\ncontent-length: {length}\r\n{lines}\r\n".encode()


async def _send(writer: asyncio.StreamWriter, status: int, body: Any, headers: dict[str, str] | None = None) -> None:
    data = json.dumps(body).encode()
    writer.write(_head(status, len(data), headers or {}) + data)
    await writer.drain()


@dataclass(frozen=True)
class Running:
    """A server in a process of its own."""

    url: str
    port: int
    pid: int

    def stats(self) -> dict[str, Any]:
        """What it has seen."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/stats", timeout=30) as answer:
            found: dict[str, Any] = json.loads(answer.read())
            return found


@contextmanager
def serving(script: Script) -> Iterator[Running]:
    """A server that runs as long as the block."""
    command = [sys.executable, "-m", "benchmarks.chat_server", json.dumps(asdict(script))]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    try:
        port = int(process.stdout.readline())
        yield Running(f"http://127.0.0.1:{port}/v1", port, process.pid)
    finally:
        process.kill()
        process.wait()


if __name__ == "__main__":
    values = json.loads(sys.argv[1]) if len(sys.argv) > 1 else {}
    asyncio.run(Server(Script(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})).run())
