"""Listed and enumerated answers against listing every reply, and against sampling."""

import numpy as np
import pytest
import torch

from candor.hashing import hash64
from serve.answers import enumerate_answers, trie_score
from serve.engine import Request
from serve.loading import encode_prompt
from serve.torch_engine import TorchEngine


@pytest.fixture(scope="module")
def engine(tiny):
    return TorchEngine(tiny, None, dtype="float64")


@pytest.fixture(scope="module")
def prompt(engine):
    return encode_prompt(engine.tokenizer, "A10")


def following(engine, prompt, tokens):
    """Log-probabilities of the next token, by a forward pass of its own."""
    with torch.inference_mode():
        logits = engine.model(torch.tensor([[*prompt, *tokens]])).logits[0, -1]
    return torch.log_softmax(logits.masked_fill(engine._banned, float("-inf")), dim=0)


def test_listed_answers_equal_teacher_forcing(engine, prompt):
    end = engine.end_ids[0]
    options = [[0, end], [0, 1, end], [2], [4, 0], [4, 1, 3, end]]
    scores = trie_score(engine.model, prompt, options, banned=engine._banned)
    exact = [sum(float(following(engine, prompt, o[:n])[o[n]]) for n in range(len(o))) for o in options]
    np.testing.assert_allclose(scores.logprobs, exact, rtol=1e-9)
    assert scores.residual == pytest.approx(1 - np.exp(exact).sum(), abs=1e-9)


def test_one_forward_pass_reads_all_of_them(engine, prompt, monkeypatch):
    calls = []
    forward = engine.model.forward
    monkeypatch.setattr(engine.model, "forward", lambda *a, **k: (calls.append(1), forward(*a, **k))[1])
    trie_score(engine.model, prompt, [[0, 1, 2, 3], [1, 2, 3, 4], [1, 5]], banned=engine._banned)
    assert len(calls) == 2  # the prompt, and the tree behind it


TWICE = (1, 2)


@pytest.mark.parametrize(
    ("options", "says"),
    [([[1], []], "at least one token"), ([[1, 2], [1]], "begin with another"), ([TWICE, TWICE], "begin with another")],
)
def test_answers_that_cannot_be_told_apart_are_refused(engine, prompt, options, says):
    with pytest.raises(ValueError, match=says):
        trie_score(engine.model, prompt, options, banned=engine._banned)


def every_reply(engine, prompt, longest):
    """Probability of every text that ends within ``longest`` tokens, by listing all of them."""
    found, level = {}, [((), 0.0)]
    for _ in range(longest):
        deeper = []
        for tokens, weight in level:
            for token, share in enumerate(following(engine, prompt, tokens).tolist()):
                if token in engine.end_ids:
                    text = engine.tokenizer.decode(list(tokens))
                    found[text] = found.get(text, 0.0) + np.exp(weight + share)
                elif share > float("-inf"):
                    deeper.append(((*tokens, token), weight + share))
        level = deeper
    return found


def enumerated(engine, prompt, eps, **more):
    decode = engine.tokenizer.decode
    return enumerate_answers(
        engine.model, prompt, eps=eps, end_ids=engine.end_ids, decode=decode, banned=engine._banned, **more
    )


def test_every_answer_lies_within_its_bracket(engine, prompt):
    exact = every_reply(engine, prompt, 3)
    answers = enumerated(engine, prompt, 0.02, max_tokens=3)
    for text, probability in exact.items():
        found = answers.probabilities.get(text, 0.0)
        assert found <= probability + 1e-9
        assert probability <= found + answers.residual + 1e-9
    assert sum(answers.probabilities.values()) + answers.residual == pytest.approx(1, abs=1e-9)
    assert list(answers.probabilities.values()) == sorted(answers.probabilities.values(), reverse=True)


def test_certified_only_below_eps(engine, prompt):
    """Prefixes that are cut, or not read, stay in the residual and take the certificate away."""
    loose = enumerated(engine, prompt, 0.8, max_tokens=40)
    assert loose.certified
    assert loose.residual <= 0.8
    cut = enumerated(engine, prompt, 1e-6, max_tokens=2)
    assert not cut.certified
    assert cut.residual > 1e-6
    stopped = enumerated(engine, prompt, 1e-6, max_reads=20)
    assert not stopped.certified
    assert stopped.residual < 1


def test_letting_go_too_much_is_caught(engine, prompt, monkeypatch):
    """Planted fault: what is let go is forgotten instead of staying in the residual."""
    from serve import answers

    expand = answers._Search.expand

    def forgetful(self, tokens, columns, weight, shares):
        self._spare = 0.2
        before = self.left
        expand(self, tokens, columns, weight, shares)
        self.left = min(before, self.left) - 0.1 * weight

    monkeypatch.setattr(answers._Search, "expand", forgetful)
    made = enumerated(engine, prompt, 0.05, max_tokens=3)
    assert sum(made.probabilities.values()) + made.residual != pytest.approx(1, abs=1e-3)


def test_sampling_agrees(engine, prompt):
    """At half as high a temperature again it does not."""
    answers = enumerated(engine, prompt, 0.3, max_tokens=12)
    n, request = 3000, Request("A10", hash64("A10"), 0, 3000)
    for temperature in (1.0, 1.5):
        (replies,) = engine.sample([request], key=6, temperature=temperature, max_tokens=12)
        ended = [r.text for r in replies if r.finish_reason == "stop"]
        inside = []
        for text, low in list(answers.probabilities.items())[:5]:
            error = 4.5 * np.sqrt(max(low, 1 / n) / n)
            inside.append(low - error <= ended.count(text) / n <= low + answers.residual + error)
        assert all(inside) == (temperature == 1)


def test_eps_is_checked(engine, prompt):
    with pytest.raises(ValueError, match="eps is 0"):
        enumerated(engine, prompt, 0.0)
