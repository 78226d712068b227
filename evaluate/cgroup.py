"""What a container, a job or a service is held to: its control group's cores and memory, of version 2 or 1.

The machine's own numbers say nothing of such limits, and who goes by them starts more than there is
room for. A limit may stand at the process's own group or at any above it; the lowest counts. What
cannot be read limits nothing.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path

PROC = Path("/proc/self")
_V1, _V2 = "cgroup", "cgroup2"


def cpu_limit(proc: Path = PROC) -> float | None:
    """Cores that the process may use on average; None without a limit."""
    found = []
    for version, folder in _groups("cpu", proc):
        with contextlib.suppress(OSError, ValueError):
            if version == _V2:
                quota, period = (folder / "cpu.max").read_text().split()
            else:
                quota, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
            if quota != "max" and int(quota) > 0:
                found.append(int(quota) / int(period))
    return min(found, default=None)


def memory_left(proc: Path = PROC) -> int | None:
    """Bytes that may still be filled before the process's group is made to give some back; None without a limit."""
    found = []
    for version, folder in _groups("memory", proc):
        new = version == _V2
        with contextlib.suppress(OSError, ValueError):
            limit = int((folder / ("memory.max" if new else "memory.limit_in_bytes")).read_text())
            used = int((folder / ("memory.current" if new else "memory.usage_in_bytes")).read_text())
            cache = "inactive_file" if new else "total_inactive_file"  # of files: given up when it is wanted
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            found.append(max(0, limit - used + int(stat.get(cache, 0))))
    return min(found, default=None)


def _groups(controller: str, proc: Path) -> Iterator[tuple[str, Path]]:
    """The folders of the process's group and of all above it that can be seen, by the version of their files."""
    try:
        of = [line.split(":", 2) for line in (proc / "cgroup").read_text().splitlines()]
        mounts = [line.split() for line in (proc / "mountinfo").read_text().splitlines()]
    except OSError:
        return
    for words in mounts:
        root, point = words[3:5]
        version, _, options = words[words.index("-") + 1 :][:3]
        if version not in (_V1, _V2) or (version == _V1 and controller not in options.split(",")):
            continue
        for number, controllers, path in of:
            if controller in controllers.split(",") if version == _V1 else number == "0":
                # a container's mount may begin at its own group, whose path is then told as seen from outside
                inside = Path(path).relative_to(root) if Path(path).is_relative_to(root) else Path()
                for part in (inside, *inside.parents):
                    yield version, Path(point) / part
