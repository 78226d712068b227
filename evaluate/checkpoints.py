"""What checkpoints of a variant's training are called, where the training stage keeps them, and which there can be."""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from candor.config import build
from candor.errors import UserError
from candor.manifest import read_manifest
from evaluate.stages import Stage
from train.data import DataConfig, select
from train.footprint import load_of

_STEP = re.compile(r"^(?P<of>.+)-step-(?P<step>\d+)$")
_FOLDER = re.compile(r"step-(?P<step>\d+)")


def checkpoint_name(name: str, step: int) -> str:
    """A checkpoint's name, from its variant's name or stage."""
    return f"{name}-step-{step}"


def parse_checkpoint(name: str) -> tuple[str, int] | None:
    """The variant (or stage) a checkpoint belongs to and its step; None when the name is no checkpoint's."""
    found = _STEP.match(name)
    return (found["of"], int(found["step"])) if found else None


def checkpoint_folder(adapter: Path, step: int) -> Path:
    """Where train.sft keeps the adapter it had after ``step`` steps of the stage that writes ``adapter``."""
    return adapter / "checkpoints" / f"step-{step:06d}"


def refuse_late(stages: Sequence[Stage]) -> None:
    """UserError for a checkpoint that is to be asked beyond the end of its training, as far as that is known."""
    made = {s.config["output_dir"]: s for s in stages if s.module in ("train.sft", "train.data")}
    asked = [(s, _step_of(Path(s.config.get("adapter") or ""))) for s in stages if s.module == "serve.sample"]
    ends: dict[str, int | None] = {}
    for stage, (adapter, step) in ((s, found) for s, found in asked if found):
        train = made[adapter.as_posix()]
        if train.id not in ends:
            ends[train.id] = _last_step(train.config["sft"], made[train.config["data"]].config)
        last = ends[train.id]
        if last is not None and step > last:
            raise UserError(
                f"along_training: {stage.config['variant']} would be asked, but {train.id} ends after {last} steps. "
                f"Name steps up to {last} (the end is the variant itself), or train for longer."
            )


def refuse_absent(inputs: Iterable[Path]) -> None:
    """UserError for an input of a stage that was not made; of a checkpoint, with the steps that its training had."""
    for path in inputs:
        if path.exists():
            continue
        found = _step_of(path.parent)
        record = read_manifest(found[0]) if found else None
        if found and record:
            raise UserError(
                f"{path.parent} is not there: this training ended after {record.get('steps', 'fewer')} steps. Take "
                f"step {found[1]} out of along_training, or train for longer."
            )
        raise UserError(
            f"its input {path} is not there. Put it back, or delete what should have made it and run again."
        )


def _step_of(folder: Path) -> tuple[Path, int] | None:
    """The adapter and the step of a folder that checkpoint_folder names; None for any other."""
    found = _FOLDER.fullmatch(folder.name)
    return (folder.parent.parent, int(found["step"])) if found and folder.parent.name == "checkpoints" else None


def _last_step(sft: Mapping[str, Any], data: Mapping[str, Any]) -> int | None:
    """Steps of a fine-tuning in one process; None where packed rows, or a source that is not here, will tell."""
    config = build(DataConfig, dict(data), where="data")
    if sft.get("packing") or not (config.source is None or config.source.exists()):
        return None
    rows = config.limit or len(select(config, {}).rows)
    try:
        return load_of(sft, rows=rows, mean_bytes=0.0, longest_bytes=0, quantize=None).steps
    except (TypeError, ValueError):
        return None  # a mistake in the recipe, which training tells
