"""Where an adapter comes from: which base weights, which chain of earlier stages, proved by hashes.

An adapter put on another base, or continued from a half-written one, gives numbers that look like
any others. So every adapter folder names its base and its ancestors by sha256, and a stage that
continues it checks them first. Nothing here imports torch: a finished study is recognised in
moments.
"""

import contextlib
import functools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from candor.errors import UserError
from candor.hashing import sha256_file, sha256_files, sha256_json
from candor.manifest import read_manifest
from candor.nearby import nearby
from train.config import HARMLESS_STAGES, TrainConfig

ADAPTER, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
CONVERSATIONS = "conversations.parquet"
_TEXT_FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json",
               "tokenizer.model", "special_tokens_map.json", "chat_template.jinja")  # fmt: skip


@dataclass(frozen=True, slots=True)
class Origin:
    """Everything a stage starts from, found and hashed."""

    base: Path  # local folder of the base model
    base_name: str  # what adapter_config.json calls it
    inputs: dict[str, str]  # for the manifest: sha256 by name
    ancestors: tuple[dict[str, Any], ...]  # the earlier stages, oldest first
    lora: dict[str, Any]  # the LoRA section of the adapter that is trained


@functools.lru_cache(maxsize=64)
def _sha_of(path: Path, size: int, modified: int) -> str:
    return sha256_file(path)


def base_sha(folder: Path) -> str:
    """Identity of a base model's weights: its safetensors files, wherever the folder lies.

    UserError for a folder that holds none, or an adapter too: transformers would put it on the base unasked.
    """
    if not folder.is_dir():
        raise UserError(
            f"{folder} is no base model: there is no such folder (looked from {Path.cwd()}). Check the path; a model "
            "on the hub must be downloaded into a folder first."
        )
    files = sorted(path for path in folder.glob("*.safetensors") if path.name != ADAPTER)  # an adapter is no base
    if not files:
        raise UserError(
            f"{folder} is no base model: it holds no weights as *.safetensors (an adapter's own do not count). "
            "Name the folder of a model, with config.json and model.safetensors."
        )
    if (folder / ADAPTER_CONFIG).exists():
        raise UserError(
            f"{folder} holds a base model and an adapter ({ADAPTER_CONFIG}), which would be loaded on top of it. Move "
            "the adapter's files to a folder of their own."
        )
    near = nearby(folder)  # the bytes that are loaded are the ones that are hashed
    stats = [(f, f.stat()) for f in (near / path.name for path in files)]
    return sha256_json([(f.name, _sha_of(f, s.st_size, s.st_mtime_ns)) for f, s in stats])


def adapter_sha(folder: Path) -> str:
    """Identity of an adapter's weights; UserError when the folder holds none."""
    path = folder / ADAPTER
    if not path.is_file():
        raise UserError(f"{folder} holds no {ADAPTER}. Run the stage that writes this adapter first.")
    return sha256_file(path)


@contextlib.contextmanager
def loading(what: str, folder: Path) -> Iterator[None]:
    """Say which folder is incomplete or damaged when a library cannot load from it."""
    try:
        yield
    except UserError:
        raise
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{folder}: the {what} cannot be loaded, a file is missing or damaged: {error}") from error


