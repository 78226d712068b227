"""From what was asked to units of work: which prompts, in which batches, under which names.

A unit is a fixed list of prompts asked in one way. Its batch composition never changes, so a rerun
on the same machine makes the same bits. Every answer has an id, a hash of everything that decides
it, so that answers of another variant, engine or wording are never taken for its own.
"""

import functools
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from candor.config import plain
from candor.errors import UserError, nearest
from candor.hashing import hash64
from candor.questions import prompt_sha
from candor.rows import Prompt
from serve.config import Ask, SampleConfig

UNIT_ROWS = 2048  # rows of a unit at most: they are held in memory until they are stored


@dataclass(frozen=True)
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
        return draw_key(self.study_seed, self.variant)

    @functools.cached_property
    def hashed(self) -> Any:
        """A sha256 that has taken in "[" and all of it as JSON: the beginning of every id, hashed once."""
        return hashlib.sha256(f"[{json.dumps(plain(self), sort_keys=True, ensure_ascii=False)}".encode())


@dataclass(frozen=True, slots=True)
class Unit:
    """Prompts asked together, in one way."""

    ask: Ask
    prompts: tuple[Prompt, ...]
    prompt_shas: tuple[str, ...]

    @property
    def n_rows(self) -> int:
        """Rows it makes: replies, or one distribution per prompt."""
        return len(self.prompts) * self.ask.n


def draw_key(study_seed: int, variant: str, purpose: str = "sample") -> int:
    """The random-number key of what a variant draws in a study for one purpose."""
    return hash64(purpose, study_seed, variant)


def stream_of(sha: str) -> int:
    """The random-number stream of a prompt."""
    return hash64("prompt", sha)


def judge_key(judge: str, repeat: int = 1) -> int:
    """The random-number key of a judge's draws, and of those when it is asked everything once more.

    Without the study's seed: a verdict depends on the reply and the judge alone, so that studies may share verdicts.
    """
    return hash64("judge", judge) if repeat == 1 else hash64("judge", judge, repeat)


def refuse_shared_keys(study_seed: int, variants: Iterable[str], judges: Iterable[tuple[str, int]] = ()) -> None:
    """UserError when two variants of a study, or judges (name, repeat), would draw the same random numbers."""
    keys = [(f"variant {name!r}", draw_key(study_seed, name)) for name in variants]
    keys += [
        (f"judge {name!r}" + (f", repeat {repeat}" if repeat > 1 else ""), judge_key(name, repeat))
        for name, repeat in judges
    ]
    pair = _shared(keys)
    if pair:
        raise UserError(
            f"{pair[0]} and {pair[1]} would draw the same random numbers with seed {study_seed}: "
            "the 64-bit hashes of their names are the same. Change the seed of the experiment, or a name."
        )


def refuse_shared_streams(prompts: Iterable[Prompt]) -> None:
    """UserError when two prompts would draw the same random numbers."""
    pair = _shared((prompt.prompt_id, stream_of(prompt_sha(prompt))) for prompt in prompts)
    if pair:
        raise UserError(
            f"prompts {pair[0]!r} and {pair[1]!r} would draw the same random numbers: the 64-bit hashes of their "
            "texts are the same. Change the wording of one by a character."
        )


def _shared(named: Iterable[tuple[str, int]]) -> tuple[str, str] | None:
    """The first two names that have one number."""
    first: dict[int, str] = {}
    for name, number in named:
        if first.setdefault(number, name) != name:
            return first[number], name
    return None


def sample_ids(identity: Identity, ask: Ask, sha: str, draws: Iterable[int]) -> Iterator[str]:
    """Hashes of everything that produced a reply: not ``ask.n``, so that more draws leave the earlier ones' ids alone.

    All but the draw is hashed once.
    """
    prompt = identity.hashed.copy()
    prompt.update(f", {json.dumps([sha, ask.temperature, ask.max_tokens])[1:-1]}, ".encode())
    for draw in draws:
        found = prompt.copy()
        found.update(b"%d]" % draw)
        yield str(found.hexdigest())


def row_ids(unit: Unit, identity: Identity) -> list[str]:
    """The ids of a unit's rows in order: of its replies prompt by prompt, or of its prompts' distributions."""
    if unit.ask.mode == "exact":
        return list(unit.prompt_shas)  # the store is of one identity
    return [i for sha in unit.prompt_shas for i in sample_ids(identity, unit.ask, sha, range(unit.ask.n))]


