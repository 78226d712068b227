"""Slots: replies that take the places of ended ones are those they would be alone, in every kind of attention."""

import gc
import weakref

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Llama4ForCausalLM,
    Llama4TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from candor.hashing import hash64
from serve import decoding, slots, torch_engine
from serve.config import EngineConfig
from serve.engine import Request
from serve.loading import encode_prompt, load_tokenizer
from serve.slots import Slots
from serve.torch_engine import TorchEngine

HOW = {"key": hash64("sample", 1, "v"), "temperature": 1.0, "max_tokens": 24}
N = 6  # draws of each prompt


def requests_of(prompts):
    return [Request(p.text, hash64("prompt", p.prompt_id), 0, N) for p in prompts]


def texts_of(replies):
    return [r.text for made in replies for r in made]


@pytest.fixture
def seen(monkeypatch):
    """What happens: how many prompts are read together, and of how many slots and columns each step is."""
    seen = {"read": [], "steps": []}
    prefill, read = torch_engine.prefill, Slots._read

    def reading(model, prompts, **how):
        seen["read"].append(len(prompts))
        return prefill(model, prompts, **how)

    def stepping(self, tokens):
        seen["steps"].append((len(self), self.width))
        return read(self, tokens)

    monkeypatch.setattr(torch_engine, "prefill", reading)
    monkeypatch.setattr(Slots, "_read", stepping)
    return seen


@pytest.fixture(scope="module")
def expected(base, prompts):
    return TorchEngine(base, None).sample(requests_of(prompts), **HOW)


def test_slots_are_filled_anew_and_the_replies_stay_the_same(base, prompts, seen, expected):
    """Ten slots for 72 replies. Rounding may flip a token where the batch differs; one in a hundred may."""
    asked = requests_of(prompts[:12])
    widest = max(len(encode_prompt(load_tokenizer(base), r.text)) for r in asked) + HOW["max_tokens"]
    engine = TorchEngine(base, None, batch_tokens=10 * widest, refill=True)
    found = engine.sample(asked, **HOW)
    assert sum(a != b for a, b in zip(texts_of(found), texts_of(expected[:12]), strict=True)) <= 1
    assert sum(seen["read"]) == len(asked) and len(seen["read"]) > 3, "each prompt is read once, when its turn comes"
    n_slots = [n for n, _ in seen["steps"]]
    assert n_slots[0] == 10 and n_slots == sorted(n_slots, reverse=True)
    assert sum(r.n_tokens for made in found for r in made) / sum(n_slots) > 0.75, "most slots were at work"
    assert engine.sample(asked, **HOW) == found, "the same call gives the same bits"


@pytest.mark.parametrize("fault", ["columns", "numbers"])
def test_what_an_earlier_reply_left_in_a_slot_would_be_caught(base, prompts, expected, monkeypatch, fault):
    """Planted: a slot that takes a column of the earlier reply for its own, or its random numbers."""
    place, made = Slots.place, []

    def stale(self, where, start, chosen):
        place(self, where, start, chosen)
        self.end[where] += self.width > 0  # none before

    def stale_numbers(rows, *rest, own=decoding.random_numbers):
        made.append(own(rows, *rest))
        return made[0][: len(rows)]

    if fault == "columns":
        monkeypatch.setattr(Slots, "place", stale)
    else:
        monkeypatch.setattr(decoding, "random_numbers", stale_numbers)
    found = TorchEngine(base, None, batch_tokens=700, refill=True).sample(requests_of(prompts[:8]), **HOW)
    assert sum(a != b for a, b in zip(texts_of(found), texts_of(expected[:8]), strict=True)) > 5


def test_a_finished_batch_is_freed_at_once(base, prompts, monkeypatch):
    """Not when Python next looks for cycles: on a GPU a second batch would find the memory of the first taken."""
    made, init = [], Slots.__init__

    def watched(self, *args, **how):
        init(self, *args, **how)
        made.append(weakref.ref(self))
        made.append(weakref.ref(self.cache))

    monkeypatch.setattr(Slots, "__init__", watched)
    engine = TorchEngine(base, None, batch_tokens=700)
    gc.collect()
    gc.disable()
    try:
        engine.sample(requests_of(prompts[:8]), **HOW)
        assert len(made) > 4 and all(ref() is None for ref in made)
    finally:
        gc.enable()


def test_what_was_read_for_the_slots_is_freed_once_it_is_in_them(base, prompts, monkeypatch):
    """Prompts' keys and values are not held a second time while their replies are made."""
    read, alive = [], []
    prefill, step = torch_engine.prefill, Slots._read

    def reading(*args, **how):
        made = prefill(*args, **how)
        read.append(weakref.ref(made.cache))
        return made

    def stepping(self, tokens):
        alive.append(sum(ref() is not None for ref in read))
        return step(self, tokens)

    monkeypatch.setattr(torch_engine, "prefill", reading)
    monkeypatch.setattr(Slots, "_read", stepping)
    TorchEngine(base, None).sample([Request(p.text, i, 0, 1) for i, p in enumerate(prompts[:8])], **HOW)
    assert alive and max(alive) == 0


