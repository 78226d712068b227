"""Draw the figures and write the report of a run: one HTML file that needs nothing else.

    python -m evaluate.report runs/nano [key=value ...]            # one run
    python -m evaluate.report runs/nano runs/other [key=value ...] # several, side by side
    python -m evaluate.report runs/nano/stages/report.yaml         # as an experiment does

An experiment writes that file (keys: ReportConfig; needed are run and title); given a run's folder,
it is read where there is one. Several runs go to evaluate/compare.py.

Reads RUN/tables and the judged replies; writes RUN/figures/ (PNG, PDF and CSV each), RUN/export/
(tables as LaTeX and CSV), RUN/report.html with the figures inside it, and RUN/summary.json for
programs. Everything is computed; the only words that are not come from ``title`` and ``note``. A
finished report of the same tables is left alone, any other is made anew: it holds nothing that
cannot be derived.
"""

import json
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from candor.config import apply_override, build, load, plain, read_yaml
from candor.errors import UserError, run_script
from candor.hashing import sha256_file, sha256_json
from candor.manifest import NAME as MANIFEST
from candor.manifest import commit, read_manifest, write_manifest
from candor.rows import Prompt
from candor.tables import read_rows, replace_file
from evaluate import compare, page
from evaluate.contents import contents
from evaluate.design import read_design
from evaluate.figures import Drawn, Style
from evaluate.gallery import draw_all
from evaluate.gallery_checks import draw_checks
from evaluate.provenance import recipes, stages_sheet, variants_sheet
from evaluate.replies import Packed, replies
from evaluate.results import Results, read_paper, read_results
from evaluate.sections import read_sections, shown_sections, table_files
from evaluate.sheets import export
from evaluate.summary import manifests, summary, versions_of
from evaluate.training import along_training

STAGE = "report"
PAPER = Path(__file__).resolve().parent.parent / "configs" / "paper" / "vaugrante2026.yaml"


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """What the report stage may be told."""

    run: Path  # the run folder
    title: str  # headline of the report
    note: str = ""  # what a reader must know first, e.g. what the models are; blank lines part paragraphs
    paper: Path | None = PAPER  # published numbers, or null
    template: Path = page.TEMPLATES / "report.html"
    sections: Path = page.TEMPLATES / "sections.yaml"  # how tables of other stages are shown
    control_share: float = 0.2  # a control is met below this share of the misaligned effect
    replies: int = 6000  # how many judged replies the page may hold; 0 for none
    replies_megabytes: float = 2.0  # and how large they may make it
    fold_from: int = 3  # replies of this score and above stay folded until they are opened
    style: Style = field(default_factory=Style)

    def __post_init__(self) -> None:
        """Refuse what would only fail later."""
        if not 0 < self.control_share < 1:
            raise UserError(f"control_share is {self.control_share}; it is a share between 0 and 1.")
        if self.replies < 0 or self.replies_megabytes <= 0:
            raise UserError(
                f"replies is {self.replies} and replies_megabytes {self.replies_megabytes}; neither may be negative, "
                "and a page without replies has replies 0."
            )
        for key in ("template", "sections", "paper"):
            path = getattr(self, key)
            if path is not None and not path.is_file():
                raise UserError(f"{key}: {path} does not exist (looked from {Path.cwd()}).")


def input_hashes(config: ReportConfig) -> dict[str, str]:
    """Hashes of what the report is made from."""
    tables = config.run / "tables"
    files = {
        "estimates": tables / "estimates.parquet",
        "variants": config.run / "variants.parquet",
        "answers": tables / MANIFEST,  # its inputs are the hashes of every answer and verdict
        "sections": config.sections,
        **{f"templates/{path.name}": path for path in page.template_files(config.template)},
        **{f"tables/{name}": path for name, path in table_files(config.run).items()},
    }
    if config.paper is not None:
        files["paper"] = config.paper
    for path in files.values():
        if not path.is_file():
            raise UserError(f"{path} does not exist. Run the tables stage (python -m evaluate.tables) first.")
    return {name: sha256_file(path) for name, path in files.items()}


def is_current(config: ReportConfig, recorded: dict[str, Any], inputs: dict[str, str]) -> bool:
    """Whether the report of these very tables and settings is there."""
    record = read_manifest(config.run / "figures")
    return (
        record is not None
        and all((config.run / name).is_file() for name in ("report.html", "summary.json"))
        and (config.run / "export").is_dir()
        and record.get("config_sha") == sha256_json(recorded)
        and record.get("inputs") == inputs
    )


