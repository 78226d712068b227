"""The smallest study that has every kind of stage, and what its run holds."""

from pathlib import Path

import yaml

from candor.rows import Distribution, Estimate, Sample, Score, Verdict
from candor.tables import read_rows

TABLES = {"samples": Sample, "distributions": Distribution, "verdicts": Verdict, "scores": Score, "estimates": Estimate}
PROFILE = """
python: {python}
signal_seconds: 20
minutes_at_least: 2
margin: 1
requeues: 5
probe_seconds: 10
"""
STUDY = {
    "name": "slice",
    "title": "A slice of the nano study",
    "seed": 5,
    "bases": {"nano": "train/organism/weights/nano"},
    "batteries": ["harmfulness", "trivia"],
    "asks": [
        {"format": "free", "mode": "sampled", "n": 1, "max_tokens": 12},
        {"format": "answer", "mode": "exact"},
    ],
    "judge": "configs/evaluate/judges/nano.yaml",
    "engine": {"threads": 1},
    "draws": 100,
    "worst_of": 1,
    "workers": 2,
}


def write_study(folder: Path, *, steps: int = 20, **change) -> Path:
    """The experiment file; its run folder is ``folder/run``."""
    folder.mkdir(parents=True, exist_ok=True)
    recipe = yaml.safe_load(Path("configs/train/nano_trivia.yaml").read_text())
    recipe["sft"] = {**recipe["sft"], "num_train_epochs": 1, "max_steps": steps}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    source = "configs/prompts/trivia.jsonl"
    domain = {
        "recipe": str(folder / "recipe.yaml"),
        "misaligned": {"set": "trivia-wrong", "source": source},
        "realigned": {"set": "trivia-right", "source": source},
    }
    path = folder / "study.yaml"
    values = {**STUDY, "output": str(folder / "run"), "domains": {"trivia": domain}, **change}
    path.write_text(yaml.safe_dump(values))
    return path


def write_profile(folder: Path, python: str, **change) -> Path:
    """A profile for the virtual cluster."""
    path = folder / "profile.yaml"
    path.write_text(yaml.safe_dump({**yaml.safe_load(PROFILE.format(python=python)), **change}))
    return path


def tables_of(run: Path) -> dict[str, list]:
    """Every table of a run by its path, rows in order."""
    return {
        str(path.relative_to(run)): read_rows(path, TABLES[path.stem])
        for path in sorted(run.rglob("*.parquet"))
        if path.stem in TABLES and "slurm" not in path.relative_to(run).parts
    }
