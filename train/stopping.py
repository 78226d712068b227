"""A request to stop soon: SIGUSR1 before a cluster job's time is over, SIGTERM when it is preempted or requeued.

Training then writes a state to continue from after the step it is in, and ends. Several processes hear
of it at different steps and agree after each step whether one of them has (train/callbacks.py). They
listen to SIGUSR1 only: by SIGTERM their launcher ends those whom a dead one would keep waiting for ever.
"""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

from candor.errors import UserError

_SIGNALS = (signal.SIGUSR1, signal.SIGTERM)  # the second one Slurm sends to every process of a job
_requested = threading.Event()


class Stopped(UserError):
    """Training ended early as it was asked to; run again, it continues."""

    status = 75  # scripts/slurm/lib.sh asks Slurm for another turn


@contextlib.contextmanager
def listening(*, alone: bool = True) -> Iterator[None]:
    """Meanwhile note the signals instead of dying of them; only a process's main thread can."""
    _requested.clear()
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, _note) for number in (_SIGNALS if alone else _SIGNALS[:1])}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def requested() -> bool:
    """Whether a signal came."""
    return _requested.is_set()


def _note(number: int, frame: FrameType | None) -> None:
    _requested.set()
