"""A request to stop soon, SIGUSR1: a cluster sends it before a job's time is over.

Training then writes a state to continue from after the step it is in, and ends. Several processes
could hear of it at different steps and would wait for each other for ever, so they go on as if nothing
was said and continue from their last state.
"""

import signal
import threading
from types import FrameType

from candor.errors import UserError

_requested = threading.Event()


class Stopped(UserError):
    """Training ended early as it was asked to; run again, it continues."""

    status = 75  # scripts/slurm/lib.sh asks Slurm for another turn


def listen() -> None:
    """From now on note the signal instead of dying of it; only a process's main thread can."""
    _requested.clear()
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGUSR1, _note)


def requested() -> bool:
    """Whether the signal came."""
    return _requested.is_set()


def _note(number: int, frame: FrameType | None) -> None:
    _requested.set()
