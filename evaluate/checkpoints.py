"""What checkpoints of a variant's training are called, and where the training stage keeps them."""

import re
from pathlib import Path

_STEP = re.compile(r"^(?P<of>.+)-step-(?P<step>\d+)$")


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
