"""How many processes this stage runs in, and whether that is what was asked for.

``accelerate launch --num_processes 2`` starts a single process on CPUs and says nothing; half the
batch is then trained on. Several processes really start with ``torchrun --nproc_per_node N``, or
with ``accelerate launch --multi_gpu --num_processes N``; on CPUs both need ACCELERATE_USE_CPU=true.
"""

import os
from collections.abc import Sequence
from pathlib import Path

from candor.errors import UserError


def processes() -> int:
    """How many processes the launcher started for this stage."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    """Whether this process is the one that writes."""
    return int(os.environ.get("RANK", "0")) == 0


def check() -> None:
    """UserError when accelerate was told to start several processes and started one."""
    if "ACCELERATE_MIXED_PRECISION" not in os.environ or "WORLD_SIZE" in os.environ:
        return  # not started by accelerate, or started as one of several
    if any(name in os.environ for name in ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")):
        return  # mpirun tells its processes in its own way
    import psutil

    parent = psutil.Process().parent()
    asked = asked_for(parent.cmdline()) if parent else 1
    if asked > 1:
        raise UserError(
            f"accelerate launch was asked for {asked} processes but started one (on CPUs it always does). Start them "
            f"with 'torchrun --nproc_per_node {asked}', or with 'accelerate launch --multi_gpu --num_processes "
            f"{asked}'; on CPUs set ACCELERATE_USE_CPU=true besides. For one process use --num_processes 1."
        )


def asked_for(command: Sequence[str]) -> int:
    """The number of processes an ``accelerate launch`` command line or its config file names; 1 where neither does."""
    words = _after_launch(command)
    if words is None:
        return 1
    from accelerate.commands.config.config_args import default_config_file, load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    arguments = launch_command_parser().parse_args(words)
    if arguments.num_processes:
        return int(arguments.num_processes)
    path = arguments.config_file or default_config_file
    if not Path(path).is_file():
        return 1
    return int(load_config_from_file(path).num_processes or 1)


def _after_launch(command: Sequence[str]) -> list[str] | None:
    """The words after ``accelerate launch``, however it was spelt; None for another program."""
    for place, word in enumerate(command):
        name = Path(word).name
        if word == "accelerate.commands.launch" or name == "accelerate-launch":
            return list(command[place + 1 :])
        if name == "launch.py" and Path(word).parent.name == "commands":
            return list(command[place + 1 :])
        if name in ("accelerate", "accelerate.commands.accelerate_cli") and command[place + 1 : place + 2] == [
            "launch"
        ]:
            return list(command[place + 2 :])
    return None
