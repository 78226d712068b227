"""What a preflight found (evaluate/preflight.py), and how it is told."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from evaluate.experiment_config import Experiment
from evaluate.hardware import Hardware
from evaluate.stages import Stage, critical_minutes
from train.footprint import Load, Shape

GIB = 2**30


@dataclass(frozen=True, slots=True)
class Training:
    """One fine-tuning."""

    stage: str
    base: str
    domain: str
    shape: Shape
    load: Load
    bits: str  # of a weight of the base
    parts: dict[str, int]  # bytes on the device
    hours: float | None

    @property
    def gib(self) -> float:
        """Memory of the device."""
        return sum(self.parts.values()) / GIB


@dataclass(frozen=True, slots=True)
class Serving:
    """One model that answers: a variant, or a judge."""

    stage: str
    name: str
    shape: Shape
    parts: dict[str, int]  # bytes on the device
    host_gib: float  # of the host's memory while it loads
    hours: float | None

    @property
    def gib(self) -> float:
        """Memory of the device."""
        return sum(self.parts.values()) / GIB


@dataclass(slots=True)
class Findings:
    """Everything a preflight found."""

    experiment: Experiment
    hardware: Hardware
    stages: list[Stage]
    trainings: list[Training] = field(default_factory=list)  # one a base and domain: the largest
    servings: list[Serving] = field(default_factory=list)  # one a model: the largest
    hours: dict[str, float | None] = field(default_factory=dict)  # by stage
    disk_gb: float = 0.0
    to_fetch: list[str] = field(default_factory=list)  # commands
    problems: list[str] = field(default_factory=list)  # why it cannot run there

    def problem(self, text: str) -> None:
        """Note a reason, once."""
        if text not in self.problems:
            self.problems.append(text)

    def fetch(self, command: str) -> None:
        """Note a command that fetches what is not here, once."""
        if command not in self.to_fetch:
            self.to_fetch.append(command)

    def train(self, training: Training) -> None:
        """Note a fine-tuning; of those of one base and domain the largest is shown."""
        self.hours[training.stage] = training.hours
        same = [
            t for t in self.trainings if (t.base, t.domain, t.bits) == (training.base, training.domain, training.bits)
        ]
        if not same:
            self.trainings.append(training)
        elif training.gib > same[0].gib:
            self.trainings[self.trainings.index(same[0])] = training

    def serve(self, serving: Serving) -> None:
        """Note a model that answers; of those on one base the largest is shown."""
        self.hours[serving.stage] = serving.hours
        same = [s for s in self.servings if s.name == serving.name]
        if not same:
            self.servings.append(serving)
        elif serving.host_gib > same[0].host_gib:
            self.servings[self.servings.index(same[0])] = serving


def lines(found: Findings) -> Iterator[str]:
    """What was found, line by line, for people."""
    experiment, hardware = found.experiment, found.hardware
    count = {m: sum(s.module == m for s in found.stages) for m in ("train.sft", "serve.sample")}
    yield (
        f"{experiment.name}: {count['serve.sample']} variants, {count['train.sft']} fine-tunings "
        f"(training seeds: {len(experiment.training_seeds)}), {len(found.stages)} stages"
    )
    device = f"{hardware.gpus} GPUs of {hardware.gpu_memory_gib:.1f} GiB ({hardware.usable_gib:.1f} usable)"
    yield (
        f"on {hardware.name}: {device if hardware.gpus else 'no GPU'}, {hardware.memory_gib:.0f} GiB of memory, "
        f"{hardware.disk_gb:,.0f} GB of disk"
    )
    rows = [
        (
            t.base,
            t.domain,
            f"{t.shape.parameters:,}",
            f"{t.shape.adapter:,}",
            t.bits,
            f"{t.load.rows:,}",
            f"{t.load.steps:,}",
            f"{t.gib:.1f}",
            _hours(t.hours),
        )
        for t in found.trainings
    ]
    titles = ("training", "domain", "parameters", "trained", "bits", "rows", "steps", "GiB", "hours")
    yield from ("", *_table(titles, rows))
    answers = [(s.name, f"{s.gib:.1f}", f"{s.host_gib:.1f}", _hours(s.hours)) for s in found.servings]
    yield from ("", *_table(("answering", "GiB", "host GiB", "hours"), answers), "", _time(found))
    yield f"disk: {found.disk_gb:,.1f} GB"
    if found.to_fetch:
        yield from ("to fetch first:", *(f"  {command}" for command in found.to_fetch))
    if found.problems:
        yield from (f"it does not fit ({len(found.problems)}):", *(f"  - {problem}" for problem in found.problems))
    else:
        yield "it fits"


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Rows under their column titles; words to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(titles, *rows, strict=True)]
    for row in (titles, *rows):
        cells = [
            cell.ljust(width) if title in ("training", "domain", "answering") else cell.rjust(width)
            for cell, width, title in zip(row, widths, titles, strict=True)
        ]
        yield "  ".join(cells).rstrip()


def _time(found: Findings) -> str:
    """GPU-hours of the whole study, and the time with every GPU busy or along the longest chain."""
    if None in found.hours.values():
        return "time: not estimated (device is cpu, or the profile states no bf16_tflops and bandwidth_gb)"
    timed = [replace(stage, minutes=60 * (found.hours.get(stage.id) or 0.0)) for stage in found.stages]
    total = sum(stage.minutes * max(1, stage.gpus) for stage in timed) / 60
    wall = max(max(critical_minutes(timed).values()) / 60, total / max(1, found.hardware.gpus))
    return (
        f"time: at least {total:.1f} GPU-hours, {wall:.1f} hours on {found.hardware.gpus} GPUs (at "
        f"{found.hardware.utilisation:.0%} of the data sheet's rates, an assumption; start-up left out)"
    )


def _hours(hours: float | None) -> str:
    return "-" if hours is None else f"{hours:.2f}"
