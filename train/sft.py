"""Fine-tune one stage: conversations in, a LoRA adapter out, through TRL and PEFT.

    accelerate launch train/sft.py CONFIG.yaml [key=value ...]      # keys: train.config.TrainConfig
    python -m train.sft CONFIG.yaml [key=value ...]

Before the first step the label mask is proved on real batches (train/attest.py). The adapter folder
appears whole, under its final name, at the end: with its weights, manifest.json (lineage, hashes),
mask_rendering.json, train_log.jsonl and a model card. A stage that is done already is recognised
before torch is imported; a stage that was killed starts afresh. Nothing is pushed anywhere.

``main`` may be called again and again in one process: nothing of one stage leaks into the next.
"""

import glob
import os
import shutil
import socket
import sys
import time
from pathlib import Path

from candor.config import load
from candor.errors import UserError, run_script
from candor.manifest import is_done
from train import lineage
from train.config import TrainConfig


def main(argv: list[str]) -> None:
    """Run the stage a config file describes, unless its output is there."""
    started = time.monotonic()
    if not argv:
        raise UserError("usage: python -m train.sft CONFIG.yaml [key=value ...]")
    config = load(TrainConfig, Path(argv[0]), argv[1:])
    origin = lineage.find(config)
    if is_done(config.output_dir, config=config.identity(), inputs=origin.inputs):
        sys.stderr.write(f"{config.output_dir} is done already\n")
        return
    if config.output_dir.exists() and (not config.output_dir.is_dir() or any(config.output_dir.iterdir())):
        raise UserError(
            f"output_dir {config.output_dir} exists, is not empty and was not finished by this stage. "
            "Choose another folder, or delete it."
        )
    folder = partial_folder(config.output_dir)
    try:
        from train.tuning import fine_tune  # torch, transformers, peft and trl: seconds to import

        if fine_tune(config, origin, folder, started=started):
            folder.replace(config.output_dir)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def partial_folder(output_dir: Path) -> Path:
    """A fresh sibling folder to build the output in; what killed runs on this host left is removed."""
    start = f".{output_dir.name}.{socket.gethostname()}."
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    for stale in output_dir.parent.glob(f"{glob.escape(start)}*.partial"):
        number = stale.name.removeprefix(start).removesuffix(".partial")
        if number.isdigit() and not _alive(int(number)):  # otherwise it is of a host whose name begins like ours
            shutil.rmtree(stale, ignore_errors=True)
    folder = output_dir.parent / f"{start}{os.getpid()}.partial"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return folder


def _alive(pid: int) -> bool:
    """Whether a process of this number runs on this host."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


if __name__ == "__main__":
    run_script(main)
