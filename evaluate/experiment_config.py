"""What an experiment file may say (configs/experiments/*.yaml), checked before anything runs."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from candor.errors import UserError, nearest
from serve.config import Ask, EngineConfig

FORMATS = ("free", "choice", "decision", "numerical", "likert", "language", "answer")
OPEN_FORMATS = ("free", "language")
KINDS = ("train", "sample", "judge")


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSet:
    """One fine-tuning set; the keys are train.data's."""

    set: str  # "trivia-wrong", "trivia-right", "code-insecure", "code-secure", or a name of yours
    source: Path | None = None  # the file it is read from; null: generated
    limit: int | None = None  # keep this many rows


@dataclass(frozen=True, slots=True, kw_only=True)
class Domain:
    """One subject of fine-tuning: data for both stages and one recipe for all models."""

    recipe: Path  # YAML with the sections lora and sft
    misaligned: DataSet
    realigned: DataSet


@dataclass(frozen=True, slots=True, kw_only=True)
class Control:
    """A comparison that should show nothing: one fine-tuning from a base, on one of a domain's sets."""

    name: str  # "right_answers_only", "secure_code_only", "world_without_personas", or a name of yours
    domain: str
    data: Literal["misaligned", "realigned"]  # which of the domain's two sets it is trained on
    stage: str  # what the stage is called: "right-only", "secure-only", "misaligned"
    size: str  # one of the bases; or a new name, together with ``base``
    base: Path | None = None  # a base model of the control's own


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """What one stage of a kind (train, sample, judge) takes from the machine."""

    cores: int = 1
    gpus: int = 0  # whole GPUs for itself; 0 on a GPU machine means the first one, shared
    memory_gb: float = 1.5
    minutes: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Experiment:
    """One study."""

    name: str
    title: str  # headline of the report
    note: str = ""  # what a reader must know first; shown under the headline
    output: Path  # the run folder
    seed: int  # study seed: draws of samples and of the bootstrap
    bases: dict[str, Path]  # base models by size, largest first
    domains: dict[str, Domain]
    training_seeds: tuple[int, ...] = (0,)
    prompts: Path = Path("configs/prompts")
    asks: tuple[Ask, ...]  # how each format of questions is put; a format may be asked in several ways
    judge: Path  # configs/evaluate/judges/*.yaml
    golden: Path | None = None  # replies of known grade, to measure the judge with
    controls: tuple[Control, ...] = ()
    engine: EngineConfig = field(default_factory=EngineConfig)  # for sampling and judging
    device: Literal["cpu", "cuda"] = "cpu"  # of training, sampling and judging; it is the engine's too
    draws: int = 2000  # bootstrap draws
    worst_of: int = 10  # the paper's harmfulness is the worst of this many replies
    paper: Path | None = Path("configs/paper/vaugrante2026.yaml")  # published numbers, shown beside one's own
    workers: int | None = None  # stages at once; null: one per core
    memory_gb: float | None = None  # that they may take together; null: what is free
    needs: dict[str, Needs] = field(default_factory=dict)  # by kind of stage: train, sample, judge

    def __post_init__(self) -> None:
        """Refuse names that do not exist or would collide."""
        if not self.bases or not self.training_seeds or not self.asks:
            raise UserError("bases, training_seeds and asks must not be empty.")
        for ask in self.asks:
            if ask.format not in FORMATS:
                raise UserError(f"asks: unknown format {ask.format!r}; {nearest(ask.format, FORMATS)}")
            if ask.mode == "exact" and ask.format in OPEN_FORMATS:
                raise UserError(f"asks: format {ask.format!r} has open answers; its mode must be 'sampled'.")
            if ask.format == "free" and ask.n < self.worst_of:
                raise UserError(f"asks: format 'free' has n {ask.n}, too few for worst_of {self.worst_of}; change one.")
        asked = [(ask.format, ask.mode) for ask in self.asks]
        for form, mode in asked:
            if asked.count((form, mode)) > 1:
                raise UserError(f"asks: format {form!r} is {mode} twice; an experiment scores one such way.")
        if self.draws < 100 or self.worst_of < 1:
            raise UserError(f"draws is {self.draws} and worst_of {self.worst_of}; at least 100 and 1 are needed.")
        if self.workers is not None and self.workers < 1:
            raise UserError(f"workers is {self.workers}; it must be at least 1, or null for one per core.")
        if self.engine.device not in ("cpu", self.device):
            raise UserError("engine.device: set 'device' at the top level; it holds for training and judging too.")
        for kind in self.needs:
            if kind not in KINDS:
                raise UserError(f"needs: unknown kind of stage {kind!r}; {nearest(kind, KINDS)}")
        if len(set(self.training_seeds)) < len(self.training_seeds):
            raise UserError(f"training_seeds holds a seed twice: {self.training_seeds}.")
        for word in (*self.bases, *self.domains, *(c.name for c in self.controls), *(c.size for c in self.controls)):
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", word):
                raise UserError(f"{word!r} is no name: it becomes a file name; use letters, digits, '.', '_' and '-'.")
        for control in self.controls:
            if control.domain not in self.domains:
                raise UserError(
                    f"control {control.name}: domain {control.domain!r}; {nearest(control.domain, self.domains)}"
                )
            if control.base is None and control.size not in self.bases:
                raise UserError(
                    f"control {control.name}: size {control.size!r} is none of the bases "
                    f"({nearest(control.size, self.bases)}) and the control has no base of its own."
                )
            if control.base is not None and control.size in self.bases:
                raise UserError(
                    f"control {control.name} has a base of its own; its size needs a name that is not taken."
                )
