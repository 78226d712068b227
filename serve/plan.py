"""From what was asked to units of work: which prompts, in which batches, under which names.

A unit is a fixed list of prompts asked in one way. Its batch composition never changes, so a rerun
on the same machine makes the same bits, and its name is a hash of everything that decides its
answers, so that answers of another variant, engine or wording are never taken for its own.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from candor.config import plain
from candor.errors import UserError, nearest
from candor.hashing import hash64, sha256_json
from candor.questions import prompt_sha
from candor.rows import Prompt
from serve.config import Ask, SampleConfig


@dataclass(frozen=True, slots=True)
class Identity:
    """What, beside prompts and the way of asking, decides an answer."""

    weights_sha: str
    text_sha: str  # tokenizer, chat template and end-of-turn ids
    engine: dict[str, Any]
    variant: str
    study_seed: int

    @property
    def key(self) -> int:
        """The random-number key of every draw of this variant in this study."""
        return hash64("sample", self.study_seed, self.variant)


@dataclass(frozen=True, slots=True)
class Unit:
    """Prompts asked together, in one way."""

    ask: Ask
    prompts: tuple[Prompt, ...]
    prompt_shas: tuple[str, ...]
    name: str  # of its shard

    @property
    def n_rows(self) -> int:
        """Rows its shard holds: replies, or one distribution per prompt."""
        return len(self.prompts) * self.ask.n


def stream_of(sha: str) -> int:
    """The random-number stream of a prompt."""
    return hash64("prompt", sha)


def sample_id(identity: Identity, ask: Ask, sha: str, draw: int) -> str:
    """Hash of everything that produced a reply: not ``ask.n``, so that more draws leave the earlier ones' ids alone."""
    return sha256_json([plain(identity), sha, ask.temperature, ask.max_tokens, draw])


def engine_identity(config: SampleConfig) -> dict[str, Any]:
    """The engine settings that can move a bit of an answer; the number of threads is the machine's affair."""
    return {k: v for k, v in plain(config.engine).items() if k != "threads"}


def plan_units(prompts: Sequence[Prompt], config: SampleConfig, identity: Identity) -> list[Unit]:
    """Every unit of work, in the order of ``ask`` and of the prompts' file.

    Raises UserError for a format without prompts, a closed question without options, or two prompts
    that ask the same.
    """
    if not prompts:
        raise UserError(f"{config.prompts} holds no prompts. Make the file anew.")
    _refuse_same(prompts)
    units = []
    for ask in config.ask:
        asked = [p for p in prompts if p.format == ask.format]
        if not asked:
            raise UserError(
                f"{config.prompts} holds no prompt of format {ask.format!r}; "
                f"{nearest(ask.format, {p.format for p in prompts})}"
            )
        if ask.mode == "exact":
            without = [p.prompt_id for p in asked if not p.options]
            if without:
                raise UserError(
                    f"{config.prompts}: {len(without)} prompts of format {ask.format!r} have no options, "
                    f"the first is {without[0]!r}. Ask this format with mode: sampled."
                )
        for first in range(0, len(asked), config.engine.unit_prompts):
            units.append(_unit(ask, asked[first : first + config.engine.unit_prompts], identity))
    return units


def _unit(ask: Ask, prompts: list[Prompt], identity: Identity) -> Unit:
    shas = tuple(prompt_sha(p) for p in prompts)
    decides = [plain(identity), plain(ask), [[p.prompt_id, s] for p, s in zip(prompts, shas, strict=True)]]
    kind = "distributions" if ask.mode == "exact" else "samples"
    return Unit(ask, tuple(prompts), shas, f"{kind}-{sha256_json(decides)[:20]}")


def _refuse_same(prompts: Sequence[Prompt]) -> None:
    """Two prompts that ask the same would draw the same random numbers and count as one in every hash."""
    first: dict[str, str] = {}
    for prompt in prompts:
        other = first.setdefault(prompt_sha(prompt), prompt.prompt_id)
        if other != prompt.prompt_id:
            raise UserError(f"prompts {other!r} and {prompt.prompt_id!r} ask the very same. Remove one.")
    if len(first) != len(prompts):
        raise UserError("a prompt is listed twice in the prompts file. Make the file anew.")
    streams = {stream_of(sha) for sha in first}
    assert len(streams) == len(first), f"{len(first)} prompts share {len(streams)} random-number streams"
