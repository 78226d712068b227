"""Whether the disk holds what a stage will write, asked before the first step."""

import math
import resource
import shutil
from pathlib import Path
from typing import Any

from candor.errors import UserError
from train.config import TrainConfig

_BESIDE = 1_000_000  # bytes of logs, renderings, cards and the trainer's small files
_OPTIMIZER = 2  # AdamW keeps two numbers for each that is trained


def check(folder: Path, trainer: Any, config: TrainConfig, *, base: Path, joined_bytes: int) -> None:
    """UserError when the adapter, two states to continue from and the adapters kept on the way cannot be written.

    ``joined_bytes`` is the size of the earlier adapter when the new one is written together with it.
    """
    trained = sum(p.numel() * p.element_size() for p in trainer.model.parameters() if p.requires_grad)
    n_steps = steps_of(trainer)
    n_kept = math.ceil(n_steps / config.checkpoint_every) if config.checkpoint_every else 0
    # the new state is written before the old one is removed; a short run writes none
    n_states = min(2, (n_steps - 1) // config.resume_every)
    adapter = trained + joined_bytes
    state = (1 + _OPTIMIZER) * trained + sum(path.stat().st_size for path in base.glob("tokenizer*"))
    needed = (1 + n_kept) * adapter + n_states * state + _BESIDE
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"{folder.parent}: {needed / 1e6:,.1f} MB are needed (the adapter, {n_kept} kept on the way, {n_states} "
            f"states to continue from), {free / 1e6:,.1f} MB are free. Free some space, or choose another output_dir."
        )
    largest = max(adapter, _OPTIMIZER * trained if n_states else 0)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    if limit != resource.RLIM_INFINITY and largest > limit:
        raise UserError(
            f"a file of {largest / 1e6:,.1f} MB must be written, but this process may write no more than "
            f"{limit / 1e6:,.1f} MB into one. Raise the limit (ulimit -f)."
        )


def steps_of(trainer: Any) -> int:
    """How many optimizer steps the trainer will take."""
    arguments = trainer.args
    if arguments.max_steps > 0:
        return int(arguments.max_steps)
    batches = math.ceil(len(trainer.train_dataset) / (arguments.per_device_train_batch_size * arguments.world_size))
    per_epoch = math.ceil(batches / arguments.gradient_accumulation_steps)
    steps: int = math.ceil(float(arguments.num_train_epochs) * per_epoch)
    return steps
