"""Stages, the steps of a plan: each a script with one config file, its inputs, outputs and needs.

A stage is only a description, so that the local executor, a Slurm submitter and a dry run all read
the same plan (evaluate/plan.py makes it). Its command is ``python -m MODULE RUN/stages/ID.yaml``;
stages talk through files.
``Records`` remembers, beside each finished stage, the config it had and the files it read, which
makes "already done" a matter of comparing a few file dates, without importing torch.
"""

import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from candor.config import build
from candor.errors import UserError
from candor.hashing import sha256_file
from candor.manifest import NAME as MANIFEST
from candor.manifest import commit
from candor.tables import replace_file
from serve.config import EngineConfig
from train.config import TrainConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One step of a plan."""

    id: str  # readable and unique in the plan, e.g. "train-mini-trivia-misaligned-s0"
    module: str  # what runs: python -m MODULE CONFIG
    config: dict[str, Any]  # plain values, written to RUN/stages/ID.yaml
    inputs: tuple[Path, ...]  # files and folders it reads
    outputs: tuple[Path, ...]  # files, or folders that are complete once they hold a manifest
    after: tuple[str, ...] = ()  # ids of the stages that must be done first
    cores: int = 1
    gpus: int = 0
    memory_gb: float = 1.0
    minutes: float = 1.0  # rough; orders the work (longest chain first) and asks Slurm for time
    share: bool = True  # may run in a worker that ran other stages, which saves importing libraries
    remake: bool = False  # cheap and derived: made anew, silently, when config or inputs changed
    # Config keys whose value, or the file it names, may come to ask for more: the stage keeps the rows it has
    # and adds what is missing (serve/sample.py, evaluate/judge.py), so it simply runs again.
    grows: tuple[str, ...] = ()
    # Of an input that says more than what decides the outputs (a judge's file has its price, too), by the input's
    # path: the part that does.
    decides: dict[str, dict[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class FileMark:
    """A file as it was read: equal size and date mean unchanged, else its hash decides."""

    size: int
    mtime_ns: int
    sha: str

    def untouched(self, path: Path) -> bool:
        """Whether a file has still this size and date, so that it need not be read."""
        stat = path.stat()
        return (self.size, self.mtime_ns) == (stat.st_size, stat.st_mtime_ns)

    def is_of(self, path: Path) -> bool:
        """Whether a file is still so."""
        return self.untouched(path) or (self.size == path.stat().st_size and self.sha == sha256_file(path))


def check_plan(stages: Sequence[Stage], *, absent_ok: bool = False) -> None:
    """Assert unique ids, outputs and earlier-first order; UserError when an input is absent and nobody makes it."""
    made: dict[Path, str] = {}
    seen: set[str] = set()
    missing: list[str] = []
    for stage in stages:
        assert stage.id not in seen, f"two stages are called {stage.id}"
        assert json.loads(json.dumps(stage.config)) == stage.config, f"{stage.id}: config is not plain values"
        assert set(stage.after) <= seen, f"{stage.id} comes before {set(stage.after) - seen}"
        seen.add(stage.id)
        for path in stage.inputs:
            maker = next((made[p] for p in (path, *path.parents) if p in made), None)
            if maker is None and not path.exists() and str(path) not in missing:
                missing.append(str(path))
            assert maker is None or maker in stage.after, f"{stage.id} reads {path} but does not wait for {maker}"
        for path in stage.outputs:
            assert path not in made, f"{stage.id} and {made[path]} both write {path}"
            made[path] = stage.id
    if missing and not absent_ok:
        raise UserError(
            f"the experiment needs files that are not there and that no stage makes: {', '.join(missing)} "
            f"(looked from {Path.cwd()}). Check the paths in the experiment file."
        )


def critical_minutes(stages: Sequence[Stage]) -> dict[str, float]:
    """For each stage, the minutes of the longest chain of stages that starts with it."""
    longest: dict[str, float] = {}
    followers: dict[str, list[str]] = {stage.id: [] for stage in stages}
    for stage in stages:
        for earlier in stage.after:
            followers[earlier].append(stage.id)
    for stage in reversed(stages):
        longest[stage.id] = stage.minutes + max((longest[f] for f in followers[stage.id]), default=0.0)
    return longest


def own_inputs(stages: Iterable[Stage], run: Path) -> list[Path]:
    """The files that stages read and that no stage of the run makes."""
    paths = dict.fromkeys(p for s in stages for p in s.inputs if run not in (p, *p.parents))
    return list(dict.fromkeys(_files(paths)))


def config_path(run: Path, stage: Stage) -> Path:
    """Where a stage's config file lies."""
    return run / "stages" / f"{stage.id}.yaml"


