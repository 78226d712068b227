"""Sampling: greedy equals Hugging Face's, log-probabilities equal teacher forcing, draws keep to themselves."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from candor.errors import UserError
from candor.hashing import hash64
from candor.rows import Option
from serve.engine import Request
from serve.loading import encode_prompt
from serve.prefill import Prefilled
from serve.scoring import Pruning
from serve.slots import Slots
from serve.torch_engine import TorchEngine

KEY = hash64("sample", 1, "v")


def requests_of(prompts, n, first_draw=0):
    return [Request(p.text, hash64("prompt", p.prompt_id), first_draw, n) for p in prompts]


@pytest.fixture(scope="module")
def engine(base):
    return TorchEngine(base, None)


@pytest.fixture(scope="module")
def replies(engine, prompts):
    return engine.sample(requests_of(prompts, 6), key=KEY, temperature=1.0, max_tokens=24)


def test_greedy_equals_hugging_face_generate(engine, base, prompts):
    model = AutoModelForCausalLM.from_pretrained(base)
    model.generation_config.max_length = None
    no_text = engine._banned.nonzero().flatten().tolist()
    ours = engine.sample(requests_of(prompts, 1), key=KEY, temperature=0.0, max_tokens=12)
    kinds = set()
    for prompt, (reply,) in zip(prompts, ours, strict=True):
        ids = torch.tensor([encode_prompt(engine.tokenizer, prompt.text)])
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12, suppress_tokens=no_text
        )[0, ids.shape[1] :]
        ended = int(out[-1]) in engine.end_ids
        assert reply.n_tokens == len(out)
        assert reply.text == engine.tokenizer.decode(out[:-1] if ended else out)
        assert reply.finish_reason == ("stop" if ended else "length")
        kinds.add(reply.finish_reason)
    assert kinds


def test_replies_end_both_ways_and_vary(replies):
    flat = [r for group in replies for r in group]
    assert {r.finish_reason for r in flat} == {"stop", "length"}
    assert len({r.text for r in flat}) > len(flat) // 2
    assert all(r.n_tokens == 24 for r in flat if r.finish_reason == "length")


def test_logprob_is_that_of_the_whole_reply(base, prompts):
    """Teacher forcing over the tokens drawn, the end included, ids without text ruled out."""
    engine = TorchEngine(base, None)
    drawn = []
    original = engine._replies
    engine._replies = lambda d: (drawn.append(d), original(d))[1]
    made = engine.sample(requests_of(prompts[:3], 2), key=KEY, temperature=0.7, max_tokens=10)
    flat = [r for group in made for r in group]
    seen = 0
    order = sorted(range(3), key=lambda i: len(encode_prompt(engine.tokenizer, prompts[i].text)))
    for row in range(6):
        prompt, reply = prompts[order[row // 2]], made[order[row // 2]][row % 2]
        tokens = drawn[0].tokens[row, : reply.n_tokens]
        start = encode_prompt(engine.tokenizer, prompt.text)
        logits = engine.model(torch.tensor([start + tokens.tolist()])).logits[0, len(start) - 1 : -1].double()
        logits[:, engine._banned] = float("-inf")
        exact = torch.log_softmax(logits, dim=1).gather(1, tokens[:, None]).sum()
        assert reply.logprob == pytest.approx(float(exact), abs=1e-4)
        seen += 1
    assert seen == len(flat)


def test_the_same_call_gives_the_same_bits(engine, prompts, replies):
    again = engine.sample(requests_of(prompts, 6), key=KEY, temperature=1.0, max_tokens=24)
    assert again == replies


@pytest.mark.parametrize("change", ["fewer draws", "later draws", "alone", "backwards", "small groups"])
def test_draws_do_not_depend_on_what_else_is_asked(engine, base, prompts, replies, change):
    """Rounding may flip a token where the batch differs (toolchain.md 7); more than one in a hundred may not."""
    options = {"key": KEY, "temperature": 1.0, "max_tokens": 24}
    if change == "fewer draws":
        other, wanted = engine.sample(requests_of(prompts, 2), **options), [r[:2] for r in replies]
    elif change == "later draws":
        other, wanted = engine.sample(requests_of(prompts, 3, first_draw=3), **options), [r[3:] for r in replies]
    elif change == "alone":
        other, wanted = [engine.sample(requests_of([p], 6), **options)[0] for p in prompts[:6]], replies[:6]
    elif change == "backwards":
        other, wanted = engine.sample(requests_of(prompts[::-1], 6), **options)[::-1], replies
    else:
        small = TorchEngine(base, None, batch_tokens=400)  # splits the draws of a prompt over groups too
        other, wanted = small.sample(requests_of(prompts[:8], 6), **options), replies[:8]
    pairs = [(a.text, b.text) for x, y in zip(other, wanted, strict=True) for a, b in zip(x, y, strict=True)]
    assert sum(a != b for a, b in pairs) <= 1


def test_key_stream_and_draw_each_change_the_reply(engine, prompts, replies):
    texts = [r.text for r in replies[0]]
    assert len(set(texts)) == len(texts)
    other_key = engine.sample(requests_of(prompts[:1], 6), key=KEY + 1, temperature=1.0, max_tokens=24)[0]
    stream = [Request(prompts[0].text, 1, 0, 6)]
    other_stream = engine.sample(stream, key=KEY, temperature=1.0, max_tokens=24)[0]
    assert not {r.text for r in other_key} & set(texts)
    assert not {r.text for r in other_stream} & set(texts)


def test_ids_without_text_are_never_drawn(engine):
    assert int(engine._banned.sum()) == 7


def test_a_prompt_too_long_for_the_context_is_named(engine):
    with pytest.raises(UserError, match=r"'word word .*does not fit the model's context of 256"):
        engine.sample([Request("word " * 400, 1, 0, 1)], key=KEY, temperature=1.0, max_tokens=8)


def test_bfloat16_keeps_logits_in_float32(base, prompts):
    engine = TorchEngine(base, None, dtype="bfloat16")
    output = engine.model(torch.tensor([encode_prompt(engine.tokenizer, prompts[0].text)]))
    assert output.logits.dtype == torch.float32
    assert engine.model.model.embed_tokens.weight.dtype == torch.bfloat16
    assert engine.sample(requests_of(prompts[:2], 2), key=KEY, temperature=1.0, max_tokens=4)[1][1].n_tokens > 0


def short_of_memory(monkeypatch, engine, most):
    """The model fails as torch's CPU allocator does, for batches of more than ``most`` rows."""
    forward = engine.model.forward

    def failing(*args, input_ids, **kwargs):
        if len(input_ids) > most:
            torch.empty(1 << 60, dtype=torch.uint8)  # a real failure of the real allocator
        return forward(*args, input_ids=input_ids, **kwargs)

    monkeypatch.setattr(engine.model, "forward", failing)