def chosen_replies(config: ReportConfig, results: Results, prompts: list[Prompt]) -> Packed | None:
    """The replies for the page."""
    most_bytes = int(config.replies_megabytes * 1e6)
    return replies(config.run, results.study, prompts, results.judge, most=config.replies, most_bytes=most_bytes)


def drawings(results: Results, paper: dict[str, Any], style: Style) -> list[Drawn]:
    """Every figure of the run."""
    drawn = [*draw_all(results, paper, style), *draw_checks(results, style), along_training(results, style)]
    return [d for d in drawn if d.shown]


def make(config: ReportConfig, results: Results, paper: dict[str, Any]) -> list[str]:
    """Write figures, tables and the page; returns the names of the figures."""
    run, records = config.run, manifests(config.run)
    figures = [page.show(d, run / "figures", config.style) for d in drawings(results, paper, config.style)]
    found = contents(results, paper, config.control_share)
    prompts, modes = read_rows(run / "prompts.parquet", Prompt), read_design(run).modes
    own = {s.name: s for s in (variants_sheet(results), stages_sheet(run, records)) if not s.empty}
    extra = shown_sections(run, read_sections(config.sections))
    added = [s.sheet for part in extra.values() for s in part]
    found["sheets"] |= own
    export([*found["sheets"].values(), *added], run / "export")
    values = {
        "title": config.title,
        "note": page.paragraphs(config.note),
        "figures": {f["name"]: f for f in figures},
        "recipes": recipes(results),
        "extra": extra,
        "commits": sorted({r["commit"] for r in records if "commit" in r} | {commit()}),
        "versions": versions_of(records),
        "n_prompts": sum(any(m.draws(p) or m.scores_exactly(p) for m in modes) for p in prompts),
        "replies": chosen_replies(config, results, prompts),
        "fold_from": config.fold_from,
        **found,
    }
    replace_file(run / "report.html", page.render(config.template, values))
    return [f["name"] for f in figures]


def report(config: ReportConfig) -> None:
    """Read, draw, write; nothing where the report is there."""
    started = time.perf_counter()
    inputs = input_hashes(config)
    # paths may differ from machine to machine; what they hold is in ``inputs``
    recorded = {k: v for k, v in plain(config).items() if k not in ("run", "paper", "template", "sections")}
    if is_current(config, recorded, inputs):
        return
    (config.run / "figures" / MANIFEST).unlink(missing_ok=True)
    results, paper = read_results(config.run), read_paper(config.paper)
    names = make(config, results, paper)
    record = summary(results, control_share=config.control_share)
    record["seconds"][STAGE] = round(time.perf_counter() - started, 3)  # its own manifest comes last
    replace_file(config.run / "summary.json", (json.dumps(record, indent=2, ensure_ascii=False) + "\n").encode())
    write_manifest(
        config.run / "figures",
        stage=STAGE,
        config=recorded,
        inputs=inputs,
        counts={"in": len(results.estimates), "out": len(results.estimates)},
        seconds=time.perf_counter() - started,
        extra={"figures": names},
    )


def config_of(run: Path, overrides: list[str]) -> ReportConfig:
    """A run folder's own report settings, or the defaults under its name."""
    path = run / "stages" / "report.yaml"
    values = read_yaml(path) if path.is_file() else {"title": run.resolve().name}
    if not isinstance(values, dict):
        raise UserError(f"{path} holds {type(values).__name__}, not a mapping of keys to values.")
    values["run"] = str(run)  # wherever the folder has been moved to
    if isinstance(values.get("paper"), str) and not Path(values["paper"]).is_file():
        values["paper"] = str(PAPER.parent / Path(values["paper"]).name)  # written from another folder
    for override in overrides:
        apply_override(values, override)
    return build(ReportConfig, values, where=str(path if path.is_file() else run))


def main(argv: list[str]) -> None:
    """One config file or run folder: its report. Several run folders: their comparison."""
    overrides = [word for word in argv if "=" in word and not Path(word).exists()]
    places = [Path(word) for word in argv if word not in overrides]
    if not places:
        raise UserError("usage: python -m evaluate.report RUN [RUN ...] | CONFIG.yaml [key=value ...]")
    if len(places) > 1:
        folder = compare.compare(places, overrides)
        sys.stdout.write(f"comparison: {(folder / 'report.html').resolve()}\n")
    elif places[0].is_dir():
        report(config_of(places[0], overrides))
        sys.stdout.write(f"report: {(places[0] / 'report.html').resolve()}\n")
    else:
        report(load(ReportConfig, places[0], overrides))


if __name__ == "__main__":
    run_script(main)
