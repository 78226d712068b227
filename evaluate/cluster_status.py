"""How a study fares on the cluster: what is done, running, waiting and failed, why, and what mends it.

See scripts/slurm/status.py. Three sources agree on it: the records of finished stages, Slurm's queue,
and the states that jobs leave (evaluate/cluster_folder.py). A stage that was begun, is not done and is
in no queue any more has failed, whatever it could still say: its node died for good, memory ran out,
or it was cancelled. A record from before a submission says nothing about what that one is to make, such as
more replies of a study that was finished.
"""

import contextlib
import shlex
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from candor.errors import UserError
from evaluate.cluster_folder import Submission, read, read_state, submissions
from evaluate.cluster_queue import Queued, last_words, queue
from evaluate.stages import record_path

DONE, RUNNING, WAITING, FAILED, BLOCKED = "done", "running", "waiting", "failed", "blocked"
RUNS = ("RUNNING", "COMPLETING")  # Slurm's states of what is on a node
COLUMNS = (DONE, RUNNING, WAITING, FAILED, BLOCKED)
_SHOWN = 20
_REASONS = {  # Slurm's words for why an element waits, as far as people need them explained
    "Dependency": "for stages before it",
    "Priority": "for others with a higher priority",
    "Resources": "for a free node",
    "BeginTime": "to be started again after a requeue",
    "JobArrayTaskLimit": "for others of its array (at_once)",
    "QOSMaxJobsPerUserLimit": "at your limit of running jobs",
    "AssocMaxJobsLimit": "at your limit of running jobs",
}
_RELEASE, _ASK_FOR_LESS, _LOOK, _SUBMIT = "release", "ask for less", "look", "submit"
# Reasons that do not pass by themselves: how they begin, in words, and what mends them. Slurm spells some with spaces.
_STUCK = {
    "JobHeldUser": ("until it is released (scontrol hold)", _RELEASE),
    "JobHeldAdmin": ("until it is released: an administrator or Slurm itself holds it", _RELEASE),
    "JobHoldMaxRequeue": ("until it is released: it was requeued too often", _RELEASE),
    "launch failed requeued held": ("until it is released: it could not be started on its node", _RELEASE),
    "job requeued in held state": ("until it is released: it was requeued to be held", _RELEASE),
    "BadConstraints": ("in vain: no node is as it asks (constraint)", _ASK_FOR_LESS),
    "PartitionConfig": ("in vain: it asks for more than its partition gives", _ASK_FOR_LESS),
    "PartitionNodeLimit": ("in vain: it asks for more nodes than its partition gives", _ASK_FOR_LESS),
    "PartitionTimeLimit": ("in vain: it asks for more time than its partition gives", _ASK_FOR_LESS),
    "AssocMaxWallDurationPerJobLimit": ("in vain: it asks for more time than its account has", _ASK_FOR_LESS),
    "QOSMaxWallDurationPerJobLimit": ("in vain: it asks for more time than its QoS gives", _ASK_FOR_LESS),
    "InvalidAccount": ("in vain: its account is not known", _ASK_FOR_LESS),
    "InvalidQOS": ("in vain: its QoS is not known", _ASK_FOR_LESS),
    "PartitionDown": ("for its partition, which is closed", _LOOK),
    "PartitionInactive": ("for its partition, which is closed", _LOOK),
    "ReqNodeNotAvail": ("for nodes that are down, drained or reserved", _LOOK),
    "Nodes required for job are DOWN": ("for nodes that are down, drained or reserved", _LOOK),
}


@dataclass(frozen=True, slots=True)
class Place:
    """Where one stage stands."""

    stage: str
    kind: str
    status: str
    job: str
    why: str = ""
    log: str = ""
    remedy: str = ""  # of one that waits and will not be started by itself: see _STUCK


def main(argv: list[str]) -> None:
    """Print the table of a run."""
    if len(argv) != 1 or argv[0].startswith("-"):
        raise UserError("usage: python scripts/slurm/status.py RUN (the experiment's output folder)")
    run = Path(argv[0])
    sys.stdout.write("\n".join(lines(run, places(run))) + "\n")


def places(run: Path) -> list[Place]:
    """Every stage that was ever submitted, as it stands now."""
    made = submissions(run)
    if not made:
        raise UserError(f"{run} was never submitted to Slurm: it holds no slurm/*/ids.json. Check the path.")
    elements = queue(i for s in made for i in s.ids.values())
    found: dict[str, Place] = {}  # a later submission's word counts
    for submission in made:
        for job, of in submission.elements.items():
            kind = job.partition("-")[0]
            for index, stages in of.items():
                if job not in submission.ids:
                    for stage in stages:
                        done = _made_since(run, stage, submission)
                        later = Place(stage, kind, WAITING, "", "to be submitted", remedy=_SUBMIT)
                        if stage not in found or found[stage].status == DONE:
                            found[stage] = Place(stage, kind, DONE, "") if done else later
                    continue
                element = f"{submission.ids[job]}_{index}"
                log = submission.folder / "logs" / f"{job}-{index}.out"
                for stage in stages:
                    if _made_since(run, stage, submission):
                        found[stage] = Place(stage, kind, DONE, element)
                    else:
                        found[stage] = _place(run, stage, kind, element, elements.get(element), log)
    return list(found.values())


