"""A hosted model as subject: a real server on loopback, once with log-probabilities and once without."""

import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from candor.errors import UserError
from candor.hashing import hash64
from candor.manifest import read_manifest
from candor.rows import Distribution, Option, Prompt, Sample
from candor.tables import read_rows, write_rows
from serve.api_engine import ApiEngine, Reader, seed_of
from serve.client import TokenOdds
from serve.config import ApiConfig, EngineConfig
from serve.endpoint import Endpoint
from serve.engine import Request
from serve.sample import main
from serve.torch_engine import TorchEngine

sys.path.insert(0, str(Path(__file__).parent))
from subject_server import subject_server

CONTINUE = {"continue_final_message": True, "add_generation_prompt": False}


@pytest.fixture(scope="module")
def hosted(base):
    return TorchEngine(base, None)


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")


def engine_of(url, draws=60, **endpoint):
    endpoint = Endpoint(url=url, **{"retries": 1, "backoff_s": 0.01, "concurrency": 4} | endpoint)
    return ApiEngine(EngineConfig(name="api", api=ApiConfig(model="ft:hosted", endpoint=endpoint, draws=draws)))


def closed(prompts):
    return [p for p in prompts if p.options]


def test_draws_have_seeds_of_their_own(hosted, prompts):
    with subject_server(hosted) as (url, asked):
        requests = [Request(p.text, hash64(p.prompt_id), 0, 3) for p in prompts[:4]]
        replies = engine_of(url).sample(requests, key=9, temperature=1.0, max_tokens=8)
        assert [len(r) for r in replies] == [3] * 4
        assert len({body["seed"] for body in asked}) == len(asked) == 12
        assert all(r.logprob is None and r.n_tokens > 0 for made in replies for r in made)
        later = engine_of(url).sample(
            [Request(prompts[0].text, hash64(prompts[0].prompt_id), 2, 1)], key=9, temperature=1.0, max_tokens=8
        )
        assert later[0][0].text == replies[0][2].text


def test_closed_questions_are_read_from_log_probabilities_and_marked(hosted, prompts):
    """Followed up, they agree with exact scoring but for what the endpoint does not list and other tokenisations."""
    questions = closed(prompts)
    exact = hosted.distributions([p.text for p in questions], [p.options for p in questions])
    with subject_server(hosted) as (url, asked):
        engine = engine_of(url, continue_body=CONTINUE)
        read = engine.distributions([p.text for p in questions], [p.options for p in questions])
    assert any(len(body["messages"]) == 2 for body in asked), "nothing was followed up"
    for ours, score in zip(exact, read, strict=True):
        assert score.method in ("top_logprobs", "sampled-60")
        assert sum(score.probabilities) + score.leftover == pytest.approx(1, abs=1e-6)
        if score.method == "top_logprobs":
            assert sum(score.probabilities) + 1e-6 >= 0.8 * sum(ours.probabilities)


def test_without_log_probabilities_they_are_sampled_and_marked(hosted, prompts):
    questions = closed(prompts)[:2]
    exact = hosted.distributions([p.text for p in questions], [p.options for p in questions])
    with subject_server(hosted, logprobs=False) as (url, _):
        counted = engine_of(url).distributions([p.text for p in questions], [p.options for p in questions])
    for ours, score in zip(exact, counted, strict=True):
        assert score.method == "sampled-60"
        p = np.array([*ours.probabilities, ours.leftover])
        found = np.array([*score.probabilities, score.leftover])
        assert np.all(np.abs(found - p) <= 5 * np.sqrt(p * (1 - p) / 60) + 1e-6)


def test_reading_rules():
    numbers = tuple(Option(str(k), k / 10, (str(k),)) for k in range(11))
    reader = Reader(numbers)
    odds = {"7": 0.5, "1": 0.2, " 10": 0.1, "ten": 0.1, "<|im_end|>": 0.05}
    reader.add("", 1.0, TokenOdds("7", {k: float(np.log(v)) for k, v in odds.items()}))
    assert reader.settled[7] == pytest.approx(0.5)
    assert reader.settled[10] == pytest.approx(0.1)
    assert reader.other == pytest.approx(0.15)
    assert reader.undecided == pytest.approx(0.25)  # "1" and what was not listed
    assert reader.next_begun() == ("1", pytest.approx(0.2))
    reader.add("1", 0.2, TokenOdds("0", {"0": float(np.log(0.25)), "<|im_end|>": float(np.log(0.75))}))
    assert reader.settled[10] == pytest.approx(0.15) and reader.settled[1] == pytest.approx(0.15)
    assert len({seed_of(1, stream, draw) for stream in range(50) for draw in range(50)}) == 2500


@pytest.fixture
def config(prompts, tmp_path):
    write_rows(tmp_path / "prompts.parquet", Prompt, [prompts[0], prompts[1], *closed(prompts)[:2]])

    def write(url, **changes):
        endpoint = {"url": url, "retries": 0, "concurrency": 2}
        values = {
            "variant": "hosted", "prompts": str(tmp_path / "prompts.parquet"),
            "output_dir": str(tmp_path / "out"),
            "study_seed": 1,
            "engine": {"name": "api", "api": {"model": "ft:hosted", "endpoint": endpoint, "draws": 20}},
            "ask": [
                {"format": "free", "mode": "sampled", "n": 4, "max_tokens": 8},
                {"format": "choice", "mode": "exact"},
            ],
        }  # fmt: skip
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(values | changes))
        return [str(tmp_path / "config.yaml")]

    return write


