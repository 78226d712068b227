"""What a submission will take, and why it must not be made: said before anything is in the queue."""

import os
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from candor.config import load, read_yaml
from candor.errors import UserError
from candor.judging import read_template
from candor.rows import Prompt
from evaluate.cluster_forecast import play
from evaluate.cluster_jobs import Job
from evaluate.cluster_profile import Options, Profile
from evaluate.cluster_queue import call
from evaluate.experiment_config import Experiment
from evaluate.hardware import Hardware
from evaluate.judge_config import JudgeConfig, read_judge
from evaluate.modes import complete
from evaluate.plan import endpoints_asked, runs_a_model
from evaluate.questions import gather
from evaluate.stages import Stage, own_inputs
from serve.config import Ask
from serve.plan import is_asked

DEPTHS = (1, 4, 8, 16, 64)  # jobs of a study that run together, of which nobody knows before
_BYTES_PER_TOKEN = 3.0
_GOES_ON = {  # kinds of job that lose nothing, or little, at their time limit
    "train": "training saves itself and is requeued",
    "sample": "replies that are made are kept and the rest is made after a requeue",
    "judge": "verdicts that are given are kept and the rest is given after a requeue",
}
_ONE_PROCESS = ("NO", "MULTI_CPU")  # types of accelerate's that start one, whatever is asked for (train/launch.py)


@dataclass(frozen=True, slots=True)
class Estimate:
    """What is about to be submitted, in numbers."""

    jobs: int
    elements: int
    stages: int
    gpu_hours: float
    hours: dict[int, float]  # from first to last, by how many jobs run together
    measured: bool  # hours come from the profile's hardware, not from what the plan assumes
    disk_gb: float | None
    dollars: float | None  # of judges behind endpoints, at most; None: they state no price
    problems: tuple[str, ...]
    notes: tuple[str, ...] = ()  # what costs time, and nothing else


def estimate(
    experiment: Experiment, profile: Profile, stages: Sequence[Stage], jobs: Sequence[Job], *, max_jobs: int
) -> Estimate:
    """Everything that can be said without a node."""
    wanted = [s for job in jobs for of in job.elements.values() for s in of]
    processes = max((_processes(job, profile) for job in jobs if job.kind == "train"), default=1)
    problems: list[str] = [*_accelerate(profile, processes)]
    notes: dict[tuple[str, str], str] = {}  # one of each sort for a kind of job
    if processes > 1:
        notes["train", "batch"] = (
            f"train: {processes} processes, so a step takes {processes} times a recipe's per_device_train_batch_size x "
            "gradient_accumulation_steps"
        )
    disk, hours_of = None, {}
    if profile.hardware is not None:
        from evaluate.preflight import examine  # counts parameters on the real architecture: imports torch

        sharded = processes > 1 and not problems and _is_sharded(profile.options("train"))
        findings = examine(experiment, load(Hardware, profile.hardware), processes=processes, sharded=sharded)
        problems += findings.problems
        problems += [f"something is not here yet: {command}" for command in findings.to_fetch]
        disk = findings.disk_gb
        hours_of = {name: h for name, h in findings.hours.items() if h is not None}
    timed = [replace(s, minutes=60 * hours_of[s.id]) if s.id in hours_of else s for s in wanted]
    known = {s.id for s in timed}
    timed = [replace(s, after=tuple(a for a in s.after if a in known)) for s in timed]
    slots = [replace(s, gpus=1) for s in timed]  # a job is a job, whatever it holds
    n = sum(len(job.elements) for job in jobs)
    if n > max_jobs:
        notes["", ""] = f"{n} array elements; the queue has room for {max_jobs}, the rest is for later"
    problems += _without_gpu(experiment, profile, jobs)
    for job in sorted(jobs, key=lambda job: _longest(job, hours_of)):
        asked = f"{job.needs.minutes} minutes"
        if job.needs.minutes < job.needs.wanted:
            notes[job.kind, "asked"] = (
                f"{job.kind}: {asked} are asked for, not {job.needs.wanted}: the partition gives no more"
            )
        if hours_of and (longest := _longest(job, hours_of)) * 60 > job.needs.minutes:
            if job.kind in _GOES_ON:
                notes[job.kind, "turns"] = (
                    f"{job.kind}: {longest:.1f} hours are needed at least, in turns of {asked}: {_GOES_ON[job.kind]}"
                )
            else:
                problems.append(
                    f"{job.name}: {longest:.1f} hours are needed at least, {asked} would be asked for. "
                    f"Set kinds.{job.kind}.minutes in the profile (or needs in the experiment)."
                )
        if job.needs.minutes * 60 <= profile.signal_seconds:
            problems.append(f"{job.name}: signal_seconds leaves nothing of its {job.needs.minutes} minutes.")
    return Estimate(
        jobs=len(jobs),
        elements=n,
        stages=len(wanted),
        gpu_hours=_gpu_hours(jobs, profile, {s.id: s.minutes for s in timed}),
        hours={depth: play(slots, depth).hours for depth in DEPTHS},
        measured=bool(hours_of),
        disk_gb=disk,
        dollars=_dollars(experiment, wanted),
        problems=tuple(dict.fromkeys((*problems, *_paths(experiment.output, wanted), *_keys(profile, wanted)))),
        notes=tuple(notes.values()),
    )


