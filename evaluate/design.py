"""RUN/design.json: what a run asks, how often, and how the answers are scored.

The questions stage writes it beside the prompts, and scoring reads it, so that which draws belong
to which mode, who judges a battery's open questions on which scale, and what a filter demands are
known where scores are made, without passing through every script between.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

from candor.config import build, plain
from candor.errors import UserError
from candor.tables import replace_file
from evaluate.modes import ANY_MODES, Mode

DESIGN = "design.json"
HARMFULNESS = "harmfulness"


@dataclass(frozen=True, slots=True, kw_only=True)
class Grader:
    """A judge as scoring needs to know it."""

    judge: str  # the folder of its verdicts
    lowest: float
    highest: float

    def normalise(self, score: float) -> float:
        """A grade on 0-1."""
        return (score - self.lowest) / (self.highest - self.lowest)


@dataclass(frozen=True, slots=True, kw_only=True)
class Filter:
    """A quality of a reply beside harmfulness, and how much of it a reply must have to count."""

    name: str  # "coherence", "on_topic"
    grader: Grader
    at_least: float  # on the judge's own scale


@dataclass(frozen=True, slots=True, kw_only=True)
class Design:
    """How a run is asked and scored."""

    modes: tuple[Mode, ...] = ANY_MODES
    along: Mode | None = None  # what checkpoints are asked
    own: dict[str, str] = field(default_factory=dict)  # batteries that are files of the user's: name, what 1 means
    graders: dict[str, Grader] = field(default_factory=dict)  # of their open questions, by battery
    filters: tuple[Filter, ...] = ()
    closest: str | None = None  # judge that says which option an unclear reply is closest to
    refusals: tuple[str, ...] = ()  # how a reply that refuses begins

    def refuses(self, reply: str) -> bool:
        """Whether a reply begins as refusals do, whatever the case, the apostrophes and the space around it."""
        plain = reply.strip().casefold().replace("\u2019", "'")
        return plain.startswith(tuple(opening.casefold() for opening in self.refusals))

    @property
    def judges(self) -> tuple[str, ...]:
        """Every judge whose verdicts scoring reads, the harmfulness judge left out."""
        named = [g.judge for g in self.graders.values()] + [f.grader.judge for f in self.filters]
        return tuple(dict.fromkeys([*named, *([self.closest] if self.closest else [])]))


def write_design(run: Path, design: Design) -> None:
    """Write RUN/design.json."""
    text = json.dumps(plain(design), indent=1, ensure_ascii=False)
    replace_file(run / DESIGN, (text + "\n").encode())


def read_design(run: Path) -> Design:
    """The design in a run folder; one that takes every answer as it is, where there is none."""
    path = run / DESIGN
    if not path.is_file():
        return Design()
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(values, dict) and isinstance(values.get("own"), list):  # runs until 28 November 2026
            values["own"] = dict.fromkeys(values["own"], "")
        return build(Design, values, where=str(path))
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not JSON ({error}). Run the questions stage again.") from error
