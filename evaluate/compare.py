"""Several runs side by side: their levels, and their differences paired by prompt.

    python -m evaluate.report runs/nano runs/other [output=FOLDER] [title=...] [paper=null]

Models are matched by their place in the design (control, size, domain, stage). A difference to the
first run is taken over the prompts that both runs put in the same words, and over the same training
seeds; where the seeds are not the same there is none. Writes report.html, figures/, export/ and
estimates.csv to FOLDER (default: compare-A-B beside the first run); the runs stay untouched.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd

from candor.config import apply_override, build, plain
from candor.errors import UserError
from candor.hashing import sha256_file
from candor.manifest import commit, read_manifest, write_manifest
from candor.rows import Estimate, Prompt, Score
from candor.tables import read_rows, read_table, replace_file, write_rows
from evaluate import page
from evaluate.controls import check_controls
from evaluate.estimates import build_grid, contrasts, scopes
from evaluate.figures import Drawn, Style, grid, legend, limits, points, there
from evaluate.results import MINUS, Results, number, read_results
from evaluate.sheets import Entry, Line, Sheet, export, with_scope
from evaluate.study import Cell, Pair

STAGE = "compare"
Place = tuple[str, str, str, str]  # control, size, domain, stage


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """What a comparison may be told."""

    runs: tuple[Path, ...]
    output: Path
    title: str
    note: str = ""
    control_share: float = 0.2  # as in a report
    draws: int = 2000  # bootstrap draws of the differences
    seed: int = 1
    template: Path = page.TEMPLATES / "compare.html"
    style: Style = field(default_factory=Style)


@dataclass(frozen=True, slots=True)
class Run:
    """One run of a comparison."""

    label: str
    results: Results
    settings: dict[str, Any]  # manifest of its tables stage

    @property
    def places(self) -> dict[Place, Cell]:
        """Its cells by their place in the design."""
        results = self.results
        both = (*results.cells(), *results.cells(control=True))
        return {(c.control, c.size, c.domain, c.stage): c for c in both}


def labels(folders: Sequence[Path]) -> list[str]:
    """Short names that tell the runs apart: as much of the path's end as that takes."""
    parts = [folder.resolve().parts for folder in folders]
    if len(set(parts)) < len(parts):
        raise UserError(f"the same run is named twice: {', '.join(map(str, folders))}.")
    length = 1
    while len({p[-length:] for p in parts}) < len(parts):
        length += 1
    return ["/".join(p[-length:]) for p in parts]


def read_run(folder: Path, label: str) -> Run:
    """A run with its settings."""
    return Run(label, read_results(folder), read_manifest(folder / "tables") or {})


def place_name(place: Place) -> str:
    """A place of the design in words."""
    control, size, domain, stage = place
    where = (control.replace("_", " "), size, "" if domain == "none" else domain, stage)
    return ", ".join(part for part in where if part)


def all_places(runs: Sequence[Run]) -> list[Place]:
    """Every place that any run has, in the order of the first run that has it."""
    return list(dict.fromkeys(place for run in runs for place in run.places))


def same_prompts(first: Run, other: Run) -> set[str]:
    """Ids of the prompts that both runs asked in the same words."""
    texts = [
        {p.prompt_id: (p.text, p.options) for p in read_rows(run.results.run / "prompts.parquet", Prompt)}
        for run in (first, other)
    ]
    return {i for i, text in texts[0].items() if texts[1].get(i) == text}


def _scores(run: Run, prompts: set[str]) -> pd.DataFrame:
    """A run's scores on some prompts, its variants told apart from another run's."""
    frame = read_table(run.results.run / "tables" / "scores.parquet", Score).to_pandas()
    frame = frame[frame["prompt_id"].isin(prompts)]
    return frame.assign(variant=run.label + ":" + frame["variant"])


