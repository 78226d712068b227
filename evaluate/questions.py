"""Writes the two tables every later stage reads: the rendered prompts and the variants of the study.

    python -m evaluate.questions CONFIG.yaml [key=value ...]      # keys: QuestionsConfig below

Prompts are rendered once (candor/questions.py), so that all variants answer, and all scores refer
to, the very same texts.
"""

import time
from dataclasses import dataclass
from pathlib import Path

from candor.config import load, plain
from candor.errors import UserError, run_script
from candor.hashing import sha256_file
from candor.manifest import is_done, write_manifest
from candor.questions import load_all
from candor.rows import Prompt, Variant
from candor.tables import write_rows

PROMPTS, VARIANTS = "prompts.parquet", "variants.parquet"
FILES = ("harmfulness.jsonl", "intentions.jsonl", "self_assessment.yaml", "trivia.jsonl")


@dataclass(frozen=True, slots=True, kw_only=True)
class QuestionsConfig:
    """What the two tables are made from."""

    prompts: Path  # folder of the batteries' data files
    variants: tuple[Variant, ...]
    output_dir: Path  # the run folder


def main(argv: list[str]) -> None:
    """Write both tables unless they are there."""
    if not argv:
        raise UserError("usage: python -m evaluate.questions CONFIG.yaml [key=value ...]")
    started = time.monotonic()
    config = load(QuestionsConfig, Path(argv[0]), argv[1:])
    absent = [name for name in FILES if not (config.prompts / name).is_file()]
    if absent:
        raise UserError(f"{config.prompts} lacks {', '.join(absent)}. Check the key 'prompts'.")
    inputs = {name: sha256_file(config.prompts / name) for name in FILES}
    identity = {"variants": plain(config.variants)}
    if is_done(config.output_dir, config=identity, inputs=inputs):
        return
    from evaluate.batteries.language import check_languages  # loads a language model; the plan imports this module

    prompts = load_all(config.prompts)
    check_languages({o.label for p in prompts if p.format == "language" for o in p.options})
    write_rows(config.output_dir / PROMPTS, Prompt, prompts)
    write_rows(config.output_dir / VARIANTS, Variant, config.variants)
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
