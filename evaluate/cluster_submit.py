"""Submits a study to Slurm: estimate, refusals, a frozen copy of the code, then one sbatch call per array.

See scripts/slurm/submit.py. Submitting again is always safe: what is done or in the queue is left
alone; what failed goes in again with ``--resubmit-failed``, and with it all that waited for it. Where
the queue has no room for all, arrays are sent in the order of the plan as far as they fit.
"""

import contextlib
import os
import re
import shlex
import shutil
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from candor.config import load
from candor.errors import UserError
from candor.manifest import COMMIT, commit
from evaluate import cluster_checks as checks
from evaluate.cluster_folder import (
    FOLDER,
    State,
    new_folder,
    read_job,
    read_marks,
    read_state,
    submissions,
    write,
    write_jobs,
    write_marks,
)
from evaluate.cluster_jobs import Job, make_jobs, ranges, sbatch_words
from evaluate.cluster_profile import Profile, read_profile
from evaluate.cluster_queue import NEVER, call, count_queued, limits, queue, time_limits
from evaluate.crew import Machine, locked
from evaluate.executor import Executor
from evaluate.experiment_config import Experiment
from evaluate.plan import build_plan
from evaluate.run_folder import claim_run, refuse_other
from evaluate.stages import FileMark, Records, Stage, changed_keys, deciding, own_inputs, record_path

USAGE = (
    "usage: python scripts/slurm/submit.py EXPERIMENT.yaml --profile NAME [--dry-run] [--resubmit-failed] "
    "[key=value ...]"
)
_ROOMS = ("candor", "train", "serve", "evaluate", "scripts/slurm")
_HASH_NOW = 64_000_000  # bytes; larger inputs are hashed by the first job, not on the login node
_HASH_PER_MINUTE = 6e9  # bytes: 100 MB/s, as of a network file system that others use too
_ACCELERATE = "accelerate.yaml"  # the copy among the code
# The limit of an account or a QoS, not of the cluster
_TOO_MANY = re.compile(r"submit limit|MaxSubmit|QOS policy", re.IGNORECASE)
_MAX_JOBS = (
    " If that is the limit on submitted jobs (sacctmgr show assoc user=$USER format=QOS,MaxSubmit; sacctmgr show qos "
    "format=Name,MaxSubmitPU), set max_jobs in the profile to it: arrays are split to fit, the rest is for later."
)
_OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE")

Say = Callable[[str], None]


def main(argv: list[str]) -> None:
    """Submit the study a command line names."""
    words, name, flags = _parse(argv)
    experiment, profile = load(Experiment, Path(words[0]), words[1:]), read_profile(name)
    submit(experiment, profile, _say, words=argv, dry_run="--dry-run" in flags, again="--resubmit-failed" in flags)


def submit(
    experiment: Experiment,
    profile: Profile,
    say: Say,
    *,
    words: Sequence[str],
    dry_run: bool = False,
    again: bool = False,
    stages: Sequence[Stage] | None = None,
) -> dict[str, str]:
    """Submit what is neither done nor in the queue; Slurm's number of each array."""
    run = experiment.output
    stages = build_plan(experiment, absent_ok=True) if stages is None else stages  # refused below, with all the rest
    refuse_other(run, experiment.name, stages)
    max_array, room, max_minutes = _limits(profile, say, dry_run)
    with contextlib.nullcontext() if dry_run else locked(run):
        queued, stuck = _in_queue(run)  # before the records are read, for a job may end in between
        done = Executor(stages, run, Machine(1, 1.0), say).find_done()
        for name in () if dry_run else done:
            record_path(run, name).touch()  # what status.py would take for older than what was to make it
        queued = {name: element for name, element in queued.items() if name not in done}
        _refuse_outdated(run, stages, done, queued)
        failed = {} if again else _failed(run, stages, done, queued)
        large = _large(run, [stage for stage in stages if stage.id not in done and stage.id not in queued])
        jobs = make_jobs(
            stages,
            done=done,
            queued=queued,
            profile=profile,
            max_array=max_array,
            max_minutes=max_minutes,
            hash_minutes=sum(path.stat().st_size for path in large) / _HASH_PER_MINUTE,
        )
        say(f"{experiment.name}: {len(stages)} stages, {len(done)} done, {len(queued)} in the queue already")
        if not jobs:
            say("there is nothing to submit")
            return {}
        if room < 1 and not dry_run:
            raise UserError("the queue is full. Run the same command again when it is shorter.")
        found = checks.estimate(experiment, profile, stages, jobs, max_jobs=room)
        for line in checks.lines(found, profile):
            say(line)
        if dry_run:
            for job in jobs:
                sys.stdout.write(
                    shlex.join(sbatch_words(job, profile, run=experiment.name, folder=f"{run}/{FOLDER}/NEW")) + "\n"
                )
        again_with = "When its cause is gone, add --resubmit-failed"
        left = (f"{name} failed: {state.why.rstrip('.')}. {again_with}." for name, state in failed.items())
        checks.refuse((*found.problems, *left))
        if dry_run:
            return {}
        _probe(run, profile, stages, jobs, say)
        if stuck:
            call(["scancel", *stuck])
        return _send(experiment, profile, stages, jobs, words, say, room=room, large=large)


