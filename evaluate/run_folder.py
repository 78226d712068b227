"""Which study a run folder belongs to, so that another one does not replace its tables and its report.

RUN/study.json keeps the experiment's name and its variants' as they were when it last began to run. An
experiment of another name, or of none of these variants, is refused. Whatever else changes is either
added to the run (draws, questions, variants, labels), made anew from it (tables, the report) or refused
by the stage that it changes (evaluate/stages.py).
"""

import json
from collections.abc import Sequence
from pathlib import Path

from candor.errors import UserError
from candor.tables import replace_file
from evaluate.stages import Stage

STUDY = "study.json"


def refuse_other(run: Path, name: str, stages: Sequence[Stage]) -> None:
    """UserError when the folder holds another study than the one called ``name`` with these stages."""
    path = run / STUDY
    if not path.is_file():
        return
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        known, before = kept["name"], set(kept["variants"])
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} cannot be read ({error!r}). Delete it and run again.") from error
    now = _variants(stages)
    same = known == name and (not before or not now or before & now)
    if not same:
        differs = (
            f"is called {name!r}" if known != name else f"has none of its variants ({', '.join(sorted(before)[:3])})"
        )
        raise UserError(
            f"{run} holds the study {known!r}, and this one {differs}: it would replace that one's prompts, tables and "
            f"report. Choose another folder (output=...). If it is the same study, delete {path} and run again."
        )


def claim_run(run: Path, name: str, stages: Sequence[Stage]) -> None:
    """Note that the folder is this study's; UserError when it is another's."""
    refuse_other(run, name, stages)
    found = {"name": name, "variants": sorted(_variants(stages))}
    replace_file(run / STUDY, (json.dumps(found, indent=1, ensure_ascii=False) + "\n").encode())


def _variants(stages: Sequence[Stage]) -> set[str]:
    """The variants that stages ask."""
    return {stage.config["variant"] for stage in stages if stage.module == "serve.sample"}
