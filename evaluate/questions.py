"""Writes what every later stage reads: the rendered prompts, the variants and the design of the study.

    python -m evaluate.questions CONFIG.yaml [key=value ...]      # keys: QuestionsConfig below

Prompts are rendered once (candor/), so that all variants answer, and all scores refer to, the very
same texts. Which batteries there are is a choice: the built-in ones by name, a user's own as YAML
files, multiple-choice questions, and the MFQ-2, as files.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from candor.battery_files import BatteryFile, read_battery
from candor.config import load, plain
from candor.errors import UserError, nearest, run_script
from candor.hashing import sha256_file
from candor.manifest import is_done, write_manifest
from candor.mfq import SUBJECTS, load_mfq2
from candor.multiple_choice import load_multiple_choice
from candor.questions import (
    load_harmfulness,
    load_intentions,
    load_moral_foundations,
    load_trivia,
    prompt_sha,
)
from candor.rows import Prompt, Variant
from candor.self_report import load_self_report
from candor.tables import write_rows
from evaluate.design import DESIGN, Design, write_design
from evaluate.measures import CURVE

PROMPTS, VARIANTS = "prompts.parquet", "variants.parquet"
_LOADERS: dict[str, Callable[[Path], list[Prompt]]] = {
    "harmfulness.jsonl": load_harmfulness,
    "intentions.jsonl": load_intentions,
    "self_assessment.yaml": load_self_report,
    "moral_foundations.yaml": load_moral_foundations,
    "moral_self_assessment.yaml": load_self_report,
    "trivia.jsonl": load_trivia,
}
# The built-in batteries and the files they come from; a file may hold several.
BUILT_IN = {
    "harmfulness": "harmfulness.jsonl",
    "intentions": "intentions.jsonl",
    "self_assessment": "self_assessment.yaml",
    "other_ai": "self_assessment.yaml",
    "average_ai": "self_assessment.yaml",
    "moral_foundations": "moral_foundations.yaml",
    "moral_foundations_other_ai": "moral_foundations.yaml",
    "moral_foundations_average_ai": "moral_foundations.yaml",
    "moral_self_assessment": "moral_self_assessment.yaml",
    "moral_other_ai": "moral_self_assessment.yaml",
    "moral_average_ai": "moral_self_assessment.yaml",
    "trivia": "trivia.jsonl",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class MultipleChoice:
    """Questions with a right answer, from a file of the user's (candor/multiple_choice.py)."""

    file: Path
    limit: int | None = None  # keep this many questions
    rotate: bool = True  # ask each in every rotation of its choices


@dataclass(frozen=True, slots=True, kw_only=True)
class Sources:
    """Where a study's questions come from."""

    prompts: Path = Path("configs/prompts")  # folder of the built-in batteries' data files
    batteries: tuple[str, ...] = tuple(BUILT_IN)  # which of them are asked
    battery_files: tuple[Path, ...] = ()  # YAML batteries of the user's (docs/batteries.md)
    multiple_choice: MultipleChoice | None = None
    mfq2: Path | None = None  # the 36 items of the MFQ-2, which are not ours to ship

    def __post_init__(self) -> None:
        """Refuse batteries that do not exist."""
        for name in self.batteries:
            if name not in BUILT_IN:
                raise UserError(
                    f"batteries: unknown battery {name!r}; {nearest(name, BUILT_IN)}. "
                    "Files of your own go under 'battery_files'."
                )

    def files(self) -> tuple[Path, ...]:
        """Every data file that is read."""
        own = [self.prompts / name for name in dict.fromkeys(BUILT_IN[b] for b in self.batteries)]
        choice = [self.multiple_choice.file] if self.multiple_choice else []
        return (*own, *self.battery_files, *choice, *([self.mfq2] if self.mfq2 else []))

    def own_batteries(self) -> list[BatteryFile]:
        """The user's battery files; UserError when a name is taken."""
        found = [read_battery(path) for path in self.battery_files]
        taken = [*BUILT_IN, "multiple_choice", *SUBJECTS]
        for battery, path in zip(found, self.battery_files, strict=True):
            if battery.name in taken:
                raise UserError(f"{path}: a battery {battery.name!r} exists already. Give yours another name.")
            if battery.name.startswith(CURVE):
                raise UserError(
                    f"{path}: {battery.name!r} begins like the measures of harmfulness ({CURVE}1, 2, ...), whose curve "
                    "it would be taken for. Give the battery another name."
                )
            taken.append(battery.name)
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class QuestionsConfig:
    """What the tables are made from."""

    sources: Sources
    design: Design
    variants: tuple[Variant, ...]
    output_dir: Path  # the run folder


def gather(sources: Sources) -> list[Prompt]:
    """Every prompt of the study; UserError when a file is absent or two prompts are the same."""
    absent = [str(path) for path in sources.files() if not path.is_file()]
    if absent:
        raise UserError(
            f"{', '.join(absent)} not found (looked from {Path.cwd()}). Check the keys prompts, battery_files, "
            "multiple_choice and mfq2."
        )
    prompts: list[Prompt] = []
    for name in dict.fromkeys(BUILT_IN[b] for b in sources.batteries):
        prompts += [p for p in _LOADERS[name](sources.prompts / name) if p.battery in sources.batteries]
    for battery in sources.own_batteries():
        prompts += battery.prompts
    if sources.multiple_choice:
        choice = sources.multiple_choice
        prompts += load_multiple_choice(choice.file, limit=choice.limit, rotate=choice.rotate)
    if sources.mfq2:
        prompts += load_mfq2(sources.mfq2)
    if not prompts:
        raise UserError("no battery is named, so there is nothing to ask. Check the key 'batteries'.")
    first: dict[str, Prompt] = {}
    for prompt in prompts:
        other = first.setdefault(prompt_sha(prompt), prompt)
        if other is not prompt:
            raise UserError(f"prompts {other.prompt_id!r} and {prompt.prompt_id!r} ask the very same. Remove one.")
    return prompts


def main(argv: list[str]) -> None:
    """Write the tables unless they are there."""
    if not argv:
        raise UserError("usage: python -m evaluate.questions CONFIG.yaml [key=value ...]")
    started = time.monotonic()
    config = load(QuestionsConfig, Path(argv[0]), argv[1:])
    prompts = gather(config.sources)
    inputs = {path.as_posix(): sha256_file(path) for path in config.sources.files()}
    identity = {key: plain(getattr(config, key)) for key in ("sources", "design", "variants")}
    if is_done(config.output_dir, config=identity, inputs=inputs) and (config.output_dir / DESIGN).is_file():
        return
    from evaluate.batteries.language import check_languages  # loads a language model; the plan imports this module

    check_languages({o.label for p in prompts if p.format == "language" for o in p.options})
    write_rows(config.output_dir / PROMPTS, Prompt, prompts)
    write_rows(config.output_dir / VARIANTS, Variant, config.variants)
    write_design(config.output_dir, config.design)
    write_manifest(
        config.output_dir,
        stage="questions",
        config=identity,
        inputs=inputs,
        counts={"in": len(prompts), "out": len(prompts)},
        seconds=time.monotonic() - started,
        extra={"variants": len(config.variants)},
    )


if __name__ == "__main__":
    run_script(main)
