"""What a cluster wants to be told: one YAML file in configs/slurm/ per cluster, nothing of it in code.

A profile has a section ``all`` and one for each kind of job (prepare, train, sample, judge, report)
that says only what differs. Its lines end up as options of sbatch and in the head of the script that
every job runs.
"""

import os
import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from candor.config import load
from candor.errors import UserError, nearest

FOLDER = Path("configs/slurm")
KINDS = ("prepare", "train", "sample", "judge", "report")


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What the jobs of one kind ask for; null leaves it to the section ``all``, the plan, or the cluster."""

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    gpu_type: str | None = None  # as in --gres=gpu:TYPE:1
    constraint: str | None = None
    cores: int | None = None  # instead of the plan's
    gpus: int | None = None
    memory_gb: float | None = None
    minutes: float | None = None  # of one stage, instead of the plan's
    nodes: int | None = None  # more than one: training over several, started by srun (with ``accelerate``)
    accelerate: Path | None = None  # configuration of accelerate launch, for training in several processes
    at_once: int | None = None  # elements of one array that may run together
    internet: bool | None = None  # these jobs reach the internet: offline variables are not set
    arguments: tuple[str, ...] = ()  # more options for sbatch, as you would type them


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """One cluster."""

    python: str = ".venv/bin/python"  # seen from the folder of submission, in the container too; or a name on PATH
    all: Options = field(default_factory=Options)
    kinds: dict[str, Options] = field(default_factory=dict)
    setup: tuple[str, ...] = ()  # shell lines before anything runs: module load ..., source ...
    container: str = ""  # what stands before python: apptainer exec --nv --bind /scratch /shared/candor.sif
    environment: dict[str, str] = field(default_factory=dict)  # proxies and others
    offline: bool = True  # tell the Hugging Face libraries that nodes have no internet
    local_disk: str | None = None  # of a node, e.g. $TMPDIR: models and data are copied there, once per node
    hardware: Path | None = None  # configs/hardware/*.yaml: for memory, hours and disk before anything is submitted
    mail_user: str | None = None
    mail_type: str = "END,FAIL"
    margin: float = 1.5  # time asked for, over the plan's
    minutes_at_least: float = 10.0
    signal_seconds: int = 300  # before a job's limit it is told to save what it has and is requeued
    requeues: int = 20  # of one array element in a row that bring it no further, before it counts as failed
    max_array: int | None = None  # null: what the cluster says (MaxArraySize)
    # elements you may have in the queue: MaxSubmitJobs of your account or QoS; null: what the cluster has room for
    # (MaxJobCount)
    max_jobs: int | None = None
    probe_seconds: int = 20  # a node is asked whether it sees the run folder, unless none is free for so long; 0: never

    def __post_init__(self) -> None:
        """Refuse kinds that do not exist and numbers that mean nothing."""
        for kind in self.kinds:
            if kind not in KINDS:
                raise UserError(f"kinds: unknown kind of job {kind!r}; {nearest(kind, KINDS)}")
        if self.margin < 1 or self.minutes_at_least <= 0 or self.signal_seconds < 0 or self.requeues < 0:
            raise UserError(
                "margin must be 1 or more, minutes_at_least above 0, signal_seconds and requeues not below."
            )
        for name in self.environment:
            if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
                raise UserError(f"environment: {name!r} is no name of a variable.")
        self._check_processes()

    def _check_processes(self) -> None:
        """Refuse several nodes and several processes where they would do nothing, or could not be started."""
        for kind in KINDS:
            options = self.options(kind)
            if (options.nodes or 1) > 1 and (kind != "train" or options.accelerate is None):
                remedy = (
                    "Add accelerate: configs/accelerate/fsdp.yaml (or gpus.yaml)."
                    if kind == "train"
                    else "Say so under kinds: {train: {nodes: ...}}."
                )
                raise UserError(
                    f"kinds.{kind}: nodes is {options.nodes}, but a job of this kind works on one; the others would "
                    f"be held for nothing. {remedy}"
                )
        if self.container and self.options("train").accelerate is not None:
            raise UserError(
                "container and kinds.train.accelerate do not go together: training in several processes is started "
                "with srun, which a container does not hold. Use a venv (python, setup) for it."
            )

    @property
    def program(self) -> str:
        """``python`` as it is started: from the folder of submission, whatever folder a container begins in."""
        return os.path.abspath(self.python) if "/" in self.python else self.python  # a venv's link is not followed

    def options(self, kind: str) -> Options:
        """The section ``all`` with what the kind says in its place; arguments are added."""
        own = self.kinds.get(kind, Options())
        merged: dict[str, Any] = {}
        for option in fields(Options):
            value, common = getattr(own, option.name), getattr(self.all, option.name)
            merged[option.name] = (
                (*common, *value) if option.name == "arguments" else common if value is None else value
            )
        return Options(**merged)


def read_profile(name: str) -> Profile:
    """The profile of a name (configs/slurm/NAME.yaml), or in a file."""
    path = Path(name) if name.endswith((".yaml", ".yml")) else FOLDER / f"{name}.yaml"
    if not path.is_file() and path.parent == FOLDER:
        known = sorted(p.stem for p in FOLDER.glob("*.yaml"))
        raise UserError(f"there is no profile {path}; {nearest(name, known)}. Copy {FOLDER}/example.yaml to it.")
    return load(Profile, path)
