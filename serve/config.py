"""What ``serve.sample`` is told: which variant, which prompts, how each format is asked, on what engine."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Ask:
    """How the prompts of one format are asked."""

    format: str  # candor.rows.Prompt.format
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


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """What does the work."""

    name: str = "torch"  # see serve/registry.py
    device: str = "cpu"  # or "cuda", "cuda:1"
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"  # of the weights; logits are never below float32
    unit_prompts: int = 64  # prompts per unit of work: what a kill can cost, and what one batch is composed of
    batch_tokens: int = 131_072  # rows x columns of the key-value cache at a time; lower it when memory is short
    threads: int | None = None  # CPU threads; null leaves torch's choice

    def __post_init__(self) -> None:
        """Refuse sizes below one."""
        if min(self.unit_prompts, self.batch_tokens, self.threads or 1) < 1:
            raise ValueError("unit_prompts, batch_tokens and threads must be 1 or more")


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    """One variant, and what it is asked."""

    base: Path  # folder of the base model
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
        asked = [(a.format, a.mode, a.temperature if a.mode == "sampled" else None) for a in self.ask]
        if len(set(asked)) < len(asked):
            raise ValueError("two entries of ask have the same format, mode and temperature; merge them")