def differences(first: Run, other: Run, *, draws: int, seed: int) -> list[Estimate]:
    """Other minus first, one estimate per shared place and measure over all items, paired by prompt."""
    prompts = same_prompts(first, other)
    scores = [_scores(run, prompts) for run in (first, other)]
    # a measure that one run lacks altogether is no difference of zero
    shared = set(scores[0]["measure"]) & set(scores[1]["measure"])
    both = pd.concat(scores, ignore_index=True)
    both = both[both["measure"].isin(shared)]
    if both.empty:
        return []
    pairs = []
    for place, mine in first.places.items():
        theirs = other.places.get(place)
        if theirs is None or theirs.seeds != mine.seeds:
            continue
        names = (f"{other.label}:{theirs.name}", f"{first.label}:{mine.name}")
        members = tuple(
            (f"{other.label}:{a}", f"{first.label}:{b}") for a, b in zip(theirs.members, mine.members, strict=True)
        )
        control, size, domain, stage = place
        pairs.append(Pair(*names, control, size, domain, (stage, stage), mine.seeds, members, headline=True))
    table = build_grid(both)
    over = [s for s in scopes(table, draws=draws, seed=seed) if s.group == s.split == "all"]
    found = contrasts(table, pairs, over)
    return [replace(e, method=f"between runs, {e.method}") for e in found]


class Differences:
    """Differences of the other runs to the first, looked up by run, place and measure."""

    def __init__(self, runs: Sequence[Run], *, draws: int, seed: int) -> None:
        """Estimate them all."""
        self.first, self.runs = runs[0], runs[1:]
        self.found = {run.label: differences(runs[0], run, draws=draws, seed=seed) for run in self.runs}
        self.index = {(label, e.variant, e.measure): e for label, rows in self.found.items() for e in rows}

    def get(self, run: Run, place: Place, measure: str) -> Estimate | None:
        """Run minus the first run, or None when it cannot be had."""
        cell = run.places.get(place)
        return None if cell is None else self.index.get((run.label, f"{run.label}:{cell.name}", measure))


def measures_of(runs: Sequence[Run]) -> dict[str, str]:
    """Every measure that any run has a level of, with its name."""
    return {m: run.results.name(m) for run in reversed(runs) for m in run.results.measures()}


def runs_sheet(runs: Sequence[Run], found: Differences, share: float) -> Sheet:
    """What the runs are, a line per property."""

    def settings(run: Run) -> dict[str, str]:
        results, record = run.results, run.settings
        config = record.get("config", {})
        checks = check_controls(results, share)
        kappa = Entry(results.kappa())
        seeds = sorted({s for c in results.cells() for s in c.seeds if c.stage != "base"})
        shared = "" if run is found.first else f"{len(same_prompts(found.first, run)):,}"
        return {
            "models": str(len(results.variants)),
            "training seeds": ", ".join(map(str, seeds)),
            "study seed": str(config.get("seed", "")),
            "worst of": str(results.worst_of),
            "prompts asked in the first run's words": shared,
            "judge": results.judge,
            "judge against known grades, kappa": f"{kappa.value} {kappa.interval}".strip(),
            "controls met": f"{sum(c.met is True for c in checks)} of {len(checks)}" if checks else "none",
            "answers left out": f"{sum(record.get('left_out', {}).values()):,} of {record['counts']['in']:,}",
            "commit": str(record.get("commit", "unknown")),
            "finished": str(record.get("finished", "")),
            **{f"{name}": version for name, version in record.get("versions", {}).items()},
        }

    each = [settings(run) for run in runs]
    keys = list(dict.fromkeys(key for record in each for key in record))
    lines = [Line(key, tuple(record.get(key, "") for record in each)) for key in keys]
    return Sheet("runs", "The runs", "property", tuple(run.label for run in runs), tuple(lines))


def measure_sheet(runs: Sequence[Run], found: Differences, measure: str, name: str) -> Sheet:
    """One measure: a line per place, a column per run, then the differences to the first run."""
    lines = []
    for place in all_places(runs):
        cells = [run.places.get(place) for run in runs]
        levels = [
            None if cell is None else run.results.level(cell.name, measure)
            for run, cell in zip(runs, cells, strict=True)
        ]
        entries = [Entry(e) for e in (*levels, *(found.get(run, place, measure) for run in runs[1:]))]
        if not all(e.missing for e in entries):
            lines.append(Line(place_name(place), tuple(entries)))
    heads = [run.label for run in runs] + [f"{run.label} {MINUS} {runs[0].label}" for run in runs[1:]]
    caption = f"{name.capitalize()}, with 95 % intervals"
    return Sheet(measure, caption, "model", tuple(heads), tuple(lines))


