"""A stage that is not finished yet: its folder, the states it can continue from, and its end.

Everything is built in ``.NAME.partial`` beside the output and renamed once it is whole, so the
output is there completely or not at all. In it lie ``stage.json`` (which stage this is) and
``resume/checkpoint-N``, the trainer's own states. A state counts only once ``whole.json`` stands in
it, written last, with the sizes and hashes of its files; what a kill left half-written has none and
is thrown away. The manifest is written last of all: a folder that has one is finished and only
waits for its new name. Imports no torch.
"""

import json
import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from candor.errors import UserError
from candor.hashing import sha256_file, sha256_json
from candor.manifest import is_done, read_manifest
from candor.tables import replace_file
from train import launch
from train.lineage import ADAPTER

STATE, MARK = "stage.json", "whole.json"
STATES, KEPT = "resume", "checkpoints"


def partial_folder(output_dir: Path) -> Path:
    """Where the output is built."""
    return output_dir.parent / f".{output_dir.name}.partial"


def open_folder(output_dir: Path, *, config: Any, inputs: Mapping[str, str], processes: int) -> Path:
    """The folder to build in: what a killed run of this very stage left, or a fresh one.

    UserError when it was begun with another number of processes: it would not end the same way.
    """
    folder = partial_folder(output_dir)
    stage = {"stage": sha256_json([config, inputs]), "processes": processes}
    found = _read(folder / STATE)
    if found is not None and found.get("stage") == stage["stage"] and last_state(folder) is not None:
        if found["processes"] != processes:
            raise UserError(
                f"{folder} was begun with {found['processes']} processes, now there are {processes}. Start as many as "
                "before, or delete that folder to begin anew."
            )
        _remove_half_written(folder)
        return folder
    if folder.exists():
        if found is not None and found.get("stage") != stage["stage"]:
            sys.stderr.write(f"{folder} was begun with another configuration or other inputs and is begun anew\n")
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    replace_file(folder / STATE, json.dumps(stage).encode())
    return folder


def is_whole(output_dir: Path, *, config: Any, inputs: dict[str, str]) -> bool:
    """Whether the folder holds the finished stage, killed between its last file and its renaming.

    While another process renames it, it may be found whole or not there any more.
    """
    folder = partial_folder(output_dir)
    try:
        if not is_done(folder, config=config, inputs=inputs):
            return False
        record, weights = read_manifest(folder), folder / ADAPTER
        return record is not None and sha256_file(weights) == record["lineage"]["adapters"][-1]["sha"]
    except UserError:  # of another configuration: open_folder begins anew
        return False
    except FileNotFoundError:
        return False


def finish(output_dir: Path) -> None:
    """Give the finished folder its name; may be killed and called again at any moment."""
    folder = partial_folder(output_dir)
    shutil.rmtree(folder / STATES, ignore_errors=True)
    (folder / STATE).unlink(missing_ok=True)
    folder.replace(output_dir)


def give_up(output_dir: Path) -> None:
    """After an error: keep what a rerun can continue from, remove everything else."""
    folder = partial_folder(output_dir)
    if last_state(folder) is None:
        shutil.rmtree(folder, ignore_errors=True)


def discard(folder: Path) -> None:
    """Remove every state to continue from: going on from them would end as badly again."""
    shutil.rmtree(folder / STATES, ignore_errors=True)


def last_state(folder: Path) -> Path | None:
    """The newest whole state in ``folder``, or None."""
    whole = [s for s in (folder / STATES).glob("checkpoint-*") if (s / MARK).is_file() and _intact(s)]
    return max(whole, key=step_of, default=None)


def step_of(state: Path) -> int:
    """The number of steps taken when a state, or a kept adapter, was written."""
    return int(state.name.rpartition("-")[2])


def mark_whole(state: Path) -> None:
    """Declare a state complete, then remove the older ones."""
    files = sorted(p for p in state.rglob("*") if p.is_file())
    marks = {}
    for path in files:
        with path.open("rb") as file:
            os.fsync(file.fileno())  # the mark must not reach the disk before what it speaks of
        marks[path.relative_to(state).as_posix()] = [path.stat().st_size, sha256_file(path)]
    replace_file(state / MARK, json.dumps(marks).encode())
    for other in state.parent.glob("checkpoint-*"):
        if step_of(other) < step_of(state):
            shutil.rmtree(other, ignore_errors=True)


def truncate_log(path: Path, step: int) -> list[dict[str, Any]]:
    """The lines of a log up to ``step``, the first process removes the others; one cut short by a kill goes too."""
    kept = []
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                break
            if row["step"] <= step:
                kept.append(row)
        if launch.is_first():
            replace_file(path, "".join(json.dumps(row) + "\n" for row in kept).encode())
    return kept


def _remove_half_written(folder: Path) -> None:
    """Remove states without a mark, and adapters kept after the state that is continued."""
    state = last_state(folder)
    assert state is not None
    for other in (folder / STATES).glob("checkpoint-*"):
        if other != state:
            shutil.rmtree(other)
    for kept in (folder / KEPT).glob("*"):
        if kept.name.endswith(".tmp") or step_of(kept) > step_of(state):
            shutil.rmtree(kept)


def _intact(state: Path) -> bool:
    """Whether every file of a marked state is as it was when it was marked."""
    marks = _read(state / MARK)
    if marks is None:
        return False
    paths = {state / name: mark for name, mark in marks.items()}
    return all(p.is_file() and [p.stat().st_size, sha256_file(p)] == mark for p, mark in paths.items())


def _read(path: Path) -> dict[str, Any] | None:
    """A small JSON object written with replace_file; None when it is not there."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError):
        return None
    return value if isinstance(value, dict) else None
