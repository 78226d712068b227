"""How long a study takes on a number of GPUs, by playing its plan through; with preemptions if wanted.

Stages start as soon as those before them are done and a slot is free, the one with the longest chain
behind it first, which is also Slurm's order when arrays are submitted in the plan's order and priority
grows with age. A preempted stage waits ``requeue_minutes`` and goes on from its last state.
"""

import heapq
import math
import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from evaluate.stages import Stage, critical_minutes


@dataclass(frozen=True, slots=True, kw_only=True)
class Preemptions:
    """How often a running stage loses its node, and what that costs."""

    mean_minutes: float  # of running until the next one, exponentially distributed
    requeue_minutes: float = 5.0  # in the queue before it runs again
    setup_minutes: float = 3.0  # of loading before it makes progress, at every start
    state_minutes: float = 15.0  # of work between two states; what was done since the last is lost
    warned: bool = False  # a signal comes first, so that nothing is lost


@dataclass(frozen=True, slots=True)
class Forecast:
    """What came of one play."""

    hours: float  # from the first start to the last end
    gpu_hours: float  # held, start-ups and lost work included
    preemptions: int


def play(stages: Sequence[Stage], gpus: int, *, preempted: Preemptions | None = None, seed: int = 0) -> Forecast:
    """Play the plan on ``gpus`` GPUs; stages that need none do not wait for one."""
    generator = random.Random(seed)
    rank = critical_minutes(stages)
    by_id = {s.id: s for s in stages}
    left = {s.id: s.minutes for s in stages}
    waits = {s.id: len(s.after) for s in stages}
    followers: dict[str, list[str]] = defaultdict(list)
    for stage in stages:
        for earlier in stage.after:
            followers[earlier].append(stage.id)
    ready: list[tuple[float, str]] = []  # for a GPU
    unbound: list[tuple[float, str]] = []  # that need none
    for stage in stages:
        if not stage.after:
            heapq.heappush(ready if stage.gpus else unbound, (-rank[stage.id], stage.id))
    events: list[tuple[float, str, str]] = []  # when, which stage, what: "end", "lost" or "back"
    now, free, held, count = 0.0, gpus, 0.0, 0
    while ready or unbound or events:
        # the most urgent first; one that does not fit holds up those behind it, as Slurm does without backfill
        while unbound or (ready and by_id[ready[0][1]].gpus <= free):
            stage = by_id[heapq.heappop(unbound or ready)[1]]
            free -= stage.gpus
            setup = preempted.setup_minutes if preempted and stage.gpus else 0.0
            lasts = left[stage.id] + setup
            until = generator.expovariate(1.0) * preempted.mean_minutes if preempted and stage.gpus else math.inf
            held += stage.gpus * min(lasts, until)
            if until < lasts and preempted:
                done = max(0.0, until - setup)
                kept = done if preempted.warned else done // preempted.state_minutes * preempted.state_minutes
                left[stage.id] -= kept
                heapq.heappush(events, (now + until, stage.id, "lost"))
            else:
                heapq.heappush(events, (now + lasts, stage.id, "end"))
        if not events:
            break
        now, name, what = heapq.heappop(events)
        if what == "back":
            heapq.heappush(ready, (-rank[name], name))
            continue
        free += by_id[name].gpus
        if what == "lost":
            count += 1
            assert preempted is not None
            heapq.heappush(events, (now + preempted.requeue_minutes, name, "back"))
            continue
        for follower in followers[name]:
            waits[follower] -= 1
            if waits[follower] == 0:
                heapq.heappush(ready if by_id[follower].gpus else unbound, (-rank[follower], follower))
    assert not ready, f"{gpus} GPUs are too few for {ready[0][1]}"
    return Forecast(now / 60, held / 60, count)
