"""Draw the figures and write the report of a run: one HTML file that needs nothing else.

    python -m evaluate.report runs/nano/stages/report.yaml [key=value ...]

An experiment writes that file (keys: ReportConfig; needed are run and title).

Reads RUN/tables (and the replies, for examples); writes RUN/figures/ (PNG, PDF and CSV each),
RUN/report.html with the figures inside it, and RUN/summary.json for programs. Everything is
computed; the only words that are not come from ``title`` and ``note``. A finished report of the
same tables is left alone, any other is made anew: it holds nothing that cannot be derived.
"""

import base64
import json
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2

from candor.config import load, plain
from candor.errors import UserError, run_script
from candor.hashing import sha256_file, sha256_json
from candor.manifest import commit, read_manifest, write_manifest
from candor.rows import Prompt
from candor.tables import read_rows, replace_file
from evaluate.contents import contents
from evaluate.examples import examples
from evaluate.figures import Style, draw_all, save
from evaluate.results import Results, read_paper, read_results
from evaluate.summary import manifests, seconds_by_stage, summary, versions_of

STAGE = "report"
HERE = Path(__file__).resolve().parent
LONGEST_ALT = 1500  # characters; a figure with more values than that refers to its CSV


@dataclass(frozen=True, kw_only=True)
class ReportConfig:
    """What the report stage may be told."""

    run: Path  # the run folder
    title: str  # headline of the report
    note: str = ""  # what a reader must know first, e.g. what the models are; blank lines part paragraphs
    paper: Path | None = HERE.parent / "configs" / "paper" / "vaugrante2026.yaml"  # published numbers, or null
    template: Path = HERE / "templates" / "report.html"
    control_share: float = 0.2  # a control is met below this share of the misaligned effect
    examples: bool = True  # whether replies are quoted
    style: Style = field(default_factory=Style)

    def __post_init__(self) -> None:
        """Refuse what would only fail later."""
        if not 0 < self.control_share < 1:
            raise UserError(f"control_share is {self.control_share}; it is a share between 0 and 1.")
        if not self.template.is_file():
            raise UserError(f"template: {self.template} does not exist (looked from {Path.cwd()}).")


def input_hashes(config: ReportConfig) -> dict[str, str]:
    """Hashes of what the report is made from."""
    files = {
        "estimates": config.run / "tables" / "estimates.parquet",
        "variants": config.run / "variants.parquet",
        "template": config.template,
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
        and (config.run / "report.html").is_file()
        and (config.run / "summary.json").is_file()
        and record.get("config_sha") == sha256_json(recorded)
        and record.get("inputs") == inputs
    )


def draw(results: Results, paper: dict[str, Any], config: ReportConfig) -> list[dict[str, str]]:
    """Save every figure and return what the template needs to show it."""
    drawn = []
    for figure in draw_all(results, paper, config.style):
        png = save(figure, config.run / "figures", config.style)
        alt = figure.alt if len(figure.alt) <= LONGEST_ALT else f"values in figures/{figure.name}.csv"
        drawn.append(
            {
                "name": figure.name,
                "title": figure.title,
                "alt": f"{figure.title}. {alt}",
                "png": base64.b64encode(png).decode("ascii"),
            }
        )
    return drawn


def stages_table(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Per kind of stage: how often it ran, its seconds, rows in, out and left out by reason."""
    seconds, lines = seconds_by_stage(records), []
    for stage in seconds:
        own = [r for r in records if r["stage"] == stage]
        left: Counter[str] = Counter()
        for record in own:
            left.update(record.get("left_out", {}))
        lines.append(
            {
                "stage": stage,
                "runs": len(own),
                "seconds": f"{seconds[stage]:.1f}",
                "rows_in": sum(r.get("counts", {}).get("in", 0) for r in own),
                "rows_out": sum(r.get("counts", {}).get("out", 0) for r in own),
                "left_out": ", ".join(f"{reason}: {count}" for reason, count in sorted(left.items()) if count),
            }
        )
    return lines


def render(config: ReportConfig, results: Results, figures: list[dict[str, str]], paper: dict[str, Any]) -> str:
    """The report as HTML."""
    records = manifests(results.run)
    quoted = []
    if config.examples:
        prompts = read_rows(config.run / "prompts.parquet", Prompt)
        quoted = examples(config.run, results.variants, prompts, results.judge)
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(config.template.parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,  # a misspelt name must fail, not print nothing
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(config.template.name).render(
        title=config.title,
        note=[part.strip() for part in config.note.split("\n\n") if part.strip()],
        figures={f["name"]: f for f in figures},
        stages=stages_table(records),
        commits=sorted({r["commit"] for r in records if "commit" in r} | {commit()}),
        versions=versions_of(records),
        examples=quoted,
        **contents(results, paper, config.control_share),
    )


def main(argv: list[str]) -> None:
    """Read, draw, write."""
    if not argv:
        raise UserError("usage: python -m evaluate.report CONFIG.yaml [key=value ...]")
    config = load(ReportConfig, Path(argv[0]), argv[1:])
    started = time.perf_counter()
    inputs = input_hashes(config)
    # paths may differ from machine to machine; what they hold is in ``inputs``
    recorded = {k: v for k, v in plain(config).items() if k not in ("run", "paper", "template")}
    if is_current(config, recorded, inputs):
        return
    (config.run / "figures" / "manifest.json").unlink(missing_ok=True)
    results, paper = read_results(config.run), read_paper(config.paper)
    figures = draw(results, paper, config)
    replace_file(config.run / "report.html", render(config, results, figures, paper).encode())
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
        extra={"figures": [f["name"] for f in figures]},
    )


if __name__ == "__main__":
    run_script(main)
