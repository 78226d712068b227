"""Models and training data on a node's own disk: copied there once per node, not read over the network by each job.

Where CANDOR_LOCAL_DISK names no folder, or its disk is full, the shared copy is read and all goes on as
before; a copy that lost files is made anew. Only bytes come from the copy: names in manifests are those of
the shared folder, and hashes are of the bytes that were loaded.
"""

import fcntl
import functools
import os
import shutil
import sys
from pathlib import Path

from candor.hashing import sha256_json

VARIABLE = "CANDOR_LOCAL_DISK"
_SLACK = 1.02  # of a copy: blocks that are not full


@functools.cache
def nearby(folder: Path) -> Path:
    """A copy of ``folder`` on this node's disk, or ``folder`` itself."""
    local = os.environ.get(VARIABLE, "")
    if not local or not folder.is_dir():
        return folder
    files = sorted(path for path in folder.iterdir() if path.is_file())
    stats = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    copy = Path(local) / "candor" / f"{folder.name}-{sha256_json([str(folder.resolve()), stats])[:12]}"
    try:
        copy.parent.mkdir(parents=True, exist_ok=True)
        with copy.with_name(f"{copy.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # the disk is the node's own, where flock is to be trusted
            if copy.is_dir():
                sizes = {path.name: path.stat().st_size for path in copy.iterdir()}
                if all(sizes.get(name) == size for name, size, _ in stats):
                    return copy
                shutil.rmtree(copy)  # cleaners of such disks take files, not folders
            _copy(files, copy, sum(size for _, size, _ in stats))
    except OSError as error:
        sys.stderr.write(f"{folder} is read where it lies, not from {local}: {error}\n")
        return folder
    return copy


def _copy(files: list[Path], copy: Path, size: int) -> None:
    """Copy the files under another name and rename the folder once it is whole; OSError when they do not fit."""
    partial = copy.with_name(f".{copy.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a job that was killed
    free = shutil.disk_usage(copy.parent).free
    if size * _SLACK > free:
        raise OSError(f"{size / 1e9:,.1f} GB are needed, {free / 1e9:,.1f} GB are free")
    try:
        partial.mkdir()
        for path in files:
            shutil.copyfile(path, partial / path.name)
        partial.rename(copy)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
