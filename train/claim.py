"""One process at a time trains a stage: whoever wants the same output waits, or is told who holds it.

The claim is a file beside the output, kept fresh by its holder (filelock's SoftFileLease): it works
on file systems shared by several machines too. A holder that was killed is noticed at once on its
own machine, and on any other after two minutes without a sign of life; then the claim is taken over.
A holder that lost its claim (its machine slept, say) stops before it writes any further.

Where a short lock is enough, ``flocked`` takes the system's own, which no kill leaves behind; on file
systems that have none (Lustre without -o flock) a claim stands in for it.
"""

import contextlib
import errno
import fcntl
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from filelock import SoftFileLease, Timeout

from candor.errors import UserError

LEASE_SECONDS = 120.0  # without a sign of life, before another machine takes over
_POLL_SECONDS = 1.0
_NO_FLOCK = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)  # how a file system says that it has none

Check = Callable[[], None]


class Lost(UserError):
    """The claim is another process's by now, so this one must not write any further."""


def claim_path(output_dir: Path) -> Path:
    """The file that says who makes ``output_dir``."""
    return output_dir.parent / f".{output_dir.name}.claim"


@contextlib.contextmanager
def claimed(output_dir: Path, *, wait: bool) -> Iterator[Check]:
    """Hold the claim on ``output_dir``; gives a function that raises Lost once the claim is lost.

    While another process holds it: wait for that one to end, or raise UserError that names it, unless it
    has been silent so long already that it will be found dead.
    """
    path = claim_path(output_dir)
    path.parent.mkdir(parents=True, exist_ok=True)
    lease = SoftFileLease(path, lease_duration=LEASE_SECONDS, poll_interval=_POLL_SECONDS)

    def check() -> None:
        if lease.compromise is not None:
            raise Lost(
                f"{output_dir}: this process lost its claim ({lease.compromise.reason}), because it gave no sign of "
                f"life for {LEASE_SECONDS:.0f} seconds; another one may be training the stage. Run it again."
            )

    try:
        lease.acquire(timeout=0)
    except Timeout:
        holder = _holder(lease)
        refused = UserError(
            f"{output_dir} is being made by {holder}. Wait for it, or stop it; if no such process is alive, the "
            f"claim {path} expires after {LEASE_SECONDS:.0f} seconds."
        )
        if not wait and _silence(path) < LEASE_SECONDS:
            raise refused from None
        sys.stderr.write(f"{output_dir} is being made by {holder}; waiting for it to end\n")
        try:
            lease.acquire(timeout=-1 if wait else 2 * LEASE_SECONDS)  # a machine believes its own clock alone
        except Timeout:
            raise refused from None
    try:
        yield check
    finally:
        lease.release()


def _holder(lease: SoftFileLease) -> str:
    """Who holds the claim, in words."""
    owner = lease.owner
    return "another process" if owner is None else f"process {owner.pid} on {owner.hostname}"


def _silence(path: Path) -> float:
    """Seconds since the holder of a claim gave a sign of life."""
    try:
        return time.time() - path.stat().st_mtime
    except FileNotFoundError:  # it has ended
        return LEASE_SECONDS


@contextlib.contextmanager
def flocked(file: int, folder: Path) -> Iterator[None]:
    """Hold the lock of an open file; BlockingIOError while another process does.

    Where the file system has no such locks: hold the claim on ``folder``; UserError that names who does.
    """
    lock: contextlib.AbstractContextManager[object] = contextlib.nullcontext()
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in _NO_FLOCK:
            raise
        lock = claimed(folder, wait=False)
    with lock:
        yield