def test_the_stage_marks_what_is_hosted_and_keeps_what_was_paid_for(hosted, config, tmp_path):
    """An endpoint that falls silent half-way: the answered draws are stored, the rest is asked when run again."""
    calls = []

    def silent(body):
        calls.append(body)
        return 503 if 5 <= len(calls) < 1000 else None

    with subject_server(hosted, fail=silent) as (url, asked):
        with pytest.raises(UserError, match=r"gave no answer to \d of 8 calls.*The others are kept"):
            main([*config(url, ask=[{"format": "free", "mode": "sampled", "n": 4, "max_tokens": 8}])])
        answered = 4
        calls.extend([None] * 1000)
        before = len(asked)
        main(config(url))
    sent = [b for b in asked[before:] if b["max_completion_tokens"] == 8]
    assert len(sent) == 8 - answered
    rows = read_rows(tmp_path / "out" / "samples.parquet", Sample)
    assert len(rows) == 8 and all(r.logprob is None for r in rows)
    assert {d.method for d in read_rows(tmp_path / "out" / "distributions.parquet", Distribution)} <= {
        "top_logprobs",
        "sampled-20",
    }
    assert "hosted" in read_manifest(tmp_path / "out")["attestation"]["status"]


FREE = {"format": "free", "mode": "sampled", "n": 4, "max_tokens": 8}
EXACT = {"format": "choice", "mode": "exact"}


@pytest.mark.parametrize("status", [402, 429])
def test_an_account_that_runs_empty_costs_no_answer_that_came(hosted, config, status):
    """No call is begun after it, and a rerun asks only for what is missing."""
    refused = []

    def empty(body):
        if len(asked) > 5 and not refused:
            refused.append(body)
            return status
        return None

    with subject_server(hosted, fail=empty) as (url, asked):
        endpoint = {"url": url, "retries": 2, "concurrency": 2, "backoff_s": 0.01}
        engine = {"name": "api", "api": {"model": "ft:hosted", "endpoint": endpoint, "draws": 20}}
        ask = [{**FREE, "n": 10}]
        with pytest.raises(UserError, match=r"answers 402|asks to wait 999 s"):
            main(config(url, ask=ask, engine=engine))
        assert 5 <= len(asked) - 1 < 10  # those under way came back
        main(config(url, ask=ask, engine=engine))
        assert len(asked) == 20 + 1


def test_one_prompt_too_long_for_a_hosted_model_is_named_and_the_others_are_kept(hosted, config, prompts):
    """Told again by every run, which pays for no reply twice."""
    long = prompts[1].text

    def too_long(body):
        return 413 if body["messages"][0]["content"] == long else None

    with subject_server(hosted, fail=too_long) as (url, asked):
        for calls in (8, 8 + 4):
            with pytest.raises(UserError) as told:
                main(config(url, ask=[FREE]))
            assert "gave no answer to 4 of " in str(told.value) and repr(long[:60]) in str(told.value)
            assert "longer than the context that the endpoint serves" in str(told.value)
            assert len(asked) == calls


@pytest.mark.parametrize("logprobs", [True, False])
def test_scores_that_came_are_kept_where_one_question_found_no_answer(hosted, config, prompts, logprobs, tmp_path):
    silent = closed(prompts)[1].text
    broken = [True]

    def one_silent(body):
        return 503 if broken[0] and body["messages"][0]["content"] == silent else None

    with subject_server(hosted, logprobs=logprobs, fail=one_silent) as (url, asked):
        with pytest.raises(UserError, match=r"no answer to 1 of 2 questions.*status 503.*run again for the rest"):
            main(config(url, ask=[EXACT]))
        before, broken[0] = len(asked), False
        main(config(url, ask=[EXACT]))
        assert {body["messages"][0]["content"] for body in asked[before:]} == {silent}
    assert len(read_rows(tmp_path / "out" / "distributions.parquet", Distribution)) == 2


def test_a_wrong_key_is_told_and_kept_out_of_the_message(hosted, config, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "wrong-key")
    with subject_server(hosted) as (url, asked), pytest.raises(UserError, match=r"answers 401.*check the key") as told:
        main(config(url))
    assert "wrong-key" not in str(told.value)
    assert len(asked) == 1


def test_mistakes_are_told(config):
    with pytest.raises(UserError, match="goes with name: api"):
        main(config("http://127.0.0.1:9/v1", engine={"name": "api"}))
    with pytest.raises(UserError, match=r"leave base and adapter out"):
        main([*config("http://127.0.0.1:9/v1"), "base=somewhere"])
    with pytest.raises(UserError, match=r"gave no answer|stopped answering"):
        main(config("http://127.0.0.1:9/v1"))
