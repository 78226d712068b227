"""Let vLLM draw through the sampling core: a plugin over ``GPUModelRunner.sample`` of its second model runner.

    VLLM_PLUGINS=candor_sampling python -m vllm.entrypoints.openai.api_server ...

vLLM keys its noise by (seed, position, token): one seed for a batch gives every prompt the same noise, its
uniforms have 32 bits, and its logits are rounded to bfloat16 before anything reads them. With this plugin a
request that names its random numbers draws as the torch engine does: the same Philox counters, 53-bit
uniforms, log-probabilities from logits summed in float32, no ids without text.

Off by default: installed, it does nothing unless VLLM_PLUGINS names it. On, it takes a step only when every
request of the batch names its random numbers (``extra_args={"candor": [key, stream, draw]}``) and asks for
nothing the core does not do; otherwise vLLM's own sampler runs and the reason is said once. Names and
behaviour of vLLM are those of 0.31.0 (vllm/v1/worker/gpu/model_runner.py, sample/sampler.py).
"""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from candor.errors import UserError
from serve.ops.draw import draw
from serve.ops.philox import signed64, uniforms
from serve.ops.rules import NO_RULES, Rules, make_rules
from serve.ops.sketch import Sketch, lmhead_sketch, sketch_logits
from serve.ops.truncate import truncated_draw

NAME = "candor_sampling"  # of the entry point; what VLLM_PLUGINS must hold
EXTRA = "candor"  # key of SamplingParams.extra_args
_BUILT_IN = 3  # logits processors that vLLM's sampler always has: bias, penalties, bad words
_log = logging.getLogger(__name__)


def register() -> None:
    """What vLLM calls in every process it starts; patches the model runner when VLLM_PLUGINS names this plugin."""
    import vllm.envs as envs

    if NAME not in (envs.VLLM_PLUGINS or ()):
        return
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner
    from vllm.v1.worker.gpu.sample.sampler import Sampler

    patch(GPUModelRunner, Sampler)


def patch(runner: type, sampler: type) -> None:
    """Wrap ``runner.sample`` and ``sampler.add_request``; once, however often vLLM loads its plugins."""
    if getattr(runner, "_candor_patched", False):
        return
    vllm_sample, vllm_add = runner.sample, sampler.add_request  # type: ignore[attr-defined]

    def add_request(self: Any, req_idx: int, sampling_params: Any) -> None:
        vllm_add(self, req_idx, sampling_params)
        _requests_of(self).add(req_idx, sampling_params)

    def sample(self: Any, hidden_states: torch.Tensor, input_batch: Any, grammar_output: Any) -> Any:
        reason = why_not(self, input_batch, grammar_output)
        if reason is None:
            return _sample(self, hidden_states, input_batch)
        _say_once(reason)
        return vllm_sample(self, hidden_states, input_batch, grammar_output)

    sampler.add_request, runner.sample = add_request, sample  # type: ignore[attr-defined]
    runner._candor_patched = True  # type: ignore[attr-defined]


class Requests:
    """What the core needs of each request, by vLLM's slot."""

    def __init__(self, slots: int) -> None:
        self.key, self.stream, self.draw = (np.zeros(slots, dtype=np.int64) for _ in range(3))
        self.problem: list[str] = ["no request was added"] * slots  # empty for requests the core can do

    def add(self, slot: int, params: Any) -> None:
        """Take over a request's identity, or note why it is not ours."""
        self.problem[slot] = request_problem(params)
        if not self.problem[slot]:
            key, stream, first = params.extra_args[EXTRA]
            self.key[slot], self.stream[slot], self.draw[slot] = signed64(key), signed64(stream), first