def _made_since(run: Path, stage: str, submission: Submission) -> bool:
    """Whether a stage was recorded as done after a submission that was to make it."""
    with contextlib.suppress(FileNotFoundError):
        begun = (submission.folder / "about.json").stat().st_mtime_ns
        return record_path(run, stage).stat().st_mtime_ns >= begun
    return False


def _place(run: Path, stage: str, kind: str, element: str, queued: Queued | None, log: Path) -> Place:
    """Where one stage stands that has no record, or an old one."""
    state = read_state(run, stage)
    if state is not None and state.job != element:
        state = None  # of an earlier submission
    if queued is not None and queued.alive:
        if queued.state in RUNS:
            begun = state is not None and state.status == RUNNING
            doing = f"on {queued.node} for {queued.minutes}" + ("" if begun else ", not begun yet")
            return Place(stage, kind, RUNNING, element, doing)
        again = f" (stopped before: {state.why})" if state is not None and state.why else ""
        why, remedy = _waits(queued.reason)
        return Place(stage, kind, WAITING, element, why + again, remedy=remedy)
    if state is not None and state.status == "failed":
        return Place(stage, kind, FAILED, element, state.why, state.log or str(log))
    if state is None and not log.exists():
        return Place(stage, kind, BLOCKED, element)  # it never ran: a stage before it failed, or it was cancelled
    if state is None and record_path(run, stage).is_file():
        return Place(stage, kind, DONE, element)  # the job came and found that nothing had changed
    said = last_words(element)
    if queued is None and said in (*RUNS, "PENDING"):  # requeued since the queue was read, or hidden in it
        return Place(stage, kind, RUNNING if said in RUNS else WAITING, element, f"Slurm says {said}")
    why = f"ended{f' on {state.node}' if state else ''} without a word{f'; Slurm says {said}' if said else ''}"
    return Place(stage, kind, FAILED, element, why, str(log))


def _waits(reason: str) -> tuple[str, str]:
    """Slurm's reason in words, and what to do about it, if anything."""
    plain = reason.replace("_", " ")
    for start, told in _STUCK.items():
        if plain.startswith(start):
            return told
    return _REASONS.get(reason, reason), ""


def lines(run: Path, found: Sequence[Place]) -> Iterator[str]:
    """The table, what waits for what, what failed and why, and the command that mends it."""
    count = Counter((place.kind, place.status) for place in found)
    yield f"{run}: {len(found)} stages, {time.strftime('%Y-%m-%d %H:%M')}"
    width = 10
    yield "".join(f"{title:>{width}}" for title in ("", *COLUMNS))
    for kind in dict.fromkeys(place.kind for place in found):
        yield f"{kind:<{width}}" + "".join(f"{count[kind, s] or '-':>{width}}" for s in COLUMNS)
    total = Counter(place.status for place in found)
    yield f"{'all':<{width}}" + "".join(f"{total[s] or '-':>{width}}" for s in COLUMNS)
    for status in (RUNNING, FAILED):
        those = [place for place in found if place.status == status]
        if those:
            yield f"{status}:"
            for place in those[:_SHOWN]:
                yield f"  {place.stage} ({place.job}): {place.why}" + (f"; {place.log}" if place.log else "")
            if len(those) > _SHOWN:
                yield f"  and {len(those) - _SHOWN} more"
    for why, n in Counter(place.why for place in found if place.status == WAITING).most_common():
        yield f"waiting {why}: {n}"
    yield from _mend(run, found, total)


def _mend(run: Path, found: Sequence[Place], total: Mapping[str, int]) -> Iterator[str]:
    """What to do next."""
    about = read(submissions(run)[-1].folder / "about.json")
    words = [word for word in about["command"] if word != "--resubmit-failed"]
    again = f"python scripts/slurm/submit.py {shlex.join(words)}"
    stuck = {
        remedy: " ".join(dict.fromkeys(p.job.partition("_")[0] for p in found if p.remedy == remedy and p.job))
        for remedy in dict.fromkeys(p.remedy for p in found if p.remedy)
    }
    if _RELEASE in stuck:
        yield f"to let go what is held: scontrol release {stuck[_RELEASE]}   (an administrator's hold: ask them)"
    if _ASK_FOR_LESS in stuck:
        yield (
            "to mend what waits in vain, change that key of the profile, then: "
            f"scancel --state=PENDING {stuck[_ASK_FOR_LESS]}; {again}"
        )
    if _LOOK in stuck:
        yield "to see why these nodes are away: sinfo -R   (when they are back, the jobs start by themselves)"
    if total[FAILED]:
        yield f"to mend it, remove the cause, then: {again} --resubmit-failed"
    elif total[BLOCKED]:
        yield f"to submit what was cancelled: {again}"
    elif _SUBMIT in stuck:
        yield f"to submit the rest, when the queue is shorter: {again}"
    elif stuck:
        return
    elif total[RUNNING] or total[WAITING]:
        yield "nothing to mend"
    else:
        yield f"all is done; report: {(run / 'report.html').resolve()}"
