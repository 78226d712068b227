"""From a plan to Slurm's jobs: the same stages as the local executor's, in job arrays with dependencies.

An array holds stages of one kind that wait for the same things. Where a stage waits for one other
stage (sampling for its adapter, stage two for its stage one), both have the same index in their
arrays and Slurm's ``aftercorr`` lets the one start as soon as the other is done, whatever the rest of
the array does. Cheap stages that everything waits for (questions, data) are one job, which also hashes
large inputs for all others, and so are tables and report. Arrays never reach the cluster's MaxArraySize:
they are split.
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from evaluate.cluster_profile import Options, Profile
from evaluate.stages import Stage

_KINDS = {
    "evaluate.questions": "prepare",
    "train.data": "prepare",
    "train.sft": "train",
    "serve.sample": "sample",
    "evaluate.judge": "judge",
}
_TOGETHER = ("prepare", "report")  # kinds whose stages are one job


@dataclass(frozen=True, slots=True)
class Needs:
    """What one element of an array takes."""

    cores: int
    gpus: int
    memory_gb: float
    minutes: int  # asked for: with the profile's margin, and no more than the partition gives
    wanted: int  # the same, were there no partition


@dataclass(slots=True)
class Job:
    """One array: what ``sbatch`` is called for once."""

    name: str
    kind: str
    needs: Needs
    elements: dict[int, tuple[Stage, ...]] = field(default_factory=dict)  # by index; stages run one after another
    same: str | None = None  # job whose element of the same index must be done first
    whole: tuple[str, ...] = ()  # jobs of which every element must be done first
    queued: tuple[str, ...] = ()  # Slurm's ids of elements submitted earlier that must be done first
    behind: frozenset[str] = frozenset()  # every job that is done before this one starts


def kind_of(stage: Stage) -> str:
    """The kind of job a stage belongs to."""
    return _KINDS.get(stage.module, "report")


def make_jobs(
    stages: Sequence[Stage],
    *,
    done: set[str],
    queued: Mapping[str, str],
    profile: Profile,
    max_array: int,
    max_minutes: Mapping[str | None, int] | None = None,
    hash_minutes: float = 0.0,
) -> list[Job]:
    """The arrays of what is neither done nor in the queue already, each after those it waits for.

    ``queued`` names, by stage, the element of an earlier submission (12_3) that will do it; ``max_minutes``, by
    partition, how long a job may be. ``hash_minutes`` are those that large inputs take to be hashed: the first job
    does it, if it has nothing else to do too, and all others wait for it.
    """
    return _Grouping(done, queued, profile, max_array, max_minutes or {}, hash_minutes).of(stages)


class _Grouping:
    """Places every stage in an array and at an index."""

    def __init__(
        self,
        done: set[str],
        queued: Mapping[str, str],
        profile: Profile,
        max_array: int,
        max_minutes: Mapping[str | None, int],
        hash_minutes: float,
    ) -> None:
        self.done, self.queued, self.profile, self.max_array = done, queued, profile, max_array
        self.max_minutes, self.hash_minutes = max_minutes, hash_minutes
        self.jobs: dict[str, Job] = {}
        self.place: dict[str, tuple[str, int]] = {}  # of a stage: its job and index
        self.open: dict[tuple[object, ...], list[str]] = defaultdict(list)  # jobs by what their elements share
        self.counts: dict[str, int] = defaultdict(int)  # jobs by kind

    def of(self, stages: Sequence[Stage]) -> list[Job]:
        together: dict[str, list[Stage]] = defaultdict(list)
        wanted = [s for s in stages if s.id not in self.done and s.id not in self.queued]
        for stage in wanted:
            if kind_of(stage) in _TOGETHER:
                together[kind_of(stage)].append(stage)
        if together["prepare"] or (wanted and self.hash_minutes):
            self._add("prepare", tuple(together["prepare"]))
        for stage in wanted:
            if kind_of(stage) not in _TOGETHER:
                self._add(kind_of(stage), (stage,))
        if together["report"]:
            self._add("report", tuple(together["report"]))
        return list(self.jobs.values())

    def _add(self, kind: str, stages: tuple[Stage, ...]) -> None:
        """Give an element its place."""
        own = {stage.id for stage in stages}
        after = dict.fromkeys(a for s in stages for a in s.after if a not in own and a not in self.done)
        queued = tuple(self.queued[a] for a in after if a in self.queued)
        before = [self.place[a] for a in after if a in self.place]
        lanes = [p for p in before if self.jobs[p[0]].kind not in _TOGETHER] if kind not in _TOGETHER else []
        same = max(lanes, key=lambda p: len(self.jobs[p[0]].behind)) if lanes else None
        behind = self.jobs[same[0]].behind | {same[0]} if same else frozenset[str]()
        whole = tuple(dict.fromkeys(job for job, index in before if job not in behind))
        if self.hash_minutes and kind != "prepare" and "prepare" not in self._all_behind(behind, whole):
            whole += ("prepare",)
        # an element that waits for two of unlike index waits for more than it must: such plans are not made
        needs = self._needs(kind, stages)
        for nth in range(len(self.jobs) + 1):  # siblings that wait for one element go into arrays side by side
            key = (kind, same[0] if same else None, whole, queued, needs, nth)
            job = self._job(key, kind, needs, same[1] if same else None)
            index = same[1] if same else len(job.elements)
            if index not in job.elements:
                break
        job.elements[index] = stages
        job.same, job.whole, job.queued = same[0] if same else None, whole, queued
        job.behind = self._all_behind(behind, whole)
        self.place.update((stage.id, (job.name, index)) for stage in stages)

    def _all_behind(self, behind: frozenset[str], whole: tuple[str, ...]) -> frozenset[str]:
        """Every job that is done before one behind these."""
        return behind.union(whole, *(self.jobs[name].behind for name in whole))

    def _job(self, key: tuple[object, ...], kind: str, needs: Needs, index: int | None) -> Job:
        """The array for elements of this key, a new one when the last is full."""
        if self.open[key]:
            job = self.jobs[self.open[key][-1]]
            if index is not None or len(job.elements) < self.max_array:
                return job
        self.counts[kind] += 1
        name = kind if kind in _TOGETHER else f"{kind}-{self.counts[kind]}"
        self.jobs[name] = Job(name, kind, needs)
        self.open[key].append(name)
        return self.jobs[name]

    def _needs(self, kind: str, stages: tuple[Stage, ...]) -> Needs:
        """What an element asks for: the plan's, the profile's where it says so."""
        options = self.profile.options(kind)
        minutes = sum(s.minutes if options.minutes is None else options.minutes for s in stages)
        minutes += self.hash_minutes if kind == "prepare" else 0
        wanted = math.ceil(max(minutes * self.profile.margin, self.profile.minutes_at_least))
        # of several partitions (a,b) Slurm takes the first that is free
        names: list[str | None] = [*options.partition.split(",")] if options.partition else [None]
        return Needs(
            cores=options.cores or max((s.cores for s in stages), default=1),
            gpus=max((s.gpus for s in stages), default=0) if options.gpus is None else options.gpus,
            memory_gb=options.memory_gb or max((s.memory_gb for s in stages), default=1.0),
            minutes=min([wanted, *(self.max_minutes[name] for name in names if name in self.max_minutes)]),
            wanted=wanted,
        )


def sbatch_words(
    job: Job, profile: Profile, *, run: str, folder: str, ids: Mapping[str, str] | None = None
) -> list[str]:
    """The sbatch call of one array; ``ids`` are Slurm's of those submitted before it (none in a dry run)."""
    options, needs = profile.options(job.kind), job.needs
    told = {name: f"<{name}>" for name in (job.same, *job.whole) if name} if ids is None else ids
    waits = [f"aftercorr:{told[job.same]}"] if job.same else []
    waits += [f"afterok:{':'.join(told[name] for name in job.whole)}"] if job.whole else []
    waits += [f"afterok:{':'.join(job.queued)}"] if job.queued else []
    throttle = f"%{options.at_once}" if options.at_once else ""
    words = [
        "sbatch",
        "--parsable",
        f"--job-name=candor-{run}-{job.name}",
        f"--array={ranges(sorted(job.elements))}{throttle}",
        *([f"--dependency={','.join(waits)}", "--kill-on-invalid-dep=yes"] if waits else []),
        f"--cpus-per-task={needs.cores}",
        f"--mem={math.ceil(needs.memory_gb * 1024)}M",
        f"--time={needs.minutes}",
        *_request(options, needs),
        "--requeue",
        "--open-mode=append",  # what a job said before it was requeued stays in its log
        f"--signal=B:USR1@{profile.signal_seconds}",
        f"--output={folder}/logs/{job.name}-%a.out",
        *([f"--mail-user={profile.mail_user}", f"--mail-type={profile.mail_type}"] if profile.mail_user else []),
        *options.arguments,
        f"{folder}/element.sh",
        job.name,
    ]
    return words


def _request(options: Options, needs: Needs) -> list[str]:
    """Options of sbatch that a profile decides."""
    nodes = options.nodes or 1
    kind = f"{options.gpu_type}:" if options.gpu_type else ""
    named = {"partition": options.partition, "account": options.account, "qos": options.qos}
    named["constraint"] = options.constraint
    words = [f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1"]
    words += [f"--gres=gpu:{kind}{needs.gpus}"] if needs.gpus else []
    return words + [f"--{name}={value}" for name, value in named.items() if value]


def ranges(indexes: Sequence[int]) -> str:
    """Indexes as Slurm writes them: 0-4,7."""
    found: list[list[int]] = []
    for index in indexes:
        if found and found[-1][1] == index - 1:
            found[-1][1] = index
        else:
            found.append([index, index])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in found)
