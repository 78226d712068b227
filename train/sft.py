"""Fine-tune one stage: conversations in, a LoRA adapter out, through TRL and PEFT.

    accelerate launch train/sft.py CONFIG.yaml [key=value ...]      # keys: train.config.TrainConfig
    python -m train.sft CONFIG.yaml [key=value ...]

Before the first step the label mask is proved on real batches (train/attest.py), after the last one
what was written is proved to be what was trained (train/parity.py). The adapter folder appears
whole, under its final name, at the end: weights, manifest.json (lineage, hashes), mask_rendering.json,
train_log.jsonl, a model card, and what was asked for besides (probes.jsonl, checkpoints/). A stage
that is done already is recognised before torch is imported; one that was killed continues from its
last state (train/unfinished.py); one that another process is making is waited for (train/claim.py).
Nothing is pushed anywhere.

``main`` may be called again and again in one process: nothing of one stage leaks into the next.
"""

import contextlib
import sys
import time
from pathlib import Path

from candor.config import load
from candor.errors import UserError, run_script
from candor.manifest import is_done
from train import launch, lineage, stopping, unfinished
from train.claim import Check, claimed
from train.config import TrainConfig
from train.lineage import Origin


def main(argv: list[str]) -> None:
    """Run the stage a config file describes, unless its output is there."""
    started = time.monotonic()
    if not argv:
        raise UserError("usage: python -m train.sft CONFIG.yaml [key=value ...]")
    config = load(TrainConfig, Path(argv[0]), argv[1:])
    origin = lineage.find(config)
    if _done(config, origin):
        return
    launch.check()
    if not launch.is_first():
        # as the first process decides: what only waits for its name, or has got it meanwhile, is not trained again
        whole = unfinished.is_whole(config.output_dir, config=config.identity(), inputs=origin.inputs)
        if not whole and not _done(config, origin):
            with stopping.listening(alone=False):
                _train(config, origin, started, check=lambda: None)
        return
    # several processes do not wait: their GPUs would idle, and the others' patience with the first one ends
    alone = launch.processes() == 1
    with claimed(config.output_dir, wait=alone) as check, stopping.listening(alone=alone):
        if not _done(config, origin):  # by the one that was waited for
            _make(config, origin, started, check)


def _done(config: TrainConfig, origin: Origin) -> bool:
    """Whether the output is there; UserError when something else is in its place."""
    if is_done(config.output_dir, config=config.identity(), inputs=origin.inputs):
        sys.stderr.write(f"{config.output_dir} is done already\n")
        return True
    if config.output_dir.exists() and (not config.output_dir.is_dir() or any(config.output_dir.iterdir())):
        raise UserError(
            f"output_dir {config.output_dir} exists, is not empty and was not finished by this stage. "
            "Choose another folder, or delete it."
        )
    return False


def _make(config: TrainConfig, origin: Origin, started: float, check: Check) -> None:
    """Train, or go on training, and give the finished folder its name."""
    identity, inputs = config.identity(), origin.inputs
    if not unfinished.is_whole(config.output_dir, config=identity, inputs=inputs):
        unfinished.open_folder(config.output_dir, config=identity, inputs=inputs, processes=launch.processes())
        try:
            _train(config, origin, started, check)
        except BaseException:
            with contextlib.suppress(OSError):
                unfinished.give_up(config.output_dir)
            raise
    check()
    unfinished.finish(config.output_dir)


def _train(config: TrainConfig, origin: Origin, started: float, check: Check) -> None:
    from train.tuning import fine_tune  # torch, transformers, peft and trl: seconds to import

    fine_tune(config, origin, unfinished.partial_folder(config.output_dir), started=started, check=check)


if __name__ == "__main__":
    run_script(main)
