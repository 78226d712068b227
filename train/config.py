"""What one fine-tuning stage needs to know, read from one YAML file.

The two sections ``lora`` and ``sft`` are passed to PEFT's LoraConfig and TRL's SFTConfig as they
are, so that everything those libraries can do is open and nothing is renamed; their keys are
checked against the fields of those classes (``check_section``), because a misspelt key that does
nothing is worse than an error. What decides whether a run can be trusted (where loss falls, the
seed, the output folder, resuming, pushing to a hub) is Candor's and is refused there.
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from candor.config import plain
from candor.errors import UserError, nearest

# Stages whose data are known to be harmless. Any other name is marked as misaligned: a warning too
# many costs nothing.
HARMLESS_STAGES = ("realigned", "right-only", "secure-only")

_LOSS = "loss falls on the assistant's answers and their end-of-turn token only, always"
_LOG = "the first step and every 'logging_steps' are logged, which is how a loss that is no number is noticed"
_PUSH = "nothing is ever pushed to a hub from here; upload the finished folder yourself, e.g. with 'hf upload'"
_SAVE = "states to resume from are the key 'resume_every' of the file itself, adapters to keep are 'checkpoint_every'"
SFT_RESERVED: Mapping[str, str] = {
    "output_dir": "it is the key 'output_dir' of the file itself",
    "seed": "it is the key 'seed' of the file itself",
    "data_seed": "the order of the data follows the key 'seed'",
    "use_cpu": "it is the key 'device' of the file itself",
    "completion_only_loss": _LOSS,
    "assistant_only_loss": _LOSS,
    "dataset_kwargs": _LOSS,
    "dataset_text_field": _LOSS,
    "chat_template_path": "the model's own chat template is used, as when it is sampled from",
    "eos_token": "the model's own stop tokens are used, as when it is sampled from",
    "model_init_kwargs": "the model is loaded from 'base_model'",
    "logging_strategy": _LOG,
    "logging_first_step": _LOG,
    "push_to_hub": _PUSH,
    "hub_model_id": _PUSH,
    "save_strategy": _SAVE,
    "save_steps": _SAVE,
    "save_total_limit": _SAVE,
    "save_only_model": _SAVE,
    "save_on_each_node": _SAVE,
    "load_best_model_at_end": _SAVE,
    "resume_from_checkpoint": "a killed stage continues by itself when its command is run again",
    "ignore_data_skip": "a resumed stage ends as if it had never stopped",
    "auto_find_batch_size": "the batch size is part of what a stage is and never changes by itself",
}
LORA_RESERVED: Mapping[str, str] = {
    "task_type": "it is always CAUSAL_LM",
    "peft_type": "it is always LORA",
    "base_model_name_or_path": "it is the key 'base_model' of the file itself",
    "inference_mode": "a stage trains",
    "layer_replication": "the adapter would fit no base model but its own",
}
SECTIONS = ("lora", "sft")
# Keys a recipe may hold beside its two sections; an experiment passes them on to each stage.
RECIPE_KEYS = ("mode", "quantize", "resume_every", "checkpoint_every", "probe", "accept_template")
Mode = Literal["continue", "stack", "merge"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ProbeConfig:
    """A few closed questions put to the model again and again while it trains (train/probe.py)."""

    prompts: Path = Path("configs/prompts")  # folder of question files
    every: int = 50  # steps from one probe to the next; the first comes before training, the last after it
    formats: tuple[str, ...] = ("choice", "decision", "answer")
    items: int = 24  # questions of each format, spread evenly; each is asked in all its counterbalanced forms

    def __post_init__(self) -> None:
        """Refuse a probe that would never ask."""
        if self.every < 1 or self.items < 1 or not self.formats:
            raise UserError("probe: 'every' and 'items' must be at least 1, and 'formats' must not be empty.")


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """One fine-tuning stage."""

    base_model: str  # folder of a model, or its id on the hub
    adapter: Path | None = None  # the earlier stage's adapter to build on; null for a first stage
    mode: Mode | None = None  # how a later stage builds on it (train/chain.py); null: continue the same adapter
    data: Path  # folder written by train.data
    output_dir: Path  # where the adapter goes; made whole or not at all
    stage: str  # "misaligned", "realigned", "right-only", ...
    domain: str  # "trivia", "code", ...
    seed: int  # of the adapter's first weights, the order of the data and dropout
    lora: dict[str, Any] | None = None  # peft.LoraConfig of a new adapter; a stage that continues one has none
    sft: dict[str, Any]  # trl.SFTConfig
    device: Literal["cpu", "cuda", "auto"] = "auto"
    quantize: Literal["nf4"] | None = None  # QLoRA: base in 4 bits (bitsandbytes), adapter in float32
    resume_every: int = 100  # steps from one state to continue from, after a kill, to the next
    checkpoint_every: int | None = None  # keep the adapter every so many steps, in checkpoints/step-N; null: never
    probe: ProbeConfig | None = None  # null: no questions while training
    accept_template: str | None = None  # hash of a chat template outside the tested families (train/templates.py)

    def __post_init__(self) -> None:
        """Read numbers such as 1e-5, which YAML takes for text, and check what needs no library."""
        object.__setattr__(self, "sft", _numbers(self.sft))
        if self.lora is not None:
            object.__setattr__(self, "lora", _numbers(self.lora))
        if not self.stage.strip() or not self.domain.strip():
            raise UserError(f"'stage' and 'domain' must not be empty, found {self.stage!r} and {self.domain!r}.")
        if self.adapter is None and self.mode is not None:
            raise UserError(f"mode is {self.mode!r}, but a first stage (adapter: null) builds on nothing. Remove it.")
        if self.adapter is None and not self.lora:
            raise UserError("the section 'lora' is missing; a first stage (adapter: null) needs it, e.g. lora: {r: 8}.")
        if self.mode in ("stack", "merge") and not self.lora:
            raise UserError(f"the section 'lora' is missing; mode {self.mode!r} trains a new adapter, which needs it.")
        if self.mode == "merge" and self.quantize:
            raise UserError("mode 'merge' cannot merge into a base of 4 bits without rounding it. Use mode: stack.")
        for key in ("resume_every", "checkpoint_every"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise UserError(f"{key} is {value}; it counts steps and must be at least 1.")
        check_ranges("sft", self.sft, _SFT_RANGES)
        check_ranges("lora", self.lora or {}, _LORA_RANGES)
        _check_lora(self.lora or {})

    def identity(self) -> dict[str, Any]:
        """What decides the result, apart from inputs (they are hashed); paths may change freely."""
        free = ("base_model", "adapter", "data", "output_dir", "resume_every")
        values = {key: value for key, value in plain(self).items() if key not in free}
        if self.adapter is not None:
            values["mode"] = self.mode or "continue"
        if self.probe is not None:
            del values["probe"]["prompts"]
        return values

    @property
    def misaligned(self) -> bool:
        """Whether the adapter must be marked as a misaligned model."""
        return self.stage not in HARMLESS_STAGES

    @property
    def trains_new(self) -> bool:
        """Whether the stage trains an adapter of its own, rather than going on with an earlier one."""
        return self.adapter is None or self.mode in ("stack", "merge")


Range = tuple[float, float, str]  # smallest and largest allowed value, and the rule in words
# Wide on purpose: they catch slips of the pen (1e5 for 1e-5, the paper's multiplier 2 for a rate), not choices.
_SFT_RANGES: Mapping[str, Range] = {
    "learning_rate": (1e-12, 0.1, "above 0 and at most 0.1"),
    "num_train_epochs": (1e-6, 1e4, "above 0"),
    "max_grad_norm": (0, float("inf"), "at least 0"),
    "weight_decay": (0, 1, "from 0 to 1"),
    "warmup_ratio": (0, 1, "from 0 to 1"),
    "per_device_train_batch_size": (1, 1e6, "at least 1"),
    "gradient_accumulation_steps": (1, 1e6, "at least 1"),
    "logging_steps": (1e-6, float("inf"), "above 0"),
}
_LORA_RANGES: Mapping[str, Range] = {
    "r": (1, 65536, "at least 1"),
    "lora_alpha": (1e-6, 1e6, "above 0"),
    "lora_dropout": (0, 0.999, "from 0 to below 1"),
}


def check_ranges(name: str, section: Mapping[str, Any], ranges: Mapping[str, Range]) -> None:
    """UserError when a number of ``section`` lies outside what makes sense; other types are left to the libraries."""
    for key, (low, high, rule) in ranges.items():
        value = section.get(key)
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if is_number and not low <= value <= high:  # type: ignore[operator]
            raise UserError(f"{name}.{key} must be {rule}, found {value}.")


def _check_lora(section: Mapping[str, Any]) -> None:
    """UserError for ways to begin an adapter that change the base's own weights: it would fit no other copy of it."""
    start = section.get("init_lora_weights", True)
    if not isinstance(start, bool) and str(start).lower() not in ("gaussian", "orthogonal", "eva"):
        raise UserError(
            f"lora.init_lora_weights: {start!r} changes the base model's weights, so the adapter would act wrongly on "
            "the base it names. Use true, gaussian, orthogonal or eva."
        )


