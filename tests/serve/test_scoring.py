"""Exact distributions: against every reply listed one by one, against sampling, and with planted faults."""

import numpy as np
import pytest
import torch

from candor.errors import UserError
from candor.hashing import hash64
from candor.rows import Option
from serve import tree
from serve.engine import Request
from serve.options import parse
from serve.scoring import Pruning
from serve.torch_engine import TorchEngine
from serve.tree import window_of
from serve.vocabulary import Vocabulary

EVERYTHING = Pruning(path=0.0, unfinished=0.0, total=0.0)
QUESTIONS = {
    "digits": (Option("1", 0, ("1",)), Option("0", 0, ("0",)), Option("10", 1, ("10",))),
    "nested": (
        Option("A", 0, ("A",)),
        Option("A 1", 1, ("A 1", "AB")),
        Option("1é", 0, ("1é",)),
        Option("1", 0, ("1",)),
    ),
}
LONGEST = 3


@pytest.fixture(scope="module")
def exact_engine(tiny):
    return TorchEngine(tiny, None, dtype="float64", pruning=EVERYTHING)


def listed(engine, text, options):
    """Option probabilities by listing every reply token by token, each scored by a forward pass of its own.

    A reply is listed until its text alone decides: it has ended, or is longer than a space, the
    longest spelling and one more character, not counting a last character that may be unfinished.
    """
    start = engine.tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False
    )
    totals = np.zeros(len(options) + 1)
    level = [((), 1.0)]
    while level:
        ids = torch.tensor([start + list(tokens) for tokens, _ in level])
        with torch.inference_mode():
            logits = torch.cat([engine.model(part).logits[:, -1] for part in ids.split(4000)])
        shares = torch.softmax(logits, dim=1).numpy()
        following = []
        for (tokens, probability), row in zip(level, shares, strict=True):
            for token, share in enumerate(row):
                ended = token in engine.end_ids
                body = [*tokens] if ended else [*tokens, token]
                reply = engine.tokenizer.decode(body)
                if not ended and len(reply.removesuffix("\ufffd")) < LONGEST + 2:
                    following.append(((*tokens, token), probability * share))
                    continue
                found = parse(reply, options)
                totals[-1 if found is None else found] += probability * share
        # lengths differ by one token each round, so a level is one rectangular batch
        level = following
    return totals


@pytest.fixture(scope="module")
def by_listing(exact_engine):
    return {name: listed(exact_engine, "A10", options) for name, options in QUESTIONS.items()}


@pytest.mark.parametrize("question", list(QUESTIONS))
def test_equals_listing_every_reply(exact_engine, by_listing, question):
    (score,) = exact_engine.distributions(["A10"], [QUESTIONS[question]])
    totals = by_listing[question]
    assert totals.sum() == pytest.approx(1, abs=1e-9)
    assert totals.min() > 1e-5  # the case says something about every option
    np.testing.assert_allclose(score.probabilities, totals[:-1], rtol=1e-9)
    assert score.leftover == pytest.approx(totals[-1], abs=1e-9)
    assert score.unexplored == 0


def test_pruned_mass_is_bounded_by_what_is_reported(tiny, exact_engine):
    rough = TorchEngine(tiny, None, dtype="float64", pruning=Pruning(path=1e-4, unfinished=1e-4, total=1e-2))
    for options in QUESTIONS.values():
        (full,), (cut,) = (e.distributions(["A10"], [options]) for e in (exact_engine, rough))
        missing = sum(full.probabilities) - sum(cut.probabilities)
        assert 0 < missing <= cut.unexplored
        assert cut.leftover == pytest.approx(1 - sum(cut.probabilities))


def test_prompts_of_any_length_and_options_together(base, prompts):
    """Padding, other prompts in the group and columns run a few at a time change nothing but rounding."""
    engine = TorchEngine(base, None)
    closed = [p for p in prompts if p.options]
    together = engine.distributions([p.text for p in closed], [p.options for p in closed])
    for prompt, score in zip(closed, together, strict=True):
        (alone,) = engine.distributions([prompt.text], [prompt.options])
        np.testing.assert_allclose(score.probabilities, alone.probabilities, rtol=1e-3, atol=1e-7)
        assert score.leftover == pytest.approx(1 - sum(score.probabilities), abs=1e-9)


