"""A container's limits are read where the kernel tells them, in files of either version."""

from pathlib import Path

import pytest

from evaluate import crew
from evaluate.cgroup import cpu_limit, memory_left

GIB = 2**30


def proc(folder: Path, groups: str, mounts: str) -> Path:
    """What /proc/self would say; ``{point}`` is where the groups are mounted."""
    (folder / "proc").mkdir()
    (folder / "proc" / "cgroup").write_text(groups)
    (folder / "proc" / "mountinfo").write_text(mounts.format(point=folder))
    return folder / "proc"


def group(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text + "\n")


def v2(memory: str, current: int, inactive: int = 0) -> dict[str, str]:
    stat = f"anon 5\ninactive_file {inactive}"
    return {"memory__max": memory, "memory__current": str(current), "memory__stat": stat}


def v1(limit: int, usage: int, inactive: int = 0) -> dict[str, str]:
    stat = f"cache 5\ntotal_inactive_file {inactive}"
    return {"memory__limit_in_bytes": str(limit), "memory__usage_in_bytes": str(usage), "memory__stat": stat}


def test_the_lowest_limit_on_the_way_up_counts(tmp_path):
    """Version 2; a service's own group says 4 cores and no memory, the slice above it 2.5 and 8 GiB."""
    here = proc(tmp_path, "0::/jobs.slice/me.service\n", "30 1 0:5 / {point}/fs rw - cgroup2 cgroup2 rw\n")
    group(tmp_path / "fs", cgroup__controllers="cpu memory")  # the topmost has no limits
    group(tmp_path / "fs/jobs.slice", cpu__max="250000 100000", **v2(str(8 * GIB), 5 * GIB, inactive=GIB))
    group(tmp_path / "fs/jobs.slice/me.service", cpu__max="400000 100000", **v2("max", GIB))
    group(tmp_path / "fs/other.slice", cpu__max="50000 100000", **v2(str(GIB), 0))
    assert (cpu_limit(here), memory_left(here)) == (2.5, 4 * GIB)


def test_a_container_sees_its_own_group_as_the_topmost(tmp_path):
    here = proc(tmp_path, "0::/\n", "30 1 0:5 / {point}/fs rw - cgroup2 cgroup rw,nsdelegate\n")
    group(tmp_path / "fs", cpu__max="max 100000", **v2(str(2 * GIB), 3 * GIB))
    assert (cpu_limit(here), memory_left(here)) == (None, 0)


def test_version_1_tells_the_path_as_seen_from_outside(tmp_path):
    """A container without a namespace of its own: the mount begins at its group, the path names it from the host."""
    here = proc(
        tmp_path,
        "5:memory:/docker/abc/job\n4:cpu,cpuacct:/docker/abc\n0::/\n",
        "31 1 0:6 /docker/abc {point}/memory rw - cgroup cgroup rw,memory\n"
        "32 1 0:7 /docker/abc {point}/cpu rw - cgroup cgroup rw,cpu,cpuacct\n"
        "33 1 0:8 / {point}/unified rw - cgroup2 cgroup2 rw\n",
    )
    group(tmp_path / "memory", **v1(6 * GIB, 2 * GIB, inactive=GIB))
    group(tmp_path / "memory/job", **v1(2**63 - 4096, GIB))
    group(tmp_path / "cpu", cpu__cfs_quota_us="150000", cpu__cfs_period_us="100000")
    assert (cpu_limit(here), memory_left(here)) == (1.5, 5 * GIB)
    group(tmp_path / "cpu", cpu__cfs_quota_us="-1")
    assert cpu_limit(here) is None


@pytest.mark.parametrize("groups", ["", "nonsense"])
def test_what_cannot_be_read_limits_nothing(tmp_path, groups):
    assert (cpu_limit(tmp_path / "nowhere"), memory_left(tmp_path / "nowhere")) == (None, None)
    here = proc(tmp_path, "0::/\n", "30 1 0:5 / {point}/fs rw - cgroup2 cgroup2 rw\n")
    group(tmp_path / "fs", cpu__max=groups, memory__max=groups)
    assert (cpu_limit(here), memory_left(here)) == (None, None)


def test_the_executor_goes_by_them(monkeypatch):
    real = crew.this_machine(None, None)
    assert real.workers >= 1 and real.memory_gb > 0
    monkeypatch.setattr(crew, "cpu_limit", lambda: 0.5)
    monkeypatch.setattr(crew, "memory_left", lambda: GIB // 2)
    machine = crew.this_machine(None, None)
    assert (machine.workers, machine.memory_gb) == (1, 0.5)
    assert crew.this_machine(7, 3.0) == crew.Machine(7, 3.0, machine.gpus), "what is said in the file holds"
