"""How fast an endpoint is asked, what is read from an answer, and where the key comes from."""

import asyncio
import bisect
import json
import time

import pytest

from benchmarks.chat_server import DECLINES
from candor.errors import UserError
from serve.client import TOO_LONG, ChatClient, ChatReply, Fault, Settings, read_completion
from serve.endpoint import Endpoint, Price
from serve.ledger import Ledger, OverBudget
from serve.pace import Pace, retry_after, seconds_of


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("1s", 1), ("6m0s", 360), ("120ms", 0.12), ("1h2m3.5s", 3723.5), ("2.5", 2.5), ("soon", None), ("", None)],
)
def test_durations(text, seconds):
    assert seconds_of(text) == seconds


def test_retry_after():
    assert retry_after({"retry-after": "3"}) == 3
    assert retry_after({"retry-after-ms": "250", "retry-after": "9"}) == 0.25
    assert retry_after({"retry-after": "Sat, 21 Nov 2026 10:00:30 GMT"}, now=1795255200.0) == 30
    assert retry_after({"retry-after": "soon"}) is None and retry_after({}) is None


@pytest.mark.parametrize(
    ("requests", "tokens", "each"), [(600, None, 1), (12, None, 1), (None, 6000, 40), (500, 9000, 30)]
)
def test_no_minute_sees_more_than_the_limit(requests, tokens, each, monkeypatch):
    """On a clock of its own: two minutes of calls, and every window of 60 s is counted."""
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    async def sleep(seconds: float) -> None:
        now[0] += seconds

    monkeypatch.setattr(asyncio, "sleep", sleep)
    times: list[float] = []

    async def run() -> None:
        pace = Pace(requests, tokens)
        while now[0] < 1130:
            await pace.take(each)
            times.append(now[0])

    asyncio.run(run())
    most = max(bisect.bisect_left(times, start + 60) - i for i, start in enumerate(times))
    limit = min(requests or 1e9, (tokens or 1e9) / each)
    assert 0.9 * limit < most <= limit


def test_a_pause_holds_everybody(monkeypatch):
    async def run() -> float:
        pace = Pace(None, None)
        pace.told({"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "80ms"}, 1.0)
        started = time.monotonic()
        await asyncio.gather(*(pace.take(1) for _ in range(5)))
        return time.monotonic() - started

    assert asyncio.run(run()) >= 0.08


def completion(**changes) -> bytes:
    choice = {"finish_reason": "stop", "message": {"content": "85"}, "logprobs": None, **changes.pop("choice", {})}
    return json.dumps({"model": "m", "choices": [choice], "usage": {"prompt_tokens": 5}, **changes}).encode()


def entry(token: str, *top: tuple[str, float]) -> dict:
    return {"token": token, "logprob": top[0][1], "top_logprobs": [{"token": t, "logprob": p} for t, p in top]}


def test_a_whole_answer():
    logprobs = {"content": [entry("8", ("8", -0.1), ("9", -3.0)), entry("5", ("5", -0.2))]}
    reply = read_completion(completion(choice={"logprobs": logprobs}), "m")
    assert (reply.text, reply.input_tokens, reply.output_tokens) == ("85", 5, 0)
    assert [t.odds for t in reply.tokens] == [{"8": -0.1, "9": -3.0}, {"5": -0.2}]
    assert (
        read_completion(completion(choice={"message": {"content": [{"text": "8"}, {"text": "5"}]}}), "m").text == "85"
    )
    assert read_completion(completion(choice={"message": {"refusal": "No."}}), "m").finish_reason == "refusal"


@pytest.mark.parametrize(
    "content",
    [
        [entry("8", ("8", float("nan")))],
        [entry("8", ("8", 0.0), ("9", 0.0))],  # two certainties are no distribution
        [{"token": "8"}],
        [entry("7", ("7", -0.1))],  # of another text
        "85",
    ],
)
def test_broken_logprobs_are_none(content):
    assert read_completion(completion(choice={"logprobs": {"content": content}}), "m").tokens == ()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b'{"choices": [{', "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"[]", "without choices"),
        (completion(choices=[]), "without choices"),
        (completion(choices=[None]), "without choices"),
        (completion(choice={"message": None}), "without a message"),
        (completion(choice={"message": {"content": None}}), "without content"),
        (completion(choice={"message": {"content": 5}}), "without content"),
        (completion(model="n"), "another model answered: n"),
        (completion(model="m-mini"), "another model answered"),
        (completion(model={"a": 1}), "another model answered"),
    ],
)
def test_what_is_no_answer(data, message):
    with pytest.raises(ValueError, match=message):
        read_completion(data, "m")


