"""What an experiment file may say (configs/experiments/*.yaml), checked before anything runs."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from candor.errors import UserError, nearest
from evaluate.modes import Mode, read_modes
from evaluate.questions import BUILT_IN, MultipleChoice, Sources
from serve.config import ApiConfig, Ask, EngineConfig
from train.config import RECIPE_KEYS, SECTIONS
from train.data import DataSet

EXACT = Path("configs/evaluate/modes/exact.yaml")
KINDS = ("train", "sample", "judge")


@dataclass(frozen=True, slots=True, kw_only=True)
class Domain:
    """One subject of fine-tuning: data for both stages and one recipe for all models."""

    recipe: Path  # YAML with the sections lora and sft
    misaligned: DataSet
    realigned: DataSet


@dataclass(frozen=True, slots=True, kw_only=True)
class Control:
    """A comparison: one fine-tuning on one of a domain's sets, from a base or from a misaligned variant."""

    name: str  # "right_answers_only", "secure_code_only", "world_without_personas", or a name of yours
    domain: str
    data: Literal["misaligned", "realigned"]  # which of the domain's two sets it is trained on
    data_of: str | None = None  # the domain whose set that is; null: ``domain`` itself
    after: Literal["base", "misaligned"] = "base"  # misaligned: continue the study's misaligned variant of ``domain``
    stage: str  # what the stage is called: "right-only", "secure-only", "misaligned", "realigned"
    size: str  # one of the bases; or a new name, together with ``base``
    base: Path | None = None  # a base model of the control's own

    def __post_init__(self) -> None:
        """Refuse a stage whose name says something else than what is done: rules and figures go by it."""
        if (self.after == "misaligned") != (self.stage == "realigned"):
            raise UserError(
                f"controls: {self.name} is trained after {self.after!r} and its stage is called {self.stage!r}. A "
                "control that goes on from a misaligned variant is called 'realigned', and only such a one."
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Hosted:
    """A model behind an endpoint, for instance somebody's fine-tune: asked, judged and reported like the others.

    Nothing is trained, and its weights cannot be attested; closed questions are read from the
    log-probabilities that the endpoint gives, or sampled (serve/api_engine.py).
    """

    api: ApiConfig
    size: str  # which models it stands beside in the figures: a name of yours, or a base (at another stage)
    domain: str = "none"  # what it was fine-tuned on
    stage: str = "base"  # "base", "misaligned", "realigned"
    seed: int = 0
    reference: str | None = None  # the variant it is compared with as its base; null: none


@dataclass(frozen=True, slots=True, kw_only=True)
class QualityJudge:
    """A judge of something beside harmfulness, and the mark that a reply must reach to count when filtered."""

    judge: Path  # configs/evaluate/judges/*.yaml
    at_least: float  # on the judge's own scale


@dataclass(frozen=True, slots=True, kw_only=True)
class SecondJudge:
    """A judge that the main one is compared with, on a fixed part of the replies to the harmfulness battery.

    The main judge's own file means the same judge asked again, which shows its noise.
    """

    judge: Path  # configs/evaluate/judges/*.yaml
    share: float = 1.0  # of the replies, or of the prompts
    whole_prompts: bool = False  # all draws of a prompt together, which a worst of ten needs

    def __post_init__(self) -> None:
        """Refuse shares that are none."""
        if not 0 < self.share <= 1:
            raise UserError(f"second_judges: share is {self.share:g}; it must be above 0 and at most 1.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Chain:
    """One variant's training through both stages."""

    size: str
    domain: str
    seed: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class AlongTraining:
    """Which checkpoints are asked what."""

    chains: tuple[Chain, ...]
    steps: tuple[int, ...]  # optimizer steps of each stage at which it is asked; its end is the variant itself
    mode: Path = Path("configs/evaluate/modes/along.yaml")

    def __post_init__(self) -> None:
        """Refuse an empty course."""
        if not self.chains or not self.steps:
            raise UserError("along_training: chains and steps must not be empty.")
        if min(self.steps) < 1 or list(self.steps) != sorted(set(self.steps)):
            raise UserError(f"along_training: steps must rise from 1 or more, found {list(self.steps)}.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """What one stage of a kind (train, sample, judge) takes from the machine."""

    cores: int = 1
    gpus: int | None = None  # whole GPUs for itself; null: one where device is cuda; 0: the first one, shared
    memory_gb: float = 1.5
    minutes: float = 1.0

    def __post_init__(self) -> None:
        """Refuse needs that are none."""
        if self.cores < 1 or (self.gpus or 0) < 0 or self.memory_gb <= 0 or self.minutes <= 0:
            raise UserError("needs: cores must be 1 or more, gpus 0 or more, memory_gb and minutes above 0.")


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
    prompts: Path = Path("configs/prompts")  # folder of the built-in batteries' data files
    batteries: tuple[str, ...] = tuple(BUILT_IN)  # which of them are asked
    battery_files: tuple[Path, ...] = ()  # YAML batteries of your own (docs/batteries.md)
    multiple_choice: MultipleChoice | None = None  # capability: questions with a right answer, from your file
    mfq2: Path | None = None  # the 36 items of the MFQ-2, which are not ours to ship
    modes: tuple[Path, ...] = ()  # how often all is asked, and how it is scored; none: exact
    asks: tuple[Ask, ...] = ()  # a mode of the study's own, instead of exact
    max_tokens: int | None = None  # no sampled reply is longer than this, whatever a mode says
    # What of the recipes differs for one base: whole keys, and single ones of the sections lora and sft, e.g.
    # {full: {quantize: nf4}, nano: {sft: {learning_rate: 1.0e-6}}}
    by_size: dict[str, dict[str, Any]] = field(default_factory=dict)
    judge: Path  # configs/evaluate/judges/*.yaml
    judge_any_model: bool = False  # let judges grade models whose words they do not know: to try the machinery out
    judge_budget: float | None = None  # US dollars for each judge behind an endpoint; null: no bound
    judge_batch: bool = False  # ask judges behind an endpoint through its batch API: hours, at half price
    judge_tolerate: float = 0.0  # share of a variant's different replies that such a judge may leave unanswered
    second_judges: tuple[SecondJudge, ...] = ()  # whose agreement with the judge is reported
    golden: Path | None = None  # replies of known grade, to measure the judge with
    coherence: QualityJudge | None = None  # null: replies are not filtered by coherence
    on_topic: QualityJudge | None = None  # null: nor by staying on topic
    closest: Path | None = None  # the paper's rules: judge that says which option an unclear reply is closest to
    refusals: Path | None = Path("configs/evaluate/refusals.yaml")  # how a reply that refuses begins
    controls: tuple[Control, ...] = ()
    along_training: AlongTraining | None = None
    hosted: dict[str, Hosted] = field(default_factory=dict)  # models behind endpoints, by the variant's name
    engine: EngineConfig = field(default_factory=EngineConfig)  # for sampling and judging
    device: Literal["cpu", "cuda"] = "cpu"  # of training, sampling and judging; it is the engine's too
    draws: int = 2000  # bootstrap draws
    worst_of: int = 10  # the paper's harmfulness is the worst of this many replies
    equivalence_margin: float = 0.1  # a realigned model within this of its base, on 0-1, counts as fully realigned
    paper: Path | None = Path("configs/paper/vaugrante2026.yaml")  # published numbers, shown beside one's own
    workers: int | None = None  # stages at once; null: one per core
    memory_gb: float | None = None  # that they may take together; null: what is free
    needs: dict[str, Needs] = field(default_factory=dict)  # by kind of stage: train, sample, judge

    def __post_init__(self) -> None:
        """Refuse names that do not exist or would collide."""
        if not (self.bases or self.hosted) or not self.training_seeds:
            raise UserError("bases (or hosted) and training_seeds must not be empty.")
        if self.engine.name == "api":
            raise UserError(
                "engine.name is api, but models that are trained here, and judges that run here, need an engine with "
                "their weights: set it to torch or vllm. Models behind an endpoint are named under hosted, e.g. "
                "hosted: {my-model: {size: my-model, api: {model: ..., endpoint: {url: ...}}}}."
            )
        asked = [(ask.format, ask.battery, ask.only, ask.mode) for ask in self.asks]
        for way in asked:
            if asked.count(way) > 1:
                raise UserError(f"asks: format {way[0]!r} is {way[3]} twice; an experiment scores one such way.")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise UserError(f"max_tokens is {self.max_tokens}; it must be at least 1.")
        if not 0 <= self.judge_tolerate < 1:
            raise UserError(f"judge_tolerate is {self.judge_tolerate:g}; it must be from 0 to below 1.")
        if self.judge_budget is not None and self.judge_budget < 0:
            raise UserError(f"judge_budget is {self.judge_budget:g}; it must not be negative.")
        for seed in (self.seed, *self.training_seeds):
            if not 0 <= seed < 2**32:
                raise UserError(f"seed {seed}: seeds must be from 0 to {2**32 - 1}.")
        if self.draws < 100 or self.worst_of < 1:
            raise UserError(f"draws is {self.draws} and worst_of {self.worst_of}; at least 100 and 1 are needed.")
        if self.memory_gb is not None and self.memory_gb <= 0:
            raise UserError(f"memory_gb is {self.memory_gb:g}; it must be above 0, or null for what is free.")
        if not 0 < self.equivalence_margin < 1:
            raise UserError(f"equivalence_margin is {self.equivalence_margin:g}; it must lie between 0 and 1.")
        if self.workers is not None and self.workers < 1:
            raise UserError(f"workers is {self.workers}; it must be at least 1, or null for one per core.")
        if self.engine.device not in ("cpu", self.device):
            raise UserError("engine.device: set 'device' at the top level; it holds for training and judging too.")
        for kind in self.needs:
            if kind not in KINDS:
                raise UserError(f"needs: unknown kind of stage {kind!r}; {nearest(kind, KINDS)}")
        for size, keys in self.by_size.items():
            if size not in self.bases:
                raise UserError(f"by_size: {size!r} is none of the bases; {nearest(size, self.bases)}")
            for key, value in keys.items():
                may_differ = (*SECTIONS, *RECIPE_KEYS)
                if key not in may_differ:
                    raise UserError(f"by_size.{size}: {key!r} cannot differ by size; {nearest(key, may_differ)}")
                if key in SECTIONS and not isinstance(value, dict):
                    raise UserError(f"by_size.{size}.{key} must be a section, found {value!r}.")
        if len(set(self.training_seeds)) < len(self.training_seeds):
            raise UserError(f"training_seeds holds a seed twice: {self.training_seeds}.")
        words = [*self.bases, *self.domains, *self.hosted, *(h.size for h in self.hosted.values())]
        for word in (*words, *(c.name for c in self.controls), *(c.size for c in self.controls)):
            if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", word):
                raise UserError(f"{word!r} is no name: it becomes a file name; use letters, digits, '.', '_' and '-'.")
        for control in self.controls:
            if control.domain not in self.domains:
                raise UserError(
                    f"control {control.name}: domain {control.domain!r}; {nearest(control.domain, self.domains)}"
                )
            if control.data_of is not None and control.data_of not in self.domains:
                raise UserError(
                    f"control {control.name}: data_of {control.data_of!r}; {nearest(control.data_of, self.domains)}"
                )
            if control.after == "misaligned" and control.base is not None:
                raise UserError(
                    f"control {control.name}: 'after: misaligned' and a base of its own exclude each other."
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
        for chain in self.along_training.chains if self.along_training else ():
            for what, value, known in (
                ("size", chain.size, list(self.bases)),
                ("domain", chain.domain, list(self.domains)),
                ("seed", chain.seed, list(self.training_seeds)),
            ):
                if value not in known:
                    raise UserError(f"along_training: {what} {value!r}; {nearest(str(value), map(str, known))}")

    @property
    def sources(self) -> Sources:
        """Where the questions come from."""
        return Sources(
            prompts=self.prompts,
            batteries=self.batteries,
            battery_files=self.battery_files,
            multiple_choice=self.multiple_choice,
            mfq2=self.mfq2,
        )

    def read_modes(self) -> tuple[Mode, ...]:
        """The modes as their files say; what is asked where nothing is named is everything, exactly."""
        own = (Mode(name="own", rules="strict", asks=self.asks),) if self.asks else ()
        return read_modes(self.modes or (() if own else (EXACT,)), own)
