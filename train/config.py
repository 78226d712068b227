"""What one fine-tuning stage needs to know, read from one YAML file.

The two sections ``lora`` and ``sft`` are passed to PEFT's LoraConfig and TRL's SFTConfig as they
are, so that everything those libraries can do is open and nothing is renamed; their keys are
checked against the fields of those classes (``check_section``), because a misspelt key that does
nothing is worse than an error. What decides whether a run can be trusted (where loss falls, the
seed, the output folder, pushing to a hub) is Candor's and is refused there.
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
_PUSH = "nothing is ever pushed to a hub from here"
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
}
LORA_RESERVED: Mapping[str, str] = {
    "task_type": "it is always CAUSAL_LM",
    "peft_type": "it is always LORA",
    "base_model_name_or_path": "it is the key 'base_model' of the file itself",
    "inference_mode": "a stage trains",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """One fine-tuning stage."""

    base_model: str  # folder of a model, or its id on the hub
    adapter: Path | None = None  # the earlier stage's adapter to continue; null for a first stage
    data: Path  # folder written by train.data
    output_dir: Path  # where the adapter goes; made whole or not at all
    stage: str  # "misaligned", "realigned", "right-only", ...
    domain: str  # "trivia", "code", ...
    seed: int  # of the adapter's first weights, the order of the data and dropout
    lora: dict[str, Any] | None = None  # peft.LoraConfig; for a first stage only (or as the parent's)
    sft: dict[str, Any]  # trl.SFTConfig
    device: Literal["cpu", "cuda", "auto"] = "auto"

    def __post_init__(self) -> None:
        """Read numbers such as 1e-5, which YAML takes for text, and check what needs no library."""
        object.__setattr__(self, "sft", _numbers(self.sft))
        if self.lora is not None:
            object.__setattr__(self, "lora", _numbers(self.lora))
        if self.adapter is None and not self.lora:
            raise UserError("the section 'lora' is missing; a first stage (adapter: null) needs it, e.g. lora: {r: 8}.")
        if not self.stage.strip() or not self.domain.strip():
            raise UserError(f"'stage' and 'domain' must not be empty, found {self.stage!r} and {self.domain!r}.")

    def identity(self) -> dict[str, Any]:
        """What decides the result, apart from inputs (they are hashed); paths may change freely."""
        paths = ("base_model", "adapter", "data", "output_dir")
        return {key: value for key, value in plain(self).items() if key not in paths}

    @property
    def misaligned(self) -> bool:
        """Whether the adapter must be marked as a misaligned model."""
        return self.stage not in HARMLESS_STAGES


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