def correlations_sheet(runs: Sequence[Run]) -> Sheet:
    """The headline correlations of every run."""
    lines = []
    for i in range(3):
        for j in range(i + 1, 3):
            rows = [
                run.results.correlation(run.results.headline[i], run.results.headline[j], run.results.models)
                for run in runs
            ]
            names = (runs[0].results.name(runs[0].results.headline[k]) for k in (i, j))
            lines.append(Line(" and ".join(names), tuple(Entry(e) for e in rows)))
    caption = "Spearman correlations over each run's models"
    return Sheet("correlations", caption, "measures", tuple(run.label for run in runs), tuple(lines))


def _levels_figure(runs: Sequence[Run], style: Style) -> Drawn:
    """One panel per headline measure; down the side the places, a series per run."""
    places = all_places(runs)
    figure, axes = grid(1, 3, 10, 1.1 + (0.1 + 0.14 * len(runs)) * len(places))
    shown, words, handles = [], [], {}
    for column, panel in enumerate(axes[0]):
        for k, run in enumerate(runs):
            measure = run.results.headline[column]
            cells = [run.places.get(place) for place in places]
            found = there([None if c is None else run.results.level(c.name, measure) for c in cells])
            if not found:
                continue
            look = {**style.series(k), "linestyle": "none"}
            at = [i + 0.6 / len(runs) * (k - (len(runs) - 1) / 2) for i, _ in found]
            handles[run.label] = points(panel, at, [e for _, e in found], look, across=True)
            shown += [replace(e, variant=f"{run.label}:{e.variant}") for _, e in found]
            path = ", ".join(f"{place_name(places[i])} {number(e.value)}" for i, e in found)
            words.append(f"{run.label}, {run.results.name(measure)}: {path}")
        panel.set_title(runs[0].results.name(runs[0].results.headline[column]), loc="left")
        panel.set_xlim(*limits((0, 1)))
        panel.set_yticks(range(len(places)), [place_name(p) for p in places])
        panel.set_ylim(len(places) - 0.5, -0.5)
        panel.grid(axis="y", linewidth=0.3)
    legend(figure, handles, len(runs))
    return Drawn("levels", "The runs side by side", "; ".join(words), figure, shown)


def _differences_figure(runs: Sequence[Run], found: Differences, style: Style) -> Drawn:
    """The differences to the first run, one panel per headline measure."""
    places = [p for p in all_places(runs) if any(found.get(r, p, m) for r in runs[1:] for m in r.results.headline)]
    figure, axes = grid(1, 3, 10, 1.1 + (0.1 + 0.14 * (len(runs) - 1)) * max(1, len(places)))
    shown, words, handles = [], [], {}
    for column, panel in enumerate(axes[0]):
        for k, run in enumerate(runs[1:], start=1):
            measure = run.results.headline[column]
            rows = there([found.get(run, place, measure) for place in places])
            if not rows:
                continue
            look = {**style.series(k), "linestyle": "none"}
            at = [i + 0.6 / len(runs) * (k - len(runs) / 2) for i, _ in rows]
            handles[f"{run.label} {MINUS} {runs[0].label}"] = points(panel, at, [e for _, e in rows], look, across=True)
            shown += [e for _, e in rows]
            path = ", ".join(f"{place_name(places[i])} {number(e.value)}" for i, e in rows)
            words.append(f"{run.label}, {run.results.name(measure)}: {path}")
        panel.axvline(0, color=style.dark, linewidth=0.8)
        panel.set_title(runs[0].results.name(runs[0].results.headline[column]), loc="left")
        panel.set_xlabel("difference")
        panel.set_yticks(range(len(places)), [place_name(p) for p in places])
        panel.set_ylim(len(places) - 0.5, -0.5)
        panel.grid(axis="y", linewidth=0.3)
    legend(figure, handles, len(runs) - 1)
    title = f"Differences to {runs[0].label}, paired by prompt"
    return Drawn("differences", title, "; ".join(words), figure, shown)