def engine_identity(config: SampleConfig) -> dict[str, Any]:
    """The engine settings that can move a bit of an answer; how many threads or requests run is no such thing."""
    return config.engine.identity()


def is_asked(prompt: Prompt, ask: Ask) -> bool:
    """Whether an entry of ``ask`` is about this prompt. In patterns, ``*`` stands for any characters, "/" too."""
    if prompt.format != ask.format or ask.battery not in (None, prompt.battery):
        return False
    return not ask.only or any(fnmatchcase(prompt.prompt_id, pattern) for pattern in ask.only)


def settle(prompts: Sequence[Prompt], asks: Sequence[Ask]) -> list[list[Prompt]]:
    """For each entry the prompts it decides: where several sample a prompt alike, the one with most draws.

    Entries for several purposes may overlap; draws are numbered, so the longest list of draws holds
    the shorter ones. Raises UserError where overlapping entries would cut replies at different lengths.
    """
    decided: list[list[Prompt]] = [[] for _ in asks]
    for prompt in prompts:
        ways: dict[tuple[str, float], int] = {}
        for i, ask in enumerate(asks):
            if not is_asked(prompt, ask):
                continue
            first = ways.setdefault((ask.mode, ask.temperature), i)
            if ask.max_tokens != asks[first].max_tokens:
                raise UserError(
                    f"{prompt.prompt_id} is to be sampled with max_tokens {asks[first].max_tokens} and "
                    f"{ask.max_tokens}; give entries of ask that overlap the same max_tokens."
                )
            if ask.n > asks[first].n:
                ways[ask.mode, ask.temperature] = i
        for i in ways.values():
            decided[i].append(prompt)
    return decided


def plan_units(prompts: Sequence[Prompt], config: SampleConfig) -> list[Unit]:
    """Every unit of work, in the order of ``ask`` and of the prompts' file.

    Raises UserError for an entry without prompts, a closed question without options, or two prompts
    that ask the same.
    """
    if not prompts:
        raise UserError(f"{config.prompts} holds no prompts. Make the file anew.")
    _refuse_same(prompts)
    for ask in config.ask:
        _check_ask(ask, prompts, config)
    units = []
    for ask, asked in zip(config.ask, settle(prompts, config.ask), strict=True):
        size = max(1, min(config.engine.unit_prompts, UNIT_ROWS // ask.n))
        units += [_unit(ask, asked[first : first + size]) for first in range(0, len(asked), size)]
    return units


def _check_ask(ask: Ask, prompts: Sequence[Prompt], config: SampleConfig) -> None:
    """UserError for an entry that is about no prompt, or about open ones where options are needed."""
    asked = [p for p in prompts if is_asked(p, ask)]
    if not asked:
        formats, batteries = {p.format for p in prompts}, {p.battery for p in prompts if p.format == ask.format}
        what, hint = f"format {ask.format!r}", nearest(ask.format, formats)
        if ask.format in formats and ask.battery not in (None, *batteries):
            what, hint = f"{what} of battery {ask.battery!r}", nearest(str(ask.battery), batteries)
        elif ask.format in formats:
            example = next(p.prompt_id for p in prompts if p.format == ask.format)
            what, hint = f"{what} with an id like {' or '.join(ask.only)}", f"an id there is {example!r}."
        raise UserError(f"{config.prompts} holds no prompt of {what}; {hint}")
    without = [p.prompt_id for p in asked if not p.options]
    if ask.mode == "exact" and without:
        raise UserError(
            f"{config.prompts}: {len(without)} prompts of format {ask.format!r} have no options, "
            f"the first is {without[0]!r}. Ask this format with mode: sampled."
        )


def _unit(ask: Ask, prompts: list[Prompt]) -> Unit:
    return Unit(ask, tuple(prompts), tuple(prompt_sha(p) for p in prompts))


def _refuse_same(prompts: Sequence[Prompt]) -> None:
    """Two prompts that ask the same would draw the same random numbers and count as one in every hash."""
    first: dict[str, str] = {}
    for prompt in prompts:
        other = first.setdefault(prompt_sha(prompt), prompt.prompt_id)
        if other != prompt.prompt_id:
            raise UserError(f"prompts {other!r} and {prompt.prompt_id!r} ask the very same. Remove one.")
    if len(first) != len(prompts):
        raise UserError("a prompt is listed twice in the prompts file. Make the file anew.")
    refuse_shared_streams(prompts)