def request_problem(params: Any) -> str:
    """Why the core cannot draw for a request with these vllm.SamplingParams; empty when it can."""
    identity = (params.extra_args or {}).get(EXTRA)
    if identity is None:
        return f"a request has no extra_args[{EXTRA!r}] = [key, stream, draw]"
    if not (
        isinstance(identity, (list, tuple))
        and len(identity) == 3
        and all(isinstance(n, int) and not isinstance(n, bool) for n in identity)
        and all(0 <= n < 2**bits for n, bits in zip(identity, (64, 64, 32), strict=True))
    ):
        return f"extra_args[{EXTRA!r}] is {identity!r}; it must be [key, stream, draw] of 64, 64 and 32 bits"
    neutral = {"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0, "min_tokens": 0}
    for name, value in neutral.items():
        if getattr(params, name) != value:
            return f"a request sets {name}"
    absent = ("logit_bias", "bad_words", "allowed_token_ids", "logprob_token_ids", "thinking_token_budget")
    for name in (*absent, "structured_outputs"):
        if getattr(params, name, None):
            return f"a request sets {name}"
    if params.logprobs not in (None, 0):
        return f"a request asks for logprobs={params.logprobs} (only that of the drawn token is free)"
    return ""


def why_not(runner: Any, batch: Any, grammar_output: Any) -> str | None:
    """Why vLLM's own sampler must draw this step; None when the core can."""
    sampler = runner.sampler
    checks = {
        "sampling is sharded over ranks": runner.batch_sharder is not None,
        "a grammar constrains the batch": grammar_output is not None,
        "tokens were drafted (speculative decoding)": batch.num_draft_tokens != 0,
        "the batch is empty on this rank": batch.num_reqs == 0,
        "the sampler replays traces": sampler.trace_replay_state is not None,
        "the sampling mask is asked for": sampler.return_sampling_mask,
        "NaN counts are asked for": sampler.compute_nans,
        "custom logits processors are installed": len(sampler.logits_processors) > _BUILT_IN,
        f"logprobs_mode is {sampler.logprobs_mode}": sampler.logprobs_mode != "raw_logprobs",
    }
    for reason, holds in checks.items():
        if holds:
            return reason
    problems = _requests_of(sampler).problem
    return next((str(problems[i]) for i in batch.idx_mapping_np if problems[i]), None) or _model_problem(runner)


def _model_problem(runner: Any) -> str | None:
    """Why the core cannot draw from this model as the torch engine does; looked at once."""
    if not hasattr(runner, "_candor_problem"):
        n_text = runner._candor_text = ids_with_text(runner.model_config.tokenizer)
        problem: str | None = n_text if isinstance(n_text, str) else None
        dtype = runner.model_config.head_dtype
        if problem is None and dtype != torch.float32 and plain_head(runner.model) is None:
            problem = (
                f"the head is more than a product and makes logits in {str(dtype).removeprefix('torch.')} "
                '(--hf-overrides \'{"head_dtype": "float32"}\' makes them in float32)'
            )
        runner._candor_problem = problem
    found: str | None = runner._candor_problem
    return found


def ids_with_text(tokenizer: str) -> int | str:
    """How many ids have text, which are the first ones; or a reason why the core cannot tell them apart.

    The torch engine rules out ids without text, so the law is the same only where they are ruled out here.
    """
    from serve.loading import load_tokenizer, textless

    try:
        loaded = load_tokenizer(Path(tokenizer))
    except UserError as error:
        return f"it is not known which ids have text ({error})"
    without = textless(loaded, len(loaded))
    n = int((~without).nonzero().max()) + 1
    return n if not bool(without[:n].any()) else f"ids without text lie among the first {n}, which have it"


def _requests_of(sampler: Any) -> Requests:
    if not hasattr(sampler, "_candor_requests"):
        sampler._candor_requests = Requests(sampler.sampling_states.max_num_reqs)
    requests: Requests = sampler._candor_requests
    return requests


@dataclass(frozen=True, slots=True)
class Head:
    """A matrix whose product with the hidden states is the logits."""

    weight: torch.Tensor  # [rows, d]
    n_valid: int  # rows beyond are padding


def plain_head(model: Any) -> Head | None:
    """The model's head where logits are nothing but its product; None where something else is done to them."""
    head, processor = getattr(model, "lm_head", None), getattr(model, "logits_processor", None)
    if head is None or processor is None or getattr(head, "tp_size", 1) != 1:
        return None
    from vllm.model_executor.layers.linear import UnquantizedLinearMethod
    from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod

    if not isinstance(getattr(head, "quant_method", None), (UnquantizedLinearMethod, UnquantizedEmbeddingMethod)):
        return None
    if processor.soft_cap is not None or processor.scale != 1.0 or processor.logits_as_input:
        return None
    if getattr(head, "bias", None) is not None or type(processor).__name__ != "LogitsProcessor":  # LoRA wraps it
        return None
    return Head(head.weight, int(processor.org_vocab_size))


def _sample(runner: Any, hidden_states: torch.Tensor, batch: Any) -> Any:
    """One step through the core, in vLLM's own types.

    Without filters nothing here makes the host wait for the device. With them it waits: to learn which rows have
    none (plain torch), or whether any nucleus is wider than the tiles looked at (the kernels, from hidden states).
    """
    from vllm.v1.outputs import LogprobsTensors
    from vllm.v1.worker.gpu.input_batch import get_num_sampled_and_rejected
    from vllm.v1.worker.gpu.sample.output import SamplerOutput

    sampler = runner.sampler
    slots, slots_np = batch.expanded_idx_mapping, batch.idx_mapping_np
    states = sampler.sampling_states
    temperature = states.temperature.np[slots_np]
    with_logprobs = bool((states.num_logprobs[slots_np] >= 0).any())
    inv_temp = torch.zeros_like(states.temperature.gpu[slots])
    scaled = states.temperature.gpu[slots]
    inv_temp = torch.where(scaled > 0, 1.0 / scaled, inv_temp)
    rows = hidden_states[batch.logits_indices]
    raw = with_logprobs and not bool(np.isin(temperature, (0.0, 1.0)).all())
    sketch = _sketch(runner.model, rows, inv_temp, runner._candor_text, raw=raw)
    numbers = _numbers(runner, batch)
    top_k, top_p = states.get_top_k_top_p(slots, slots_np)
    min_p = states.min_p.gpu[slots] if (states.min_p.np[slots_np] != 0).any() else None
    if top_k is None and top_p is None and min_p is None:
        drawn = draw(sketch, numbers)
        tokens, logprobs = drawn.tokens, drawn.raw_logprobs if raw else drawn.logprobs
    else:
        kept = truncated_draw(
            sketch,
            numbers,
            top_k=top_k,
            top_p=1.0 if top_p is None else top_p,
            min_p=0.0 if min_p is None else min_p,
            order="vllm",
        )
        tokens, logprobs = kept.tokens, kept.raw_logprobs if raw else kept.logprobs
    n_sampled, n_rejected = get_num_sampled_and_rejected(
        batch.seq_lens.new_ones(batch.num_reqs),
        batch.seq_lens,
        batch.cu_num_logits,
        batch.idx_mapping,
        sampler.req_states.prefill_len.gpu,
    )
    tensors = None
    if with_logprobs:
        assert logprobs is not None
        unknown = torch.full_like(tokens[:, 0], -1)  # a rank needs another pass over all logits
        tensors = LogprobsTensors(tokens, logprobs.float(), unknown)
    output = SamplerOutput(
        sampled_token_ids=tokens,
        logprobs_tensors=tensors,
        num_nans=None,
        num_sampled=n_sampled,
        num_rejected=n_rejected,
    )
    return output, n_sampled, n_rejected


def _sketch(model: Any, hidden: torch.Tensor, inv_temp: torch.Tensor, n_text: int, *, raw: bool) -> Sketch:
    """From the head where it is a plain product, else from the model's logits; the first ``n_text`` ids have text."""
    head = plain_head(model)
    if head is None:
        logits = model.compute_logits(hidden).contiguous()
        return sketch_logits(logits, inv_temp, rules=_rules(logits, logits.shape[1], n_text), raw=raw, check=False)
    rules = _rules(hidden, head.weight.shape[0], min(n_text, head.n_valid))
    return lmhead_sketch(hidden, head.weight.to(hidden.dtype), inv_temp, rules=rules, raw=raw, check=False)


def _rules(rows: torch.Tensor, vocab: int, n_valid: int) -> Rules:
    return make_rules(len(rows), vocab, rows.device, n_valid=n_valid) if n_valid < vocab else NO_RULES


def _numbers(runner: Any, batch: Any) -> torch.Tensor:
    """Uniforms [rows, 1] addressed as in the torch engine: by key, stream, draw and place in the reply."""
    requests, slots = _requests_of(runner.sampler), batch.idx_mapping_np
    device = batch.positions.device
    table = np.stack([requests.key[slots], requests.stream[slots], requests.draw[slots]])
    key, stream, first = torch.from_numpy(table).to(device, non_blocking=True)
    prompt = runner.req_states.prompt_len.gpu[batch.expanded_idx_mapping].long()
    position = batch.positions[batch.logits_indices].long() + 1 - prompt
    # A prompt read in pieces is sampled at every piece, and vLLM throws those tokens away.
    numbers, _ = uniforms(key, stream, first, position.clamp(min=0))
    return numbers[:, None]


_said: set[str] = set()


def _say_once(reason: str) -> None:
    if reason not in _said:
        _said.add(reason)
        _log.warning("candor_sampling: vLLM's own sampler draws, because %s.", reason)