def lines(found: Estimate, profile: Profile) -> Iterator[str]:
    """The estimate for people."""
    yield f"{found.stages} stages in {found.elements} array elements, {found.jobs} calls of sbatch"
    where = f"by {profile.hardware}: floors" if found.measured else "by the plan's rough minutes"
    yield f"GPU-hours: {found.gpu_hours:,.1f} ({where})"
    told = ", ".join(f"{hours:.1f} h with {depth}" for depth, hours in found.hours.items())
    yield f"from first to last job: {told} running at once"
    yield "disk: " + (
        "not estimated (the profile names no hardware)" if found.disk_gb is None else f"{found.disk_gb:,.1f} GB"
    )
    cost = "unknown: a judge's endpoint states no price" if found.dollars is None else f"at most ${found.dollars:,.2f}"
    yield f"judges behind endpoints: {cost}"
    yield from (f"note: {note}" for note in found.notes)


_PROBE = """
cd "$1" || exit 0
: >"$2/.probe-$$" && rm "$2/.probe-$$" && echo asked
"$3" -c "" >/dev/null 2>&1 || echo "lost $3"
shift 3
for file; do test -r "$file" || echo "lost $file"; done
"""


def probed(jobs: Sequence[Job], profile: Profile) -> dict[tuple[str, ...], Options]:
    """What tells the nodes of these jobs apart, as options of Slurm's commands: one node of each is asked."""
    every = [profile.options(kind) for kind in dict.fromkeys(job.kind for job in jobs)]
    return {(options.partition or "", options.constraint or ""): options for options in reversed(every)}


def probe(run: Path, profile: Profile, options: Options, stages: Sequence[Stage]) -> str | None:
    """Why a node cannot work with the run folder; None when it can, UserError when no node was free to ask."""
    files = own_inputs(stages, run)[:200]
    place = [f"--{k}={v}" for k, v in _place(options).items() if v]
    words = [
        "srun",
        f"--immediate={profile.probe_seconds}",
        "--time=2",
        "--ntasks=1",
        "--job-name=candor-probe",
        *place,
    ]
    # as a job begins: with what the profile sets up, and in its container
    inside = f'{profile.container} bash -c {shlex.quote(_PROBE)} probe "$@"'
    begin = "\n".join((*profile.setup, f"{inside} 2>&1 || echo failed"))
    words += ["bash", "-c", begin, "probe", os.getcwd(), str(run), profile.program, *map(str, files)]
    told = call(words).splitlines()
    node = f"a node{where_asked(options)}"
    if "failed" in told:
        return f"{node} cannot run '{profile.container} bash': {' '.join(told[:-1])[-300:]}. Mend the key container."
    if "asked" not in told:
        bind = f", and bind it and {os.getcwd()} in the container" if profile.container else ""
        return (
            f"{node} cannot write into {run.absolute()}. Choose an output on a file system that all nodes share{bind}."
        )
    lost = [line.removeprefix("lost ") for line in told if line.startswith("lost ")]
    if profile.program in lost:
        return f"{node} cannot start {profile.program} (python of the profile). Set it up where all nodes see it."
    return (
        f"{node} cannot read {', '.join(lost[:3])}. Put the study's inputs where all nodes see them." if lost else None
    )


def where_asked(options: Options) -> str:
    """The partition and constraint in words; empty where the cluster's defaults hold."""
    told = f" of partition {options.partition}" if options.partition else ""
    return told + (f" with {options.constraint}" if options.constraint else "")


def _place(options: Options) -> dict[str, str | None]:
    return {name: getattr(options, name) for name in ("partition", "account", "qos", "constraint")}


def _gpu_hours(jobs: Sequence[Job], profile: Profile, minutes: dict[str, float]) -> float:
    """Of what the jobs hold, which a profile may set apart from the plan."""
    held = 0.0
    for job in jobs:
        gpus = job.needs.gpus * (profile.options(job.kind).nodes or 1)
        held += gpus * sum(minutes[s.id] for of in job.elements.values() for s in of)
    return held / 60


