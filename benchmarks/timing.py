"""How the benchmarks of single operations take times: interleaved, as medians with quartiles, beside CPU seconds.

Candidates take turns, so that what else the machine does falls on all of them alike. On a CPU the time the process
was running stands beside the wall time: on a machine that is busy with other work only the former compares.
On a GPU a call is captured as a CUDA graph where it can be, and its inputs are in memory that no cache holds.
"""

import csv
import functools
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from candor.manifest import commit

Call = Callable[[], Any]
_REPLAYS = 10  # of a CUDA graph between two marks: a mark costs some microseconds
_LONG = 2000.0  # microseconds above which it does not matter
_LEAST = 5  # turns that are taken however long they take


@dataclass(frozen=True, slots=True)
class Times:
    """Microseconds a call takes."""

    median: float
    low: float  # quartiles
    high: float
    cpu: float | None  # median of CPU time; None on a GPU
    n: int
    how: str  # "cpu", "graph" or "eager"


def measure(calls: Mapping[str, Call], *, device: str, n: int, seconds: float = math.inf) -> dict[str, Times]:
    """Times of calls that take turns, ``n`` each, after one that does not count; on a GPU for so many ``seconds``."""
    return _on_gpu(calls, n, seconds) if device == "cuda" else _on_cpu(calls, n)


def _on_cpu(calls: Mapping[str, Call], n: int) -> dict[str, Times]:
    wall: dict[str, list[float]] = {name: [] for name in calls}
    cpu: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(n + 1):
        for name, call in calls.items():
            began, spent = time.perf_counter(), time.process_time()
            call()
            if turn:
                wall[name].append(1e6 * (time.perf_counter() - began))
                cpu[name].append(1e6 * (time.process_time() - spent))
    return {name: _times(wall[name], statistics.median(cpu[name]), "cpu") for name in calls}


def _on_gpu(calls: Mapping[str, Call], n: int, seconds: float) -> dict[str, Times]:
    ready = {}
    for name, call in calls.items():
        try:
            ready[name] = _captured(call)
        except Exception as error:  # noqa: BLE001  # some are built on the spot: a failure costs the rows
            print(f"left out, it failed: {name}: {type(error).__name__}: {error}"[:500], flush=True)
    found: dict[str, list[float]] = {name: [] for name in ready}
    began = time.monotonic()
    for turn in range(n + 1):
        if turn > _LEAST and time.monotonic() - began > seconds:
            break
        for name, (call, how) in ready.items():
            short = found[name] and found[name][-1] < _LONG
            replays = _REPLAYS if how == "graph" and short else 1
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(replays):
                call()
            end.record()
            end.synchronize()
            found[name].append(1e3 * start.elapsed_time(end) / replays)
    return {name: _times(times[1:], None, ready[name][1]) for name, times in found.items()}


def _captured(call: Call) -> tuple[Call, str]:
    """The call as a CUDA graph, or as it is where the host has to look at something."""
    for _ in range(3):  # compiles, and chooses algorithms
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            call()
    except RuntimeError:
        torch.cuda.synchronize()
        return call, "eager"
    return graph.replay, "graph"


def _times(values: list[float], cpu: float | None, how: str) -> Times:
    low, median, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
    return Times(median, low, high, cpu, len(values), how)


def machine(device: str) -> dict[str, Any]:
    """What a row says of where it was measured."""
    return {"load": round(os.getloadavg()[0], 1), **_fixed(device)}


@functools.cache
def _fixed(device: str) -> dict[str, Any]:
    """The part that stays."""
    name = torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()} {os.cpu_count()} cores"
    versions = {package: _version(package) for package in ("torch", "triton", "numpy", "flashinfer-python", "vllm")}
    return {
        "device": name,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": " ".join(f"{k} {v}" for k, v in versions.items() if v),
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
    }


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def append(path: Path, rows: list[dict[str, Any]]) -> None:
    """Add rows to a CSV file that has, or gets, their columns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(rows)
