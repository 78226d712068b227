"""Modes: how often every question is put, and by which rules the answers become numbers.

The same items are asked in every mode (one file of items). ``exact`` scores each closed question
from the model's own probabilities with complete counterbalancing; ``paper`` repeats the counts,
scoring rules and exclusions of arXiv 2602.14777 to the sample. A mode is a file
(configs/evaluate/modes/), and an experiment names one or more of them.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from candor.config import load
from candor.errors import UserError, nearest
from candor.rows import Prompt
from serve.config import Ask
from serve.plan import is_asked

OPEN_FORMATS = ("free", "language")
CLOSED_FORMATS = ("choice", "decision", "numerical", "likert", "rating", "answer", "scale")
FORMATS = (*OPEN_FORMATS, *CLOSED_FORMATS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Mode:
    """One way of asking and scoring."""

    name: str
    rules: Literal["strict", "paper"]  # strict: what is no option is missing; paper: evaluate/batteries/paper_rules.py
    closed: Literal["exact"] | None = None  # how closed questions that no entry is about are asked; null: not at all
    asks: tuple[Ask, ...] = ()

    def __post_init__(self) -> None:
        """Refuse formats that do not exist and exact answers to open questions."""
        for ask in self.asks:
            if ask.format not in FORMATS:
                raise UserError(f"mode {self.name}: unknown format {ask.format!r}; {nearest(ask.format, FORMATS)}")
            if ask.mode == "exact" and ask.format in OPEN_FORMATS:
                raise UserError(
                    f"mode {self.name}: format {ask.format!r} has open answers; its mode must be 'sampled'."
                )
        if not self.asks and self.closed is None:
            raise UserError(f"mode {self.name} asks nothing.")

    def draws(self, prompt: Prompt) -> int:
        """How many sampled replies to a prompt belong to this mode."""
        return max((a.n for a in self.asks if a.mode == "sampled" and is_asked(prompt, a)), default=0)

    def scores_exactly(self, prompt: Prompt) -> bool:
        """Whether the mode takes a prompt's answer from its probabilities."""
        return any(a.mode == "exact" and is_asked(prompt, a) for a in self.asks)


_ALL = 1_000_000  # more draws than anyone makes
# What is assumed where no design tells: every answer counts, and closed questions may have been put both ways.
ANY_MODES = (
    Mode(
        name="exact",
        rules="strict",
        asks=(
            *(Ask(format=f, mode="sampled", n=_ALL) for f in OPEN_FORMATS),
            *(Ask(format=f, mode="exact") for f in CLOSED_FORMATS),
        ),
    ),
    Mode(name="sampled", rules="paper", asks=tuple(Ask(format=f, mode="sampled", n=_ALL) for f in CLOSED_FORMATS)),
)


def read_modes(paths: Iterable[Path], own: Sequence[Mode] = ()) -> tuple[Mode, ...]:
    """The study's own modes and those in files; UserError when two have one name or the same rules."""
    modes = (*own, *(load(Mode, path) for path in paths))
    for what in ("name", "rules"):
        values: list[str] = [getattr(mode, what) for mode in modes]
        twice = next((v for v in values if values.count(v) > 1), None)
        if twice is not None:
            raise UserError(f"two modes have the {what} {twice!r}; their scores could not be told apart. Name one.")
    return modes


def complete(mode: Mode, prompts: Sequence[Prompt], *, max_tokens: int | None = None) -> Mode:
    """The mode with one entry for everything it asks of these prompts, and no other.

    Entries about batteries that are not in the study fall away; closed questions without an entry
    get one when the mode says how. Raises UserError for an entry that is about none of the prompts
    of a battery or format that is there: its pattern, or its pair of format and battery, is wrong.
    """
    batteries, formats = {p.battery for p in prompts}, {p.format for p in prompts}
    kept = []
    for ask in mode.asks:
        if any(is_asked(p, ask) for p in prompts):
            kept.append(ask)
        elif ask.format in formats and (ask.battery in batteries or (ask.battery is None and ask.only)):
            about = f" of battery {ask.battery!r}" if ask.battery else ""
            like = f" with an id like {' or '.join(ask.only)}" if ask.only else ""
            raise UserError(f"mode {mode.name}: there is no prompt of format {ask.format!r}{about}{like}.")
    if mode.closed is not None:
        kept += _rest(kept, prompts)
    if max_tokens is not None:
        kept = [replace(a, max_tokens=min(a.max_tokens, max_tokens)) if a.mode == "sampled" else a for a in kept]
    return replace(mode, asks=tuple(kept), closed=None)


def _rest(asks: Sequence[Ask], prompts: Sequence[Prompt]) -> list[Ask]:
    """Exact entries for the closed (format, battery) pairs that no entry is about."""
    pairs = dict.fromkeys((p.format, p.battery) for p in prompts if p.options and p.format not in OPEN_FORMATS)
    free = [
        (form, battery)
        for form, battery in pairs
        if not any(a.format == form and a.battery in (None, battery) for a in asks)
    ]
    found = []
    for form in dict.fromkeys(f for f, _ in free):
        if all(pair in free for pair in pairs if pair[0] == form):
            found.append(Ask(format=form, mode="exact"))
        else:
            found += [Ask(format=f, battery=battery, mode="exact") for f, battery in free if f == form]
    return found


def all_asks(modes: Iterable[Mode]) -> tuple[Ask, ...]:
    """What serve.sample is told: every entry of every mode once, with the most draws that any mode asks for."""
    most: dict[Ask, Ask] = {}  # entries that differ in their draws only
    for ask in (ask for mode in modes for ask in mode.asks):
        alike = replace(ask, n=1)
        most[alike] = max(most.get(alike, ask), ask, key=lambda a: a.n)
    return tuple(most.values())