def _without_gpu(experiment: Experiment, profile: Profile, jobs: Sequence[Job]) -> Iterator[str]:
    """Kinds of job that would ask for no GPU and need one, for jobs do not share one as a machine's stages may."""
    found = dict.fromkeys(
        job.kind
        for job in jobs
        if experiment.device == "cuda"
        and job.needs.gpus == 0
        and profile.options(job.kind).gpus is None  # a profile that says 0 has its reasons, such as its arguments
        and any(runs_a_model(s.module, s.config) for of in job.elements.values() for s in of)
    )
    for kind in found:
        yield f"device is 'cuda', but needs.{kind}.gpus is 0, and jobs share no GPU. Set it to 1."


def _processes(job: Job, profile: Profile) -> int:
    """In how many processes a fine-tuning runs, one a GPU."""
    options = profile.options(job.kind)
    return max(1, job.needs.gpus) * (options.nodes or 1) if options.accelerate else 1


def _is_sharded(options: Options) -> bool:
    """Whether accelerate shares the base model out between the processes."""
    assert options.accelerate is not None
    return str(read_yaml(options.accelerate).get("distributed_type", "")) == "FSDP"


def _accelerate(profile: Profile, processes: int) -> Iterator[str]:
    """What is wrong with the configuration for several processes."""
    path = profile.options("train").accelerate
    if path is None:
        return
    if not path.is_file():
        yield f"{path} (kinds.train.accelerate of the profile) is not there (looked from {Path.cwd()})."
        return
    kind = read_yaml(path).get("distributed_type", "NO") or "NO"  # YAML takes a bare NO for false
    if processes > 1 and kind in _ONE_PROCESS:
        yield (
            f"{path}: with distributed_type {kind} accelerate starts one process a node for itself, and "
            f"{processes} are to train together. Use configs/accelerate/fsdp.yaml or gpus.yaml; without GPUs cpus.yaml."
        )


def _longest(job: Job, hours: dict[str, float]) -> float:
    return max(sum(hours.get(s.id, 0.0) for s in of) for of in job.elements.values())


def _paths(run: Path, stages: Sequence[Stage]) -> Iterator[str]:
    """What is wrong with the run folder and the inputs, as seen from here."""
    place = next(p for p in (run, *run.absolute().parents) if p.exists())
    if not os.access(place, os.W_OK):
        yield f"{place} cannot be written to. Choose another output."
    for path in own_inputs(stages, run):
        if not path.exists():
            yield f"{path} is not there (looked from {Path.cwd()})."


def _keys(profile: Profile, stages: Sequence[Stage]) -> Iterator[str]:
    """Keys of endpoints that no job would find: sbatch hands the variables of this shell on to the jobs."""
    for endpoint in endpoints_asked(stages):
        if endpoint.key_file is None and endpoint.key_env in profile.environment:
            continue
        try:
            endpoint.read_key()
        except UserError as error:
            yield f"{error} Jobs have the variables of the shell you submit from; a file must be seen by their nodes."


def _dollars(experiment: Experiment, stages: Sequence[Stage]) -> float | None:
    """What the judges' endpoints will charge, at most: every reply as long as it may be, none of them alike."""
    prompts = gather(experiment.sources)
    modes = [complete(mode, prompts, max_tokens=experiment.max_tokens) for mode in experiment.read_modes()]
    total = 0.0
    for stage in stages:
        if stage.module != "evaluate.judge" or "samples" not in stage.config:
            continue
        judge = read_judge(Path(stage.config["judge"]))
        if judge.in_process:
            continue
        if judge.price is None:
            return None
        batteries = stage.config.get("batteries", ("harmfulness",))
        share = (stage.config.get("subsample") or {}).get("share", 1.0)
        for prompt in prompts:
            sampled = [a for mode in modes for a in mode.asks if a.mode == "sampled" and is_asked(prompt, a)]
            if prompt.battery in batteries and sampled:
                n = max(a.n for a in sampled) * share
                total += n * judge.price.of(_judge_tokens(judge, prompt, sampled), judge.max_tokens)
    return total


def _judge_tokens(judge: JudgeConfig, prompt: Prompt, sampled: Sequence[Ask]) -> float:
    """Tokens that a judge reads about the longest reply: its template, the question with its options, the reply."""
    template = read_template(judge.template)
    options = [option.label for option in prompt.options] if template.has_options else []
    size = sum(len(text.encode()) for text in (template.text, prompt.text, *options))
    return size / _BYTES_PER_TOKEN + max(a.max_tokens for a in sampled)


def refuse(problems: Sequence[str]) -> None:
    """UserError with every reason at once."""
    if problems:
        told = "\n".join(f"  - {problem}" for problem in problems[:20])
        raise UserError(f"nothing was submitted, for {len(problems)} reasons:\n{told}")