def _send(
    experiment: Experiment,
    profile: Profile,
    stages: Sequence[Stage],
    jobs: Sequence[Job],
    words: Sequence[str],
    say: Say,
    *,
    room: int,
    large: Sequence[Path] = (),
) -> dict[str, str]:
    """Write what the jobs read, then call sbatch for one after another, for ``room`` elements at most."""
    run = experiment.output
    claim_run(run, experiment.name, stages)
    folder = new_folder(run)
    _freeze(folder / "code", profile)
    _mark(folder, run, stages)
    large_names = {"large": [str(path) for path in large]}
    write(folder / "about.json", _about(folder, experiment, profile, jobs, words) | large_names)
    (folder / "element.sh").write_text(script(folder.absolute(), profile))
    write_jobs(folder, jobs)
    ids: dict[str, str] = {}
    sent, why = 0, ""
    for job in jobs:
        if sent + len(job.elements) > room:
            why = f"the queue has room for {room} elements"
            break
        try:
            told = call(sbatch_words(job, profile, run=experiment.name, folder=str(folder.absolute()), ids=ids))
        except UserError as error:
            why = f"{error}{_MAX_JOBS if _TOO_MANY.search(str(error)) else ''}"
            if not ids:
                shutil.rmtree(folder)  # nobody will read it, and the next try would leave one more
                raise UserError(why) from None
            break
        ids[job.name] = told.strip().partition(";")[0]
        write(folder / "ids.json", ids)
        sent += len(job.elements)
    say(f"submitted {sent} elements in {len(ids)} arrays; {folder}")
    if why:
        left = jobs[len(ids) :]
        say(f"not submitted: {sum(len(job.elements) for job in left)} elements in {len(left)} arrays, since {why}")
        say(f"to submit them when the queue is shorter: python scripts/slurm/submit.py {shlex.join(words)}")
    say(f"to see how it goes: python scripts/slurm/status.py {run}")
    return ids


def script(folder: Path, profile: Profile) -> str:
    """The script that every element runs."""
    online = [kind for kind in ("prepare", "train", "sample", "judge", "report") if profile.options(kind).internet]
    offline = [f"  export {name}=1" for name in _OFFLINE] if profile.offline else []
    lines = [
        "#!/bin/bash",
        "# Written by scripts/slurm/submit.py; runs one element: element.sh ARRAY (index from Slurm).",
        f"source {shlex.quote(str(folder / 'code' / 'scripts' / 'slurm' / 'lib.sh'))} || exit 1",
        f"cd {shlex.quote(os.getcwd())} || exit 1",
        # safe path: python -m would put this folder, the original, before the copy
        f"export PYTHONPATH={shlex.quote(str(folder / 'code'))} PYTHONSAFEPATH=1",
        *(f"export {name}={shlex.quote(value)}" for name, value in profile.environment.items()),
        *([f"if [[ ! ${{1%%-*}} =~ ^({'|'.join(online) or 'none'})$ ]]; then", *offline, "fi"] if offline else []),
        *([f'export CANDOR_LOCAL_DISK="{profile.local_disk}"'] if profile.local_disk else []),
        *profile.setup,
        f"export CANDOR_PYTHON={shlex.quote(profile.program)} CANDOR_SIGNAL_SECONDS={profile.signal_seconds}",
        f"hand_over {' '.join(profile.environment)}".rstrip(),
        f"run_requeueable {_inside(profile)}{shlex.quote(profile.program)} -m evaluate.cluster_element "
        f'{shlex.quote(str(folder))} "$1" "$SLURM_ARRAY_TASK_ID"',
        "exit $?",
    ]
    return "\n".join(lines) + "\n"