def test_columns_beyond_what_is_needed_change_nothing(base, prompts, seen, expected, monkeypatch):
    """A GPU looks at a multiple of 128 columns, so that few graphs are recorded."""
    made = Slots.__init__

    def wide(self, *args, **how):
        made(self, *args, **how)
        self._every = 32

    monkeypatch.setattr(Slots, "__init__", wide)
    found = TorchEngine(base, None).sample(requests_of(prompts), **HOW)
    assert sum(a != b for a, b in zip(texts_of(found), texts_of(expected), strict=True)) <= 1
    assert len({width for _, width in seen["steps"]}) <= 3


SMALL = {
    "hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 2,
    "intermediate_size": 96, "max_position_embeddings": 256, "initializer_range": 0.25,
}  # fmt: skip
WINDOW = 20  # columns; the prompts alone are about as long


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda n: LlamaForCausalLM(LlamaConfig(vocab_size=n, **SMALL)), id="no-kinds"),
        pytest.param(
            lambda n: MistralForCausalLM(MistralConfig(vocab_size=n, sliding_window=WINDOW, **SMALL)), id="all-slide"
        ),
        pytest.param(
            lambda n: Qwen2ForCausalLM(
                Qwen2Config(
                    vocab_size=n, use_sliding_window=True, sliding_window=WINDOW,
                    layer_types=["full_attention", "sliding_attention"], **SMALL,
                )
            ),
            id="some-slide",
        ),
        pytest.param(
            lambda n: Llama4ForCausalLM(
                Llama4TextConfig(
                    vocab_size=n, attention_chunk_size=WINDOW, layer_types=["chunked_attention", "full_attention"],
                    num_local_experts=2, intermediate_size_mlp=96, head_dim=32, bos_token_id=None, eos_token_id=None,
                    pad_token_id=None, **SMALL,
                )
            ),
            id="some-in-chunks",
        ),
    ],
)  # fmt: skip
def test_greedy_equals_hugging_face_in_every_kind_of_attention(base, prompts, tmp_path, make, attention):
    """Refilled slots, windows shorter than the prompts."""
    tokenizer = load_tokenizer(base)
    torch.manual_seed(0)
    make(len(tokenizer)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    engine = TorchEngine(tmp_path, None, batch_tokens=350, refill=True)
    engine.model.set_attn_implementation(attention)
    asked = [Request(p.text, i, 0, 1) for i, p in enumerate(prompts[:12])]
    ours = engine.sample(asked, key=1, temperature=0.0, max_tokens=12)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    no_text = engine._banned.nonzero().flatten().tolist() or None
    for request, (reply,) in zip(asked, ours, strict=True):
        ids = torch.tensor([encode_prompt(tokenizer, request.text)])
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12, suppress_tokens=no_text,
            eos_token_id=engine.end_ids,
        )[0, ids.shape[1] :]  # fmt: skip
        ended = int(out[-1]) in engine.end_ids
        assert reply.text == tokenizer.decode(out[:-1] if ended else out)


@pytest.mark.parametrize("where", [{"device": "cpu"}, {"device": "cuda", "name": "vllm"}])
def test_graphs_are_for_the_torch_engine_on_a_gpu(where):
    with pytest.raises(ValueError, match="cuda_graphs: true goes with name: torch and a CUDA device"):
        EngineConfig(cuda_graphs=True, **where)


@pytest.mark.gpu
def test_recorded_steps_are_the_steps(base, prompts, monkeypatch):
    """A CUDA graph's replies and log-probabilities beside those of the step run as it is."""
    engine = TorchEngine(base, None, device="cuda", batch_tokens=2048, cuda_graphs=True)
    widths, record = [], slots._Graphs._record

    def recording(self, read, width):
        record(self, read, width)
        assert self.record
        widths.append(width)

    monkeypatch.setattr(slots._Graphs, "_record", recording)
    replayed = engine.sample(requests_of(prompts), **HOW)
    assert widths
    eager = TorchEngine(base, None, device="cuda", batch_tokens=2048).sample(requests_of(prompts), **HOW)
    assert sum(a != b for a, b in zip(texts_of(replayed), texts_of(eager), strict=True)) <= 1
    for one, other in zip(replayed, eager, strict=True):
        for a, b in zip(one, other, strict=True):
            assert a.text != b.text or a.logprob == pytest.approx(b.logprob, abs=1e-3)


@pytest.mark.gpu
def test_a_step_that_cannot_be_recorded_is_run_as_it_is(base, prompts, capsys):
    """One that looks at a number on the host; what torch does afterwards is on the stream it was on."""
    plain = TorchEngine(base, None, device="cuda", batch_tokens=2048).sample(requests_of(prompts), **HOW)
    engine = TorchEngine(base, None, device="cuda", batch_tokens=2048, cuda_graphs=True)
    engine.model.model.layers[0].register_forward_hook(lambda module, given, made: float(given[0].sum()) and None)
    before = torch.cuda.current_stream()
    found = engine.sample(requests_of(prompts), **HOW)
    assert "cannot be a CUDA graph" in capsys.readouterr().err
    assert torch.cuda.current_stream() == before
    assert sum(a != b for a, b in zip(texts_of(found), texts_of(plain), strict=True)) <= 1


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_second_gpu_records_its_own_steps(base, prompts):
    first, second = (
        TorchEngine(base, None, device=device, batch_tokens=2048, cuda_graphs=True).sample(requests_of(prompts), **HOW)
        for device in ("cuda:0", "cuda:1")
    )
    assert sum(a != b for a, b in zip(texts_of(first), texts_of(second), strict=True)) <= 1
