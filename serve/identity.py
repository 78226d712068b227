"""What identifies a variant: hashes over the weights of its base and its adapter.

Imports no torch, so that a script can find out that its work is done without loading a model.
"""

import functools
import json
from pathlib import Path
from typing import Any

from candor.errors import UserError
from candor.hashing import sha256_file, sha256_files, sha256_json

ADAPTER_WEIGHTS, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
# Where the base lay and under which name it was fetched says nothing about the adapter.
_PLACES = ("base_model_name_or_path", "revision")
# What, beside the weights, turns a prompt's text into tokens and ends a reply.
_TEXT_FILES = ("tokenizer*", "*.jinja", "vocab*", "merges.txt", "config.json", "generation_config.json", "*_map.json")


def base_sha(base: Path) -> str:
    """Identity of a base model: its safetensors files."""
    if not base.is_dir():
        raise UserError(f"{base} is not a folder (looked from {Path.cwd()}). Give the base model's local folder.")
    files = [p for p in base.glob("*.safetensors") if p.name != ADAPTER_WEIGHTS]
    if not files:
        raise UserError(f"{base} holds no .safetensors weights. Give the folder of a base model saved as safetensors.")
    stats = [(path, path.stat()) for path in sorted(files)]
    return _hash_weights(tuple((path, stat.st_size, stat.st_mtime_ns) for path, stat in stats))


@functools.lru_cache(maxsize=64)
def _hash_weights(files: tuple[tuple[Path, int, int], ...]) -> str:
    """Hash of weight files, worked out once a process: a large base takes a minute, and is asked for thrice."""
    return sha256_files([path for path, _, _ in files])


def adapter_sha(adapter: Path) -> str:
    """Identity of an adapter: its weights, and its configuration but for where the base lay."""
    config = read_adapter_config(adapter)
    kept = {k: v for k, v in config.items() if k not in _PLACES}
    return sha256_json([sha256_file(adapter / ADAPTER_WEIGHTS), kept])


def weights_sha(base: Path, adapter: Path | None) -> str:
    """Identity of a variant: base and adapter, wherever they lie."""
    return sha256_json([base_sha(base), adapter_sha(adapter) if adapter is not None else ""])


def text_sha(base: Path) -> str:
    """Identity of what surrounds the weights: tokenizer, chat template, end-of-turn ids."""
    files = {path for pattern in _TEXT_FILES for path in base.glob(pattern) if path.is_file()}
    return sha256_files(sorted(files))


def read_adapter_config(adapter: Path) -> dict[str, Any]:
    """The adapter's configuration; UserError when the folder is not a PEFT adapter."""
    for name in (ADAPTER_WEIGHTS, ADAPTER_CONFIG):
        if not (adapter / name).is_file():
            raise UserError(f"{adapter} holds no {name} (looked from {Path.cwd()}). Give a PEFT adapter's folder.")
    try:
        config = json.loads((adapter / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{adapter / ADAPTER_CONFIG} is not JSON ({error}). Train the adapter again.") from error
    if not isinstance(config, dict):
        raise UserError(f"{adapter / ADAPTER_CONFIG} is not a JSON object. Train the adapter again.")
    return config