def test_columns_run_a_few_at_a_time(exact_engine, by_listing, monkeypatch):
    monkeypatch.setitem(tree._LOGITS, "cpu", exact_engine.vocab_size * 3)
    (score,) = exact_engine.distributions(["A10"], [QUESTIONS["digits"]])
    np.testing.assert_allclose(score.probabilities, by_listing["digits"][:-1], rtol=1e-9)


def test_a_large_vocabulary_does_not_part_prompts_that_fit_together(base, prompts, monkeypatch):
    """One by one they cost twenty times as many passes; Qwen's vocabulary, and the batch of a study on a GPU."""
    engine = TorchEngine(base, None, batch_tokens=16_384)
    passes, forward = [], engine.model.forward
    monkeypatch.setattr(engine.model, "forward", lambda *a, **k: (passes.append(1), forward(*a, **k))[1])
    closed = [p for p in prompts if p.options]

    def needed() -> int:
        passes.clear()
        engine.distributions([p.text for p in closed], [p.options for p in closed])
        return len(passes)

    own = needed()
    engine.vocab_size = 152_064  # the tries are made, so that nothing but the grouping asks for it any more
    assert needed() == own < len(closed)


def test_eager_attention_gives_the_same(base, prompts):
    """It adds a mask to the scores, where the default takes True and False."""
    engine = TorchEngine(base, None)
    (prompt,) = [p for p in prompts if p.prompt_id == "decision/decision0"]
    (default,) = engine.distributions([prompt.text], [prompt.options])
    engine.model.set_attn_implementation("eager")
    (eager,) = engine.distributions([prompt.text], [prompt.options])
    np.testing.assert_allclose(eager.probabilities, default.probabilities, rtol=1e-3, atol=1e-9)


def test_a_prompt_beyond_the_attention_window_is_refused(base, prompts):
    engine = TorchEngine(base, None)
    text = engine.model.config
    assert window_of(text) is None
    text.layer_types, text.sliding_window = ["full_attention", "sliding_attention"], 16
    assert window_of(text) == 16
    with pytest.raises(UserError, match="whose attention reaches back 16"):
        engine.distributions([prompts[-1].text], [prompts[-1].options])


def largest_deviation(engine, options, score, n=6000):
    """How many standard errors the parsed shares of ``n`` sampled replies lie from the exact ones, at most."""
    (replies,) = engine.sample([Request("A10", hash64("A10"), 0, n)], key=5, temperature=1.0, max_tokens=8)
    found = [parse(r.text, options) for r in replies]
    counts = np.array([found.count(k) for k in range(len(options))])
    p = np.array(score.probabilities)
    counts, p = counts[p * n > 5], p[p * n > 5]  # the normal law fails below
    return float(np.max(np.abs(counts / n - p) / np.sqrt(p * (1 - p) / n)))


@pytest.mark.parametrize("question", list(QUESTIONS))
def test_sampling_agrees(tiny, question):
    engine = TorchEngine(tiny, None)
    (score,) = engine.distributions(["A10"], [QUESTIONS[question]])
    assert largest_deviation(engine, QUESTIONS[question], score) < 4


def test_leaving_out_other_tokenisations_is_caught(tiny, monkeypatch):
    """Planted fault: only a token that spells all of what is missing is followed."""
    engine = TorchEngine(tiny, None)
    trie_tokens = Vocabulary.ids_of

    def canonical_only(self, text):
        return [i for i in trie_tokens(self, text) if (text in (b"1", b"0", b"10") and len(text) == 2) or text == b"0"]

    monkeypatch.setattr(Vocabulary, "ids_of", canonical_only)
    (score,) = engine.distributions(["A10"], [QUESTIONS["digits"]])
    assert largest_deviation(engine, QUESTIONS["digits"], score) > 8


def test_counting_a_prefix_of_a_longer_number_is_caught(tiny, monkeypatch):
    """Planted fault: "10" counts as "1" too, as when only the first token is looked at."""
    engine = TorchEngine(tiny, None)
    of = Vocabulary.of.__func__

    def no_boundary(cls, *args, **kwargs):
        vocabulary = of(cls, *args, **kwargs)
        vocabulary.breaks[:] = 1.0
        return vocabulary

    monkeypatch.setattr(Vocabulary, "of", classmethod(no_boundary))
    (score,) = engine.distributions(["A10"], [QUESTIONS["digits"]])
    assert largest_deviation(engine, QUESTIONS["digits"], score) > 8