def test_out_of_memory_halves_the_batch_and_says_so(base, prompts, replies, monkeypatch, capsys):
    engine = TorchEngine(base, None)
    closed = [p for p in prompts if p.options]
    exact = engine.distributions([p.text for p in closed], [p.options for p in closed])
    short_of_memory(monkeypatch, engine, most=20)
    found = engine.sample(requests_of(prompts, 6), key=KEY, temperature=1.0, max_tokens=24)
    same = [a.text == b.text for x, y in zip(found, replies, strict=True) for a, b in zip(x, y, strict=True)]
    assert sum(same) / len(same) > 0.98  # other batches, other rounding
    assert "out of memory: batches are halved to batch_tokens" in capsys.readouterr().err
    engine.batch_tokens = 131_072
    short_of_memory(monkeypatch, engine, most=4)
    scores = engine.distributions([p.text for p in closed], [p.options for p in closed])
    for a, b in zip(scores, exact, strict=True):
        assert a.probabilities == pytest.approx(b.probabilities, abs=1e-6)


def test_too_little_memory_for_one_reply_is_told(base, prompts, monkeypatch):
    engine = TorchEngine(base, None)
    short_of_memory(monkeypatch, engine, most=0)
    with pytest.raises(UserError, match="memory does not suffice for a single reply"):
        engine.sample(requests_of(prompts[:2], 2), key=KEY, temperature=1.0, max_tokens=4)
    with pytest.raises(UserError, match="memory does not suffice to score"):
        engine.distributions([prompts[-1].text], [prompts[-1].options])


COLOURS = (Option("red", 0.0, ("red", "Red")), Option("green", 1.0, ("green", "Green")))


@pytest.mark.parametrize("batch_tokens", [131_072, 400])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_reading_prompts_once_gives_the_same_replies_and_scores(base, prompts, batch_tokens, temperature):
    """Also where the requests do not fit one batch and are read twice after all."""
    engine = TorchEngine(base, None, batch_tokens=batch_tokens)
    asked = requests_of(prompts[:8], 2)
    how = {"key": KEY, "temperature": temperature, "max_tokens": 12}
    replies, scores = engine.sample_and_score(asked, [COLOURS] * 8, **how)
    assert replies == engine.sample(asked, **how)
    apart = engine.distributions([r.text for r in asked], [COLOURS] * 8)
    for once, twice in zip(scores, apart, strict=True):
        assert once.probabilities == pytest.approx(twice.probabilities, rel=1e-4, abs=1e-9)
        assert once.leftover == pytest.approx(twice.leftover, abs=1e-6)


def test_a_reply_does_not_see_the_answers_that_were_scored(base, prompts, monkeypatch):
    """The columns of the tried answers stay in the cache; a slot that took them too would change the replies."""
    engine = TorchEngine(base, None, pruning=Pruning(path=0.0, total=0.0))  # every answer is tried to its end
    asked = requests_of(prompts[:4], 1)
    how = {"key": KEY, "temperature": 0.0, "max_tokens": 12}
    right = engine.sample(asked, **how)
    assert engine.sample_and_score(asked, [COLOURS] * 4, **how)[0] == right
    place = Slots.place

    def place_all(self, where, start, prompts):
        """Planted: whatever lies in the cache is taken for the prompt."""
        more = 8
        assert start.cache.get_seq_length() >= start.attend.shape[1] + more
        attend = torch.nn.functional.pad(start.attend, (0, more), value=True)
        place(self, where, Prefilled(start.cache, start.logits, attend, start.lengths + more), prompts)

    monkeypatch.setattr(Slots, "place", place_all)
    assert engine.sample_and_score(asked, [COLOURS] * 4, **how)[0] != right
