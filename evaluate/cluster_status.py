"""How a study fares on the cluster: what is done, running, waiting and failed, why, and what mends it.

See scripts/slurm/status.py. Three sources agree on it: the records of finished stages, Slurm's queue,
and the states that jobs leave (evaluate/cluster_folder.py). A stage that was begun, is not done and is
in no queue any more has failed, whatever it could still say: its node died for good, memory ran out,
or it was cancelled.
"""

import shlex
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from candor.errors import UserError
from evaluate.cluster_folder import read, read_state, submissions
from evaluate.cluster_queue import Queued, last_words, queue

DONE, RUNNING, WAITING, FAILED, BLOCKED = "done", "running", "waiting", "failed", "blocked"
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


@dataclass(frozen=True, slots=True)
class Place:
    """Where one stage stands."""

    stage: str
    kind: str
    status: str
    job: str
    why: str = ""
    log: str = ""


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
            for index, stages in of.items() if job in submission.ids else ():
                element = f"{submission.ids[job]}_{index}"
                log = submission.folder / "logs" / f"{job}-{index}.out"
                for stage in stages:
                    found[stage] = _place(run, stage, job.partition("-")[0], element, elements.get(element), log)
    return list(found.values())


def _place(run: Path, stage: str, kind: str, element: str, queued: Queued | None, log: Path) -> Place:
    """Where one stage stands."""
    if (run / "stages" / f"{stage}.json").is_file():
        return Place(stage, kind, DONE, element)
    state = read_state(run, stage)
    if state is not None and state.job != element:
        state = None  # of an earlier submission
    if queued is not None and queued.alive:
        if queued.state in ("RUNNING", "COMPLETING"):
            begun = state is not None and state.status == RUNNING
            doing = f"on {queued.node} for {queued.minutes}" + ("" if begun else ", not begun yet")
            return Place(stage, kind, RUNNING, element, doing)
        again = f" (stopped before: {state.why})" if state is not None and state.why else ""
        return Place(stage, kind, WAITING, element, _REASONS.get(queued.reason, queued.reason) + again)
    if state is not None and state.status == "failed":
        return Place(stage, kind, FAILED, element, state.why, state.log or str(log))
    if state is None and not log.exists():
        return Place(stage, kind, BLOCKED, element)  # it never ran: a stage before it failed, or it was cancelled
    said = last_words(element)
    why = f"ended{f' on {state.node}' if state else ''} without a word{f'; Slurm says {said}' if said else ''}"
    return Place(stage, kind, FAILED, element, why, str(log))


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
    yield _mend(run, total)


def _mend(run: Path, total: Mapping[str, int]) -> str:
    """What to do next."""
    last = submissions(run)[-1]
    words = [word for word in read(last.folder / "about.json")["command"] if word != "--resubmit-failed"]
    again = f"python scripts/slurm/submit.py {shlex.join(words)}"
    if total[FAILED]:
        return f"to mend it, remove the cause, then: {again} --resubmit-failed"
    if total[BLOCKED]:
        return f"to submit what was cancelled: {again}"
    if total[RUNNING] or total[WAITING]:
        return "nothing to mend"
    return f"all is done; report: {(run / 'report.html').resolve()}"