def _inside(profile: Profile) -> str:
    """What stands before python: a container, which may forget the variables of outside and is handed what counts."""
    return f'{profile.container} env "${{HANDED[@]}}" ' if profile.container else ""


def _about(
    folder: Path, experiment: Experiment, profile: Profile, jobs: Sequence[Job], words: Sequence[str]
) -> dict[str, object]:
    """What elements must know beside their stages."""
    options = profile.options("train")
    launcher = None
    if options.accelerate is not None:
        nodes = options.nodes or 1
        # accelerate is no MPI program; variables of Slurm's MPI would make it, and train/launch.py, believe otherwise
        launcher = ["srun", "--mpi=none", f"--nodes={nodes}", f"--ntasks={nodes}"]
        launcher += ["--ntasks-per-node=1", "--kill-on-bad-exit=1"]
        code = folder.absolute() / "code"
        launcher += ["bash", f"{code}/scripts/slurm/launch.sh", f"{code}/{_ACCELERATE}"]
    return {
        "run": str(experiment.output),
        "from": os.getcwd(),
        "command": list(words),
        "requeues": profile.requeues,
        "signal_seconds": profile.signal_seconds,
        "cores": {job.name: job.needs.cores for job in jobs},
        "launcher": launcher,
    }


def _freeze(copy: Path, profile: Profile) -> None:
    """The code of this moment and what it is launched with, in a folder that the jobs put first on their path."""
    root = Path(__file__).resolve().parent.parent
    for room in _ROOMS:
        shutil.copytree(root / room, copy / room, ignore=shutil.ignore_patterns("weights", "__pycache__"))
    (copy / COMMIT).write_text(commit() + "\n")
    if (accelerate := profile.options("train").accelerate) is not None:
        shutil.copyfile(accelerate, copy / _ACCELERATE)


def _mark(folder: Path, run: Path, stages: Sequence[Stage]) -> None:
    """Note how the inputs are now, but for those too large to be hashed here, unless an earlier submission has."""
    known = _known(run)
    small = [path for path in own_inputs(stages, run) if not _is_large(path, known)]
    records = Records(run, known)
    write_marks(folder, {path: records.mark(path) for path in small})


def _large(run: Path, stages: Sequence[Stage]) -> list[Path]:
    """The inputs that are too large to be hashed here and were not yet."""
    known = _known(run)
    return sorted(path for path in own_inputs(stages, run) if path.is_file() and _is_large(path, known))


def _known(run: Path) -> dict[Path, FileMark]:
    """Inputs as earlier submissions found them."""
    known: dict[Path, FileMark] = {}
    for earlier in submissions(run):
        known |= read_marks(earlier.folder)
    return known


def _is_large(path: Path, known: Mapping[Path, FileMark]) -> bool:
    return path.stat().st_size > _HASH_NOW and not (path in known and known[path].untouched(path))


def _in_queue(run: Path) -> tuple[dict[str, str], list[str]]:
    """Stages that an earlier submission's elements will still make, and elements that will never start."""
    earlier = submissions(run)
    elements = queue(i for s in earlier for i in s.ids.values())
    queued: dict[str, str] = {}
    for submission in earlier:
        for stage, element in submission.stages().items():
            if element in elements and elements[element].alive:
                queued[stage] = element
    return queued, [name for name, of in elements.items() if of.reason == NEVER]


def _refuse_outdated(run: Path, stages: Sequence[Stage], done: set[str], queued: dict[str, str]) -> None:
    """UserError when jobs in the queue would make stages as the study or its inputs were, and not as they are now."""
    now = {stage.id: stage for stage in stages if stage.id in queued}
    anew = {stage.id for stage in stages if stage.id not in done and stage.id not in queued}
    files = [path for path in own_inputs(now.values(), run) if path.is_file()]
    numbers = {element.partition("_")[0] for element in queued.values()}
    found: dict[str, str] = {}  # by element
    for submission in submissions(run):
        jobs = {job: number for job, number in submission.ids.items() if number in numbers}
        marks = read_marks(submission.folder) if jobs else {}
        edited = {path for path in files if path in marks and not marks[path].is_of(path)}
        for job, number in jobs.items():
            for index, of in read_job(submission.folder, job).items():
                element = f"{number}_{index}"
                those = [old for old in of if queued.get(old.id) == element and old.id in now]
                for name, why in ((old.id, _differs(old, now[old.id], anew, edited)) for old in those):
                    if why:
                        found[element] = f"{name} ({element}): {why}"
    if found:
        told = "".join(f"\n  {line}" for line in list(found.values())[:5])
        more = f"\n  and {len(found) - 5} more" if len(found) > 5 else ""
        raise UserError(
            f"nothing was submitted: {len(found)} jobs in the queue would make stages of the study as it was:"
            f"{told}{more}\nWait for them, or end them: scancel {_elements(found)}\nThen submit again."
        )


