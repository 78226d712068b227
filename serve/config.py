"""What ``serve.sample`` is told: which variant, which prompts, how each format is asked, on what engine."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from candor.config import plain
from serve.endpoint import Endpoint


@dataclass(frozen=True, kw_only=True)
class Ask:
    """How some prompts are asked: those of one format, narrowed to a battery or to ids of a kind."""

    format: str  # candor.rows.Prompt.format
    battery: str | None = None  # only this battery's prompts; null: every battery's
    only: tuple[str, ...] = ()  # only prompts whose id matches one of these, e.g. "numerical/*/misaligned-high"
    mode: Literal["exact", "sampled"]  # exact: the whole answer distribution, at temperature 1
    n: int = 1  # draws per prompt (sampled)
    temperature: float = 1.0  # of the draws (sampled); 0 takes the most probable token
    max_tokens: int = 64  # a reply is cut there (sampled)

    def __post_init__(self) -> None:
        """Refuse numbers that mean nothing."""
        if self.n < 1 or self.max_tokens < 1 or self.temperature < 0:
            raise ValueError(f"n {self.n}, max_tokens {self.max_tokens} or temperature {self.temperature} is too small")
        if self.mode == "exact" and (self.n, self.temperature, self.max_tokens) != (1, 1.0, 64):
            raise ValueError("mode exact gives the distribution at temperature 1; leave n, temperature, max_tokens out")
        if self.temperature == 0 and self.n > 1:
            raise ValueError(f"temperature 0 gives the same reply {self.n} times; set n: 1")


LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # what vLLM makes room for


@dataclass(frozen=True, kw_only=True)
class VllmConfig:
    """What only vLLM has."""

    adapters: Literal["auto", "merged", "lora"] = "auto"  # auto: merged for much work in float32 (merge_from)
    merge_from: int = 16  # rows that are worth merging the adapter into the weights first (auto); measured on a CPU
    max_lora_rank: int = 64  # of adapters served unmerged; one of LORA_RANKS
    tensor_parallel: int = 1  # GPUs that share one model
    memory_share: float = 0.9  # of a GPU's memory
    cache_gb: float = 1.0  # key-value cache on a CPU
    context: int | None = None  # tokens of prompt and reply together; null: what the model takes
    max_sequences: int = 256  # replies in the making at a time
    keep_open: int = 2  # bases that stay loaded in one process, such as the subject's and the judge's
    eager: bool = True  # false: CUDA graphs and compilation, which take minutes to start with

    def __post_init__(self) -> None:
        """Refuse sizes that mean nothing."""
        sizes = [self.merge_from, self.max_lora_rank, self.tensor_parallel, self.max_sequences, self.keep_open]
        sizes.append(self.context or 1)
        if min(sizes) < 1 or not 0 < self.memory_share <= 1 or self.cache_gb <= 0:
            raise ValueError("sizes must be 1 or more, memory_share above 0 and at most 1, cache_gb above 0")
        if self.max_lora_rank not in LORA_RANKS:
            raise ValueError(f"max_lora_rank is {self.max_lora_rank}; vLLM takes {', '.join(map(str, LORA_RANKS))}")


@dataclass(frozen=True, kw_only=True)
class ApiConfig:
    """A hosted model behind an OpenAI-compatible endpoint."""

    model: str  # as the endpoint calls it
    endpoint: Endpoint  # endpoint.top_logprobs: 0 where it gives none; closed questions are sampled then
    draws: int = 100  # per closed question that has to be sampled

    def __post_init__(self) -> None:
        """Refuse counts below one."""
        if self.draws < 1:
            raise ValueError(f"draws is {self.draws}; it must be 1 or more")


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """What does the work."""

    name: Literal["torch", "vllm", "api"] = "torch"  # see serve/registry.py
    device: str = "cpu"  # or "cuda", "cuda:1"
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"  # of the weights; logits are never below float32
    unit_prompts: int = 64  # prompts per unit of work: what a kill can cost, and what one batch is composed of
    batch_tokens: int = 131_072  # torch: rows x columns of the key-value cache at a time; halved when memory runs out
    cuda_graphs: bool = False  # torch on a GPU: replay the decode step; written without a GPU, so off (serve/slots.py)
    threads: int | None = None  # CPU threads; null leaves the library's choice
    attest_tolerance: float | None = None  # nats; null: what serve/attest.py states for the dtype
    vllm: VllmConfig | None = None
    api: ApiConfig | None = None

    def __post_init__(self) -> None:
        """Refuse sizes below one, and sections of engines that are not in use."""
        if min(self.unit_prompts, self.batch_tokens, 1 if self.threads is None else self.threads) < 1:
            raise ValueError("unit_prompts, batch_tokens and threads must be 1 or more")
        if (self.name == "api") != (self.api is not None):
            raise ValueError("the section api (model, endpoint) goes with name: api, and with no other engine")
        if self.cuda_graphs and (self.name != "torch" or not self.device.startswith("cuda")):
            raise ValueError("cuda_graphs: true goes with name: torch and a CUDA device")
        if self.vllm is not None and self.name != "vllm":
            raise ValueError("the section vllm goes with name: vllm")

    def identity(self) -> dict[str, Any]:
        """The settings that can move a bit of an answer; the only place that says which do not.

        Not what people are told to change when memory runs out or a proof fails: what was finished is kept then.
        """
        if self.api is not None:
            asked = {"draws": self.api.draws, "top_logprobs": self.api.endpoint.top_logprobs}
            return {"name": self.name, "url": self.api.endpoint.url, "model": self.api.model, **asked}
        common = {"name": self.name, "device": self.device, "dtype": self.dtype, "unit_prompts": self.unit_prompts}
        if self.name == "torch":
            return {**common, "batch_tokens": self.batch_tokens}
        free = ("memory_share", "cache_gb", "context", "keep_open")  # how much memory is taken, and for how long
        return common | {k: v for k, v in plain(self.vllm or VllmConfig()).items() if k not in free}


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """One variant, and what it is asked."""

    base: Path | None = None  # folder of the base model; none for a hosted one (engine api)
    adapter: Path | None = None  # folder of a PEFT adapter on it
    variant: str  # the variant's readable name; it keys the random numbers
    prompts: Path  # parquet of candor.rows.Prompt
    ask: tuple[Ask, ...]  # formats not named here are not asked
    output_dir: Path  # samples.parquet, distributions.parquet and manifest.json go there
    study_seed: int  # keys the random numbers of the whole study
    engine: EngineConfig = field(default_factory=EngineConfig)

    def __post_init__(self) -> None:
        """Refuse an empty or repeated question."""
        if not self.variant.strip() or not self.ask:
            raise ValueError("variant and ask must not be empty")
        if (self.base is None) != (self.engine.name == "api") or (self.base is None and self.adapter is not None):
            raise ValueError("engine api asks a hosted model: leave base and adapter out; other engines need base")
        asked = [
            (a.format, a.battery, a.only, a.mode, a.temperature if a.mode == "sampled" else None) for a in self.ask
        ]
        if len(set(asked)) < len(asked):
            raise ValueError("two entries of ask have the same format, battery, only, mode and temperature; merge them")
