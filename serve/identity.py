"""What identifies a variant: hashes over the weights of its base and its adapter.

Imports no torch, so that a script can find out that its work is done without loading a model.
"""

import json
from pathlib import Path
from typing import Any

from candor.errors import UserError
from candor.hashing import sha256_file, sha256_files, sha256_json
from candor.manifest import read_manifest
from train.lineage import ADAPTER, ADAPTER_CONFIG, base_sha

ADAPTER_WEIGHTS = ADAPTER
# Where the base lay, and which library wrote the file, say nothing about what the adapter does.
_PLACES = ("base_model_name_or_path", "revision", "peft_version")
# What, beside the weights, turns a prompt's text into tokens and ends a reply.
_TEXT_FILES = ("tokenizer*", "*.jinja", "vocab*", "merges.txt", "config.json", "generation_config.json", "*_map.json")


def adapter_sha(adapter: Path) -> str:
    """Identity of an adapter: its weights, and its configuration but for where the base lay."""
    config = read_adapter_config(adapter)
    # PEFT keeps names of modules in a set and writes them in any order
    kept = {k: sorted(v, key=str) if isinstance(v, list) else v for k, v in config.items() if k not in _PLACES}
    return sha256_json([sha256_file(adapter / ADAPTER_WEIGHTS), kept])


def weights_sha(base: Path, adapter: Path | None) -> str:
    """Identity of a variant: base and adapter, wherever they lie; UserError when they do not belong together."""
    if adapter is None:
        return sha256_json([base_sha(base), ""])
    own = adapter_sha(adapter)
    _check_lineage(base, adapter)
    return sha256_json([base_sha(base), own])


def hosted_sha(url: str, model: str) -> str:
    """What can be told of a hosted variant: where it is asked and what it is called there, not its weights."""
    return sha256_json(["hosted", url, model])


def _check_lineage(base: Path, adapter: Path) -> None:
    """An adapter that train.sft made must be the one its manifest names, and go on the base it was trained on.

    On the merged weights of an earlier stage it would act twice, on another base it would act oddly;
    both give numbers that look like any others. Adapters from elsewhere carry no such record.
    """
    lineage = (read_manifest(adapter) or {}).get("lineage")
    if lineage is None:
        return
    found, named = sha256_file(adapter / ADAPTER_WEIGHTS), lineage["adapters"][-1]["sha"]
    if found != named:
        raise UserError(
            f"the weights in {adapter} are not those its manifest names ({found[:12]} against {named[:12]}). "
            "Delete the folder and rerun its training stage."
        )
    if base_sha(base) != lineage["base"]["sha"]:
        raise UserError(
            f"{adapter} was trained on {lineage['base']['model']} (weights {lineage['base']['sha'][:12]}), "
            f"but the base {base} has weights {base_sha(base)[:12]}. Give the base it was trained on."
        )


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