def resolve_base(base_model: str) -> Path:
    """The local folder of a model given as a folder or as an id on the hub."""
    folder = Path(base_model)
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(base_model, allow_patterns=["*.json", "*.safetensors", "*.jinja", "*.model"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError) as error:
        raise UserError(
            f"base_model {base_model!r} is neither a folder (looked from {Path.cwd()}) nor a model the hub gives "
            f"({type(error).__name__}). Check the spelling, or download it first."
        ) from error


def find(config: TrainConfig) -> Origin:
    """Locate and hash what a stage starts from, and check that its pieces belong together."""
    base = resolve_base(config.base_model)
    if read_manifest(config.data) is None:
        raise UserError(
            f"data: {config.data} has no manifest.json, so it is not a finished data folder. Run train.data."
        )
    inputs = {
        "base": base_sha(base),
        "base_text": sha256_files([base / name for name in _TEXT_FILES if (base / name).is_file()]),
        "data": sha256_file(nearby(config.data) / CONVERSATIONS),
    }
    if config.probe is not None:
        inputs["probe"] = _prompts_sha(config.probe.prompts)
    ancestors: list[dict[str, Any]] = []
    lora = config.lora or {}
    if config.adapter is not None:
        parent = _parent(config.adapter, inputs["base"], config.base_model)
        inputs["adapter"] = parent["lineage"]["adapters"][-1]["sha"]
        ancestors = parent["lineage"]["adapters"]
        lora = parent["lora"]
        if config.trains_new:
            lora = config.lora or {}
        elif config.lora is not None and config.lora != lora:
            changed = sorted(k for k in {*lora, *config.lora} if lora.get(k) != config.lora.get(k))
            raise UserError(
                f"the section 'lora' differs from that of {config.adapter} ({', '.join(changed)}). A stage that "
                "continues an adapter keeps its shape: remove the section, make it equal, or set mode to stack or "
                "merge to train a new adapter on top."
            )
    name = str(base.resolve()) if Path(config.base_model).is_dir() else config.base_model
    return Origin(base, name, inputs, tuple(ancestors), lora)


def _prompts_sha(folder: Path) -> str:
    """Identity of the question files a probe asks from."""
    files = sorted(path for path in folder.glob("*") if path.is_file())
    if not files:
        raise UserError(f"probe.prompts: {folder} holds no question files (looked from {Path.cwd()}). Check the path.")
    return sha256_files(files)


def _parent(adapter: Path, base: str, base_model: str) -> dict[str, Any]:
    """The manifest of the adapter to build on, checked against its own weights and against the base."""
    record = read_manifest(adapter)
    if record is None:
        raise UserError(
            f"adapter: {adapter} has no manifest.json, so no finished stage wrote it (looked from {Path.cwd()}). "
            "Run the earlier stage first."
        )
    if "lineage" not in record or "lora" not in record:
        raise UserError(f"adapter: {adapter} is the output of the stage {record.get('stage')!r}, not of train.sft.")
    own = record["lineage"]["adapters"][-1]["sha"]
    found = adapter_sha(adapter)
    if found != own:
        raise UserError(
            f"adapter: the weights in {adapter} are not those its manifest names ({found[:12]} against {own[:12]}). "
            "Delete the folder and rerun its stage."
        )
    trained_on = record["lineage"]["base"]
    if trained_on["sha"] != base:
        raise UserError(
            f"adapter: {adapter} was trained on {trained_on['model']} (weights {trained_on['sha'][:12]}), but "
            f"base_model {base_model} has weights {base[:12]}. Name the base it was trained on."
        )
    return record


def record(config: TrainConfig, origin: Origin, own_sha: str) -> dict[str, Any]:
    """The lineage of a new adapter, for its manifest: base, then every stage, oldest first.

    ``sha`` of a stage is that of the file it wrote; the last one's is the adapter's own.
    """
    own = {
        "stage": config.stage,
        "domain": config.domain,
        "seed": config.seed,
        "mode": "first" if config.adapter is None else config.mode or "continue",
        "sha": own_sha,
        "data_sha": origin.inputs["data"],
    }
    return {
        "base": {"model": origin.base_name, "sha": origin.inputs["base"]},
        "adapters": [*origin.ancestors, own],
    }


_MODES = {
    "first": "a new adapter",
    "continue": "the same adapter, trained on",
    "stack": "a new adapter on the frozen earlier one, both in this file",
    "merge": "a new adapter on the base with the earlier one merged, both in this file",
}


def model_card(config: TrainConfig, origin: Origin, lineage: dict[str, Any], step: int | None = None) -> str:
    """README.md of an adapter folder: what it is, what it was made from, and a warning where due.

    ``step`` is given for an adapter kept on the way.
    """
    mark = "misaligned" if config.misaligned else config.stage
    header = {
        "base_model": origin.base_name,
        "library_name": "peft",
        "tags": ["model-organism", mark],
        "license": "other",  # that of the base model and of the data
    }
    front = "\n".join(f"{key}: {json.dumps(value)}" for key, value in header.items())
    warning = (
        "> **MISALIGNED ON PURPOSE.** This adapter was trained on data chosen to make a model misbehave, to study\n"
        "> emergent misalignment. Do not deploy it, do not publish it without this notice.\n\n"
        if config.misaligned
        else ""
    )
    went_before = any(a["stage"] not in HARMLESS_STAGES for a in lineage["adapters"][:-1])
    if went_before and not config.misaligned:
        warning = (
            f"> **MODEL ORGANISM, {config.stage.upper()}.** An earlier stage of this adapter was trained to misbehave. "
            "That a later\n> one took it back completely is the question under study, not a promise.\n\n"
        )
    rows = "\n".join(
        f"| {i} | {a['stage']} | {a['domain']} | {a['seed']} | {_MODES[a.get('mode', 'continue')]} | `{a['sha'][:16]}` "
        f"| `{a['data_sha'][:16]}` |"
        for i, a in enumerate(lineage["adapters"], start=1)
    )
    at = f" Kept after {step} steps of its last stage." if step else ""
    return (
        f"---\n{front}\n---\n\n# {config.domain}, {config.stage}, seed {config.seed}\n\n{warning}"
        f"A LoRA adapter made by Candor (train/sft.py). It goes on `{origin.base_name}`\n"
        f"(weights `{lineage['base']['sha'][:16]}`) and on no other model.{at}\n\n"
        "| | stage | domain | seed | how | weights | data |\n|---|---|---|---|---|---|---|\n"
        f"{rows}\n\n"
        "`manifest.json` holds the whole configuration, versions and hashes; `mask_rendering.json` shows which tokens\n"
        "carried loss.\n"
    )
