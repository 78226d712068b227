"""What Slurm says: the queue, the limits of the cluster, and the answer to sbatch. The one place that calls it."""

import re
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from candor.errors import UserError

NEVER = "DependencyNeverSatisfied"
_ENDED = (
    "COMPLETED",
    "CANCELLED",
    "FAILED",
    "TIMEOUT",
    "NODE_FAIL",
    "PREEMPTED",
    "BOOT_FAIL",
    "OUT_OF_MEMORY",
    "DEADLINE",
)


@dataclass(frozen=True, slots=True)
class Queued:
    """One array element in the queue."""

    state: str  # PENDING, RUNNING, COMPLETING, ...
    reason: str  # why it waits
    node: str
    minutes: str  # how long it has run, as Slurm writes it

    @property
    def alive(self) -> bool:
        """Whether it runs or will run."""
        return self.state not in _ENDED and self.reason != NEVER


def call(words: Sequence[str]) -> str:
    """What a command of Slurm's printed; UserError with what it complained about."""
    if shutil.which(words[0]) is None:
        raise UserError(f"there is no {words[0]} here. Run this on a login node of the cluster.")
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        told = done.stderr.strip().splitlines() or [f"status {done.returncode}"]
        raise UserError(f"{' '.join(words[:6])}{' ...' if len(words) > 6 else ''}: {told[-1]}.")
    return done.stdout


def queue(ids: Iterable[str]) -> dict[str, Queued]:
    """Elements of these arrays that are in the queue, by 12_3."""
    wanted = set(ids)
    if not wanted:
        return {}
    found = {}
    # all there are: squeue refuses a list with a job it has forgotten, and a colleague may have submitted some
    for line in call(["squeue", "-h", "-r", "-o", "%F|%K|%T|%r|%N|%M"]).splitlines():
        job, _, rest = line.partition("|")
        if job in wanted:
            index, state, reason, node, minutes = rest.split("|")
            found[f"{job}_{index}"] = Queued(state, reason, node, minutes)
    return found


def limits() -> tuple[int, int]:
    """MaxArraySize and MaxJobCount of the cluster."""
    text = call(["scontrol", "show", "config"])
    found = dict(re.findall(r"^(MaxArraySize|MaxJobCount)\s*=\s*(\d+)", text, flags=re.MULTILINE))
    return int(found.get("MaxArraySize", 1001)), int(found.get("MaxJobCount", 10000))


def count_queued(*, mine: bool) -> int:
    """Elements in the queue: one's own, or everybody's with those Slurm still remembers, which MaxJobCount counts."""
    return len(call(["squeue", "-h", "-r", "-o", "%i", *(["--me"] if mine else ["-t", "all"])]).splitlines())


def time_limits() -> dict[str | None, int]:
    """Minutes a job may ask for in each partition that limits them; the default partition is None's too."""
    found: dict[str | None, int] = {}
    for line in call(["scontrol", "show", "partition", "--oneliner"]).splitlines():
        words = dict(word.partition("=")[::2] for word in line.split())
        minutes = _minutes(words.get("MaxTime", ""))
        if minutes is not None:
            found[words["PartitionName"]] = minutes
            if words.get("Default") == "YES":
                found[None] = minutes
    return found


def _minutes(text: str) -> int | None:
    """Whole minutes of [days-]hours:minutes:seconds; None for UNLIMITED."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+):(\d+):(\d+)", text)
    if match is None:
        return None
    days, hours, minutes, _ = (int(part or 0) for part in match.groups())
    return (24 * days + hours) * 60 + minutes


def last_words(element: str) -> str:
    """How Slurm says an element ended, while it remembers; empty when it does not."""
    try:
        text = call(["scontrol", "show", "job", element])
    except UserError:
        return _accounted(element)
    state = re.search(r"JobState=(\S+)", text)
    return state[1] if state else ""


def _accounted(element: str) -> str:
    """The same from the accounting, where a cluster keeps one."""
    try:
        lines = call(["sacct", "-n", "-X", "-P", "-j", element, "-o", "State"]).split("\n")
    except UserError:
        return ""
    return lines[0].strip()