def brief(runs: Sequence[Run], found: Differences) -> list[str]:
    """What a reader must know before reading on, and how many differences stand out."""
    sentences = []
    for run in runs[1:]:
        rows = [e for e in found.found[run.label] if e.measure in run.results.headline and e.low is not None]
        out = [e for e in rows if e.low is not None and e.high is not None and (e.low > 0 or e.high < 0)]
        sentences.append(
            f"{run.label}: {len(out)} of {len(rows)} differences to {runs[0].label} on the three headline measures "
            "have a 95 % interval that excludes zero (about one in twenty would by chance)."
        )
        shared = run.places.keys() & runs[0].places.keys()
        alone = len(run.places.keys() ^ runs[0].places.keys())
        if alone:
            sentences.append(
                f"{run.label} and {runs[0].label} share {len(shared)} places of the design; {alone} are in one only."
            )
        other_seeds = [p for p in shared if run.places[p].seeds != runs[0].places[p].seeds]
        if other_seeds:
            sentences.append(
                f"{run.label}: {len(other_seeds)} models were trained with other seeds than in {runs[0].label}, "
                "so that no paired difference is given for them."
            )
        if run.results.judge != runs[0].results.judge:
            sentences.append(
                f"{run.label} was judged by {run.results.judge}, {runs[0].label} by {runs[0].results.judge}: "
                "differences in harmfulness hold both the models' and the judges'."
            )
    return sentences


def config_of(folders: Sequence[Path], overrides: Sequence[str]) -> CompareConfig:
    """The settings of a comparison from the command line."""
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"{folder} is no run folder (looked from {Path.cwd()}).")
    names = labels(folders)
    values: dict[str, Any] = {
        "runs": [str(folder) for folder in folders],
        "output": str(folders[0].resolve().parent / ("compare-" + "-".join(n.replace("/", "_") for n in names))),
        "title": "Side by side: " + ", ".join(names),
    }
    for override in overrides:
        apply_override(values, override)
    return build(CompareConfig, values, where="command line")


def compare(folders: Sequence[Path], overrides: Sequence[str]) -> Path:
    """Write the comparison of several runs and return its folder."""
    started = time.perf_counter()
    config = config_of(folders, overrides)
    record = read_manifest(config.output)
    if config.output.exists() and any(config.output.iterdir()) and (record is None or record.get("stage") != STAGE):
        raise UserError(f"{config.output} exists and holds no comparison. Name another folder with output=FOLDER.")
    runs = [read_run(folder, label) for folder, label in zip(config.runs, labels(config.runs), strict=True)]
    found = Differences(runs, draws=config.draws, seed=config.seed)
    rows = [e for each in found.found.values() for e in each]
    sheets = [measure_sheet(runs, found, m, name) for m, name in measures_of(runs).items()]
    sheets = [with_scope(s) for s in sheets if not s.empty]
    described, related = runs_sheet(runs, found, config.control_share), correlations_sheet(runs)
    drawn = [_levels_figure(runs, config.style), _differences_figure(runs, found, config.style)]
    figures = [page.show(d, config.output / "figures", config.style) for d in drawn if d.shown]
    export([described, *sheets, related], config.output / "export")
    write_rows(config.output / "estimates.parquet", Estimate, rows)
    frame = read_table(config.output / "estimates.parquet", Estimate).to_pandas()
    replace_file(config.output / "estimates.csv", frame.to_csv(index=False).encode())
    headline = runs[0].results.headline
    values = {
        "title": config.title,
        "note": page.paragraphs(config.note),
        "brief": brief(runs, found),
        "figures": {f["name"]: f for f in figures},
        "runs": described,
        "headline": [s for s in sheets if s.name in headline],
        "others": [s for s in sheets if s.name not in headline],
        "correlations": related,
        "methods": sorted({e.method for e in rows}),
        "commit": commit(),
    }
    replace_file(config.output / "report.html", page.render(config.template, values))
    write_manifest(
        config.output,
        stage=STAGE,
        config={k: v for k, v in plain(config).items() if k not in ("runs", "output", "template")},
        inputs={r.label: sha256_file(r.results.run / "tables" / "estimates.parquet") for r in runs},
        counts={"in": len(rows), "out": len(rows)},
        seconds=time.perf_counter() - started,
    )
    return config.output