def test_an_answer_cut_off_while_thinking_is_an_answer():
    """It was paid for, and would be cut off again."""
    reply = read_completion(completion(choice={"finish_reason": "length", "message": {"content": None}}), "m")
    assert (reply.text, reply.finish_reason) == ("", "length")


@pytest.fixture(scope="module")
def client():
    return ChatClient(Endpoint(url="http://127.0.0.1:9/v1"), Settings("m", 0.0, 4, None), Ledger())


@pytest.mark.parametrize(("status", "error"), DECLINES)
def test_a_declined_question_is_an_answer(client, status, error):
    found = client.refused(status, {"error": error})
    assert isinstance(found, ChatReply) and (found.finish_reason, found.text) == ("content_filter", "")


def test_what_is_mistaken_for_a_declined_question(client):
    for message in ("Your account was flagged.", "Country not supported", "the key lacks the right 'model.request'"):
        with pytest.raises(UserError, match="check the key's rights"):
            client.refused(403, {"error": {"message": message, "metadata": None}})
    found = client.refused(400, {"error": {"code": "invalid_prompt", "message": "messages must not be empty"}})
    assert found == Fault("status 400: messages must not be empty", again=False)


@pytest.mark.parametrize(
    ("status", "error"),
    [
        (400, {"code": "context_length_exceeded", "message": "Reduce the length."}),
        (400, {"code": 400, "message": "This model's maximum context length is 512 tokens. You requested 900."}),
        (413, {"message": "payload too large"}),
    ],
)
def test_a_question_that_is_too_long_has_no_answer_yet(client, status, error):
    """The same model may be served with a longer context tomorrow."""
    assert client.refused(status, {"error": error}) == Fault(TOO_LONG, again=False)


def test_halves_of_characters_become_what_a_file_can_hold():
    """JSON can carry half an emoji, and a table that is to hold one cannot be written."""
    logprobs = {"content": [entry("85", ("85", -0.1), ("\ud83d", -9.0))]}
    reply = read_completion(completion(choice={"logprobs": logprobs}), "m")
    assert reply.tokens[0].odds == {"85": -0.1, "\ufffd": -9.0}
    found = read_completion(completion(choice={"message": {"content": "\ud83d \ud83d\ude00"}}), "m")
    assert found.text == "\ufffd \U0001f600"


def test_dated_versions_and_other_names_are_the_same_model():
    for told in ("m", "m-2025-04-14", "m-20250414", "m-0613", None):
        assert read_completion(completion(model=told), "m").text == "85"
    assert read_completion(completion(model="served/m"), "m", ("served/m",)).model == "served/m"


def test_proxies_and_loopback(monkeypatch):
    monkeypatch.setenv("https_proxy", "http://proxy:3128")
    monkeypatch.setenv("http_proxy", "http://proxy:3128")
    monkeypatch.setenv("no_proxy", "inside.example")
    assert Endpoint(url="https://api.example/v1").route() == "http://proxy:3128"
    assert Endpoint(url="https://api.example/v1", proxy="http://own:1").route() == "http://own:1"
    assert Endpoint(url="https://inside.example/v1").route() is None
    assert Endpoint(url="http://127.0.0.1:8000/v1").route() is None
    assert Endpoint(url="http://[::1]:8000/v1").loopback and Endpoint(url="http://localhost/v1").loopback


def test_keys(tmp_path, monkeypatch):
    monkeypatch.delenv("K", raising=False)
    assert Endpoint(url="http://127.0.0.1/v1", key_env="K").read_key() == "none"
    with pytest.raises(UserError, match="variable K holds no usable key"):
        Endpoint(url="https://x/v1", key_env="K").read_key()
    monkeypatch.setenv("K", "a b")
    with pytest.raises(UserError, match="no usable key"):
        Endpoint(url="https://x/v1", key_env="K").read_key()
    with pytest.raises(UserError, match="No such file"):
        Endpoint(url="https://x/v1", key_file=tmp_path / "k").read_key()
    (tmp_path / "k").write_text(" sk-1 \n")
    assert Endpoint(url="https://x/v1", key_file=tmp_path / "k").read_key() == "sk-1"


def test_the_ledger():
    ledger = Ledger(Price(input=1.0, output=10.0), budget=0.001)
    tokens, most = ledger.expect(1000, 20)
    assert 250 < tokens < 400 and most == pytest.approx((tokens + 200) / 1e6)
    ledger.reserve(0.0009)
    with pytest.raises(OverBudget, match="is used up"):
        ledger.reserve(0.0002)
    ledger.reserved = 0.0
    ledger.book(1000, 500, 2)
    assert ledger.spent == pytest.approx(520e-6) and ledger.expect(2000, 0)[0] == pytest.approx(1010)
