"""What the sampling core is held against: samplers as others write them, from their mathematics, plainly labelled.

``vllm_runner`` moves the bytes that the second model runner of vLLM moves (logits in bfloat16, a copy in float32, the
temperature, one reading with Gumbel noise per token), with torch's own operations: a stand-in, not vLLM's kernels.
``fused_gumbel`` is our own version of the published fused Gumbel-max sampler (FlashSampling, arXiv 2603.15854), the
best of several block sizes; its authors' figures belong beside it. FlashInfer is itself where it is installed.
"""

import importlib.util
from collections.abc import Callable
from typing import Any

import torch

Sampler = Callable[..., torch.Tensor]


def softmax_multinomial(logits: torch.Tensor, n: int = 1, temperature: float = 1.0) -> torch.Tensor:
    """As in Hugging Face; with many draws, the honest peer."""
    return torch.multinomial((logits / temperature).softmax(dim=1), n, replacement=n > 1)


def exponential_race(logits: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """As in vLLM's first model runner: probabilities over exponential noise, the largest wins."""
    shares = (logits.float() / temperature).softmax(dim=1)
    return shares.div_(torch.empty_like(shares).exponential_()).argmax(dim=1)


def gumbel_max(logits: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """Logits plus Gumbel noise, the largest wins."""
    noise = torch.empty_like(logits, dtype=torch.float32).exponential_().log_()
    return (logits.float() / temperature - noise).argmax(dim=1)


def sorted_top_p(logits: torch.Tensor, top_k: int, top_p: float) -> torch.Tensor:
    """Top-k and top-p by sorting every row, as in Hugging Face."""
    ordered, ids = logits.sort(dim=1, descending=True)
    ordered[:, top_k:] = float("-inf")
    shares = ordered.softmax(dim=1)
    shares.masked_fill_(shares.cumsum(dim=1) - shares >= top_p, 0.0)
    return ids.gather(1, torch.multinomial(shares, 1))


def softmax_multinomial_step(logits: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """A decode step of an engine on torch.multinomial: a token a row and its log-probability at temperature 1."""
    tokens = softmax_multinomial(logits, 1, temperature or 1.0) if temperature else logits.argmax(1, keepdim=True)
    return tokens[:, 0], torch.log_softmax(logits, dim=1).gather(1, tokens)[:, 0].double()


def vllm_runner(hidden: torch.Tensor, weight: torch.Tensor, temperature: float = 1.0) -> torch.Tensor:
    """The head and the sampler of vLLM's second model runner, byte for byte."""
    return gumbel_max((hidden @ weight.T).float().div_(temperature))


def head_exponential(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The head and the sampler of vLLM's first model runner."""
    return exponential_race(hidden @ weight.T)


def compiled(sampler: Sampler) -> Sampler:
    """By torch.compile, shapes fixed."""
    return torch.compile(sampler, dynamic=False)


def flashinfer() -> Any | None:
    """FlashInfer's sampling functions, where it is installed."""
    if importlib.util.find_spec("flashinfer") is None:
        return None
    from flashinfer import sampling

    return sampling


def vllm_gumbel() -> Sampler | None:
    """The sampler of vLLM's second model runner (0.31's signature), where vLLM is installed."""
    if importlib.util.find_spec("vllm") is None:
        return None
    from vllm.v1.worker.gpu.sample.gumbel import gumbel_sample

    def sample(logits: torch.Tensor) -> torch.Tensor:
        rows = torch.arange(len(logits), device=logits.device)
        drawn: torch.Tensor = gumbel_sample(
            logits, rows.int(), torch.ones_like(rows, dtype=torch.float32), rows, rows,
            apply_temperature=True, is_drafting=False,
        )  # fmt: skip
        return drawn

    return sample


def vllm_top_k_top_p() -> Sampler | None:
    """The filters of vLLM, and a race; with a copy of the logits, since it changes them in place."""
    if importlib.util.find_spec("vllm") is None:
        return None
    from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p

    def sample(logits: torch.Tensor, top_k: int | None, top_p: float) -> torch.Tensor:
        k = None if top_k is None else torch.full((len(logits),), top_k, dtype=torch.int32, device=logits.device)
        p = torch.full((len(logits),), top_p, device=logits.device)
        return exponential_race(apply_top_k_top_p(logits.clone(), k, p))

    return sample


def head_flashinfer(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """CuBLAS and then FlashInfer's sampler from logits."""
    sampling = flashinfer()
    assert sampling is not None
    drawn: torch.Tensor = sampling.sampling_from_logits((hidden @ weight.T).float())
    return drawn


def fused_gumbel(rows: int, tile: int, four: bool) -> Sampler:
    """The fused Gumbel-max sampler with these blocks and this use of Philox; all are tried, the best counts."""
    from benchmarks.fused_gumbel import sample

    return lambda hidden, weight: sample(hidden, weight, block_rows=rows, tile=tile, four=four)


FUSED = tuple(
    (rows, tile, four) for rows, tile in ((16, 128), (64, 128), (128, 128), (64, 256)) for four in (True, False)
)