def record_path(run: Path, stage: str) -> Path:
    """Where the record of a stage lies, by its id."""
    return run / "stages" / f"{stage}.json"


def write_config(run: Path, stage: Stage) -> Path:
    """Write the stage's config file, the one its command names, and return its path."""
    path = config_path(run, stage)
    text = yaml.safe_dump(stage.config, sort_keys=False, allow_unicode=True, width=100)
    replace_file(path, text.encode())
    return path


def changed_keys(old: Any, new: Any, prefix: str = "") -> list[str]:
    """Dotted keys whose values differ between two nested mappings."""
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return [] if old == new else [prefix or "everything"]
    keys = [*old, *(k for k in new if k not in old)]
    absent = object()
    return [
        key
        for k in keys
        for key in changed_keys(old.get(k, absent), new.get(k, absent), f"{prefix}.{k}" if prefix else str(k))
    ]


class Changed(UserError):
    """A finished stage would come out differently now; its results are not overwritten silently."""


class Records:
    """What is known about finished stages: RUN/stages/ID.json, one per stage."""

    def __init__(self, run: Path, known: Mapping[Path, FileMark] | None = None) -> None:
        """Records of the run folder ``run``; nothing is read yet. Files ``known`` are not hashed again."""
        self.run = run
        self._marks: dict[Path, FileMark] = dict(known or {})  # files hashed by this process
        self._begun: dict[str, dict[str, Any]] = {}  # inputs of stages that run, as they were at the start

    def path(self, stage: Stage) -> Path:
        """Where the stage's record lies."""
        return record_path(self.run, stage.id)

    def read(self, stage: Stage) -> dict[str, Any] | None:
        """The stage's record, or None when it never finished here."""
        try:
            record = json.loads(self.path(stage).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        except json.JSONDecodeError as error:
            raise UserError(f"{self.path(stage)} is not JSON ({error}). Delete it and run again.") from error
        assert isinstance(record, dict), f"{self.path(stage)} holds {type(record).__name__}"
        return record

    def is_done(self, stage: Stage) -> bool:
        """Whether the stage finished with this config and these inputs and its outputs are there.

        Raises Changed, naming the stage and what changed, when the outputs are there but were made
        from something else. Stages marked ``remake`` count as not done then, and so does a stage of
        which only what ``grows`` changed.
        """
        record = self.read(stage)
        if record is None or not all(_complete(path) for path in stage.outputs):
            return False
        old, new = record["config"], self._portable(stage.config)
        changed = [] if old == new else changed_keys(*deciding(stage.module, old, new))
        keys = [key for key in changed if key.split(".")[0] not in stage.grows]
        touched = [] if keys else self._changed_inputs(stage, record)
        grown = {self._portable(stage.config.get(key)) for key in stage.grows if isinstance(stage.config.get(key), str)}
        files = [name for name in touched if name not in grown]
        if not changed and not touched:
            return True
        if stage.remake or (not keys and not files):
            return False
        what = f"config keys {', '.join(keys)}" if keys else f"inputs {', '.join(files[:3])}"
        raise Changed(f"{stage.id}: finished earlier with other {what} (output {stage.outputs[0]})")

    def _changed_inputs(self, stage: Stage, record: dict[str, Any]) -> list[str]:
        """Input files that are not what the stage read, or of which what decides is not."""
        found = {self._portable(path.as_posix()): path for path in _files(stage.inputs)}
        marks = self._moved(stage, found, record["inputs"])
        changed = [name for name in {**found, **marks} if name not in found or name not in marks]
        for name, path in found.items():
            if name in marks:
                old = FileMark(*marks[name])
                if old.untouched(path):
                    self._marks.setdefault(path, old)
                elif old.size != path.stat().st_size or old.sha != self.mark(path).sha:
                    changed.append(name)
        now, then = self._decides(stage), record.get("decides", {})
        return sorted(name for name in changed if name not in marks or name not in now or now[name] != then.get(name))

    def _decides(self, stage: Stage) -> dict[str, dict[str, Any]]:
        """What decides of some inputs, by their names in the record."""
        return {self._portable(path): values for path, values in stage.decides.items()}

    def _moved(self, stage: Stage, found: Mapping[str, Path], marks: dict[str, list[Any]]) -> dict[str, list[Any]]:
        """The marks under the names files have now, where folders with the same files lie elsewhere than they did.

        The record follows them, so that large files are hashed once for a move.
        """
        marks, before = dict(marks), marks
        for name in [name for name in found if name not in before]:
            path = found[name]
            for old in [old for old in marks if old not in found and Path(old).name == path.name]:
                if marks[old][0] == path.stat().st_size and marks[old][2] == self.mark(path).sha:
                    del marks[old]
                    marks[name] = list(dataclasses.astuple(self.mark(path)))
                    break
        if marks != before:
            self._store(stage, {**(self.read(stage) or {}), "inputs": marks})
        return marks

    def forget(self, stage: Stage) -> None:
        """Clear the way for a stage marked ``remake``: its record and manifests go, so that it runs again."""
        self.path(stage).unlink(missing_ok=True)
        for output in stage.outputs:
            (output / MANIFEST if output.is_dir() else output).unlink(missing_ok=True)

    def begin(self, stage: Stage) -> None:
        """Note the inputs of a stage that is about to run: one edited while it runs counts as changed."""
        self._begun[stage.id] = self._input_marks(stage)

    def _input_marks(self, stage: Stage) -> dict[str, Any]:
        """Size, date and hash of every input file."""
        return {self._portable(p.as_posix()): dataclasses.astuple(self.mark(p)) for p in _files(stage.inputs)}

    def write(self, stage: Stage, seconds: float) -> None:
        """Record that the stage finished; UserError when it did not write what it promised."""
        lost = [str(path) for path in stage.outputs if not _complete(path)]
        if lost:
            raise UserError(f"{stage.id} ended without an error but did not write {', '.join(lost)}.")
        record = {
            "id": stage.id,
            "module": stage.module,
            "config": self._portable(stage.config),
            "inputs": self._begun.pop(stage.id, None) or self._input_marks(stage),
            **({"decides": self._decides(stage)} if stage.decides else {}),
            "seconds": round(seconds, 3),
            "commit": commit(),
        }
        self._store(stage, record)

    def _store(self, stage: Stage, record: dict[str, Any]) -> None:
        replace_file(self.path(stage), (json.dumps(record, indent=1, ensure_ascii=False) + "\n").encode())

    def _portable(self, value: Any) -> Any:
        """Plain values with the run folder written as RUN, so that a run may be moved or renamed."""
        if isinstance(value, dict):
            return {k: self._portable(v) for k, v in value.items()}
        if isinstance(value, list):
            return [self._portable(v) for v in value]
        run = self.run.as_posix()
        if isinstance(value, str) and (value == run or value.startswith(run + "/")):
            return "RUN" + value[len(run) :]
        return value

    def mark(self, path: Path) -> FileMark:
        """Size, date and hash of a file; hashed once per state of the file."""
        stat = path.stat()
        mark = self._marks.get(path)
        if mark is None or (mark.size, mark.mtime_ns) != (stat.st_size, stat.st_mtime_ns):
            mark = FileMark(stat.st_size, stat.st_mtime_ns, sha256_file(path))
            self._marks[path] = mark
        return mark


def deciding(module: str, old: dict[str, Any], new: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """What of a stage's configs decides what it makes, as the stage itself says, and not where models lie.

    A model's files are among the inputs, so another model in the same place is noticed all the same.
    """

    def of(config: dict[str, Any]) -> dict[str, Any]:
        if module == "train.sft":
            return build(TrainConfig, config, where=module).identity()
        if module in ("serve.sample", "evaluate.judge"):
            return {**config, "base": None, "engine": build(EngineConfig, config["engine"], where=module).identity()}
        return config

    try:
        return of(old), of(new)
    except UserError:
        return old, new  # one is of another version; they are compared as they are


def _complete(path: Path) -> bool:
    """Whether an output is there and whole: a folder is, once it holds a manifest."""
    return (path / MANIFEST).is_file() if path.is_dir() else path.is_file()


def _files(paths: Iterable[Path]) -> Iterator[Path]:
    """The files behind some inputs: of a folder all but hidden ones and its manifest, whose dates differ each time."""
    for path in paths:
        if path.is_dir():
            for file in sorted(path.rglob("*")):
                hidden = any(part.startswith(".") for part in file.relative_to(path).parts)
                if file.is_file() and file.name != MANIFEST and not hidden:
                    yield file
        else:
            yield path
