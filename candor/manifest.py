"""What made a folder: commit, configuration, versions, input hashes, counts in and out.

The manifest is written last, so its presence means that the folder is complete: a stage that was
killed leaves none, and a rerun does the stage again (or continues it).
"""

import functools
import json
import platform
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from candor.errors import UserError
from candor.hashing import sha256_json
from candor.tables import replace_file

NAME = "manifest.json"
COMMIT = "COMMIT"  # in a copy of the code, the commit it was made from
_LIBRARIES = ("torch", "transformers", "trl", "peft", "accelerate", "tokenizers", "numpy", "scipy", "pandas", "pyarrow")


@functools.cache
def commit() -> str:
    """The commit of the code that runs, with '+changes' when the tree differs; 'unknown' outside git."""
    root = Path(__file__).resolve().parent.parent
    if (root / COMMIT).is_file():  # a copy of the code: the repository around it, if any, is another
        return (root / COMMIT).read_text(encoding="utf-8").strip()
    try:
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=True)
        status = subprocess.run(
            ["git", "status", "--porcelain", "--untracked-files=no"],
            cwd=root,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.strip() + ("+changes" if status.stdout.strip() else "")


@functools.cache
def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that decide a result."""
    found = {"python": platform.python_version(), "platform": f"{sys.platform}-{platform.machine()}"}
    for name in _LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def write_manifest(
    folder: Path,
    *,
    stage: str,
    config: Any,
    inputs: dict[str, str],
    counts: dict[str, int],
    left_out: dict[str, int] | None = None,
    seconds: float,
    extra: dict[str, Any] | None = None,
) -> None:
    """Write ``folder/manifest.json``, marking the folder complete.

    ``counts`` must hold "in" and "out"; what did not come out is in ``left_out`` by reason.
    ``inputs`` maps a readable name to a sha256.
    """
    missing = counts["in"] - counts["out"] - sum((left_out or {}).values())
    assert missing == 0, f"{stage}: {counts} and left out {left_out} do not add up (off by {missing})"
    record = {
        "stage": stage,
        "commit": commit(),
        "config": config,
        "config_sha": sha256_json(config),
        "inputs": inputs,
        "counts": counts,
        "left_out": left_out or {},
        "seconds": round(seconds, 3),
        "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "versions": versions(),
        **(extra or {}),
    }
    replace_file(folder / NAME, (json.dumps(record, indent=2, ensure_ascii=False) + "\n").encode())


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a complete folder, or None when the folder is absent or unfinished."""
    path = folder / NAME
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not JSON ({error}). Delete the folder {folder} and rerun.") from error
    if not isinstance(record, dict):
        raise UserError(f"{path} holds {type(record).__name__}, not an object. Delete {folder} and rerun.")
    return record


def is_done(folder: Path, *, config: Any, inputs: dict[str, str]) -> bool:
    """Whether ``folder`` was completed with this very configuration and these inputs.

    Raises UserError when it was completed with others: overwriting someone's results silently
    would lose them, and mixing the two would be worse.
    """
    record = read_manifest(folder)
    if record is None:
        return False
    if record.get("config_sha") == sha256_json(config) and record.get("inputs") == inputs:
        return True
    old_inputs, old_config = record.get("inputs", {}), record.get("config", {})
    changed = sorted(k for k in {*inputs, *old_inputs} if inputs.get(k) != old_inputs.get(k))
    if isinstance(config, dict) and isinstance(old_config, dict):
        changed += sorted(k for k in {*config, *old_config} if config.get(k) != old_config.get(k))
    raise UserError(
        f"{folder} was made with another configuration or other inputs (changed: {', '.join(changed)}). "
        "Choose another output folder, or delete this one to make it anew."
    )