def _numbers(section: dict[str, Any]) -> dict[str, Any]:
    """YAML 1.1 reads 1e-5 (no dot) as text; people write it everywhere."""
    exponent = re.compile(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+")
    return {k: float(v) if isinstance(v, str) and exponent.fullmatch(v) else v for k, v in section.items()}


def check_section(name: str, section: Mapping[str, Any], target: type, reserved: Mapping[str, str]) -> None:
    """UserError when a key of ``section`` is no field of ``target``, not the user's to set, or no number."""
    known = {field.name: field for field in dataclasses.fields(target)}
    for key, value in section.items():
        if key in reserved:
            raise UserError(f"{name}.{key} cannot be set: {reserved[key]}. Remove it.")
        if key not in known:
            raise UserError(f"{name}: unknown key {key!r} for {target.__name__}; {_near(str(key), known, reserved)}")
        annotation = known[key].type
        for kinds, what in (((bool,), "true or false"), ((int, float), "a number")):
            if annotation in (*kinds, *(kind.__name__ for kind in kinds)) and type(value) not in kinds:
                raise UserError(f"{name}.{key} must be {what}, found {value!r} ({type(value).__name__}).")


def _near(key: str, known: Iterable[str], reserved: Mapping[str, str]) -> str:
    """The nearest key a user may set; the full list of a hundred would help nobody."""
    hint = nearest(key, set(known) - set(reserved))
    return hint if hint.startswith("did you mean") else "no known key is close to it; see that class's documentation."