def _differs(old: Stage, new: Stage, anew: set[str], edited: set[Path]) -> str:
    """In what a stage is not the one that was submitted; empty when it is."""
    keys = changed_keys(*deciding(new.module, old.config, new.config)) if old.config != new.config else []
    if keys:
        return f"config keys {', '.join(keys[:5])}"
    if set(old.inputs) != set(new.inputs) or set(old.after) != set(new.after):
        return "waits for, or reads, something else"
    if made := [name for name in new.after if name in anew]:
        return f"{made[0]} before it is to be made now"
    touched = [path for path in edited if any(i in (path, *path.parents) for i in new.inputs)]
    return f"{touched[0]} was edited" if touched else ""


def _elements(names: Iterable[str]) -> str:
    """Array elements as scancel takes them, an array's together: '12_[0-5,7]'."""
    indexes: dict[str, list[int]] = defaultdict(list)
    for name in names:
        job, _, index = name.partition("_")
        indexes[job].append(int(index))
    return shlex.join(f"{job}_[{ranges(sorted(of))}]" for job, of in indexes.items())


def _failed(run: Path, stages: Sequence[Stage], done: set[str], queued: dict[str, str]) -> dict[str, State]:
    """Stages that an earlier job left, which only ``--resubmit-failed`` takes up again."""
    states = {s.id: read_state(run, s.id) for s in stages if s.id not in done and s.id not in queued}
    return {name: state for name, state in states.items() if state is not None and state.status == "failed"}


def _probe(run: Path, profile: Profile, stages: Sequence[Stage], jobs: Sequence[Job], say: Say) -> None:
    """Let a node of every partition and constraint look at the run folder and the inputs."""
    problems = []
    for options in checks.probed(jobs, profile).values() if profile.probe_seconds else ():
        where = checks.where_asked(options)
        try:
            problem = checks.probe(run, profile, options, stages)
        except UserError as error:
            say(f"no node{where} was free to look at {run} ({error}); the first job will find out")
            continue
        if problem:
            problems.append(problem)
        else:
            say(f"a node{where} can write into {run} and read the inputs")
    checks.refuse(problems)


def _limits(profile: Profile, say: Say, dry_run: bool) -> tuple[int, int, dict[str | None, int]]:
    """How long an array may be, for how many elements the queue has room, and how long a job may be, by partition.

    Assumed where there is no Slurm and nothing is submitted.
    """
    minutes: dict[str | None, int] = {}
    try:
        array, jobs = limits()
        minutes = time_limits()
        there = count_queued(mine=profile.max_jobs is not None)
    except UserError as error:
        if not dry_run:
            raise
        say(f"{error} Arrays of 1001 are assumed.")
        array, jobs, there = 1001, 10000, 0
    jobs = profile.max_jobs or jobs
    room = jobs - there
    return max(1, min(profile.max_array or array, room)), room, minutes


def _parse(argv: Sequence[str]) -> tuple[list[str], str, set[str]]:
    """The experiment with its changes, the profile, and the flags."""
    words = list(argv)
    flags: set[str] = set()
    if "--profile" not in words or words.index("--profile") + 1 >= len(words):
        raise UserError(f"a cluster needs a profile. {USAGE}")
    place = words.index("--profile")
    name = words[place + 1]
    del words[place : place + 2]
    for flag in ("--dry-run", "--resubmit-failed"):
        if flag in words:
            words.remove(flag)
            flags.add(flag)
    if not words or any(word.startswith("-") for word in words):
        raise UserError(USAGE)
    return words, name, flags


def _say(line: str) -> None:
    sys.stderr.write(line + "\n")
    sys.stderr.flush()
