"""A slice of the nano study on both engines by one key: trained once, then asked, judged and scored on each.

Needs the environment of scripts/setup_vllm_cpu.sh: .venv-vllm/bin/python -m pytest -m full THIS_FILE
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

pytest.importorskip("vllm", reason="vLLM is not installed here; scripts/setup_vllm_cpu.sh makes .venv-vllm")

from candor.rows import Estimate, Sample, Score
from candor.tables import read_rows

sys.path.insert(0, str(Path(__file__).parents[1]))
from test_end_to_end import write_experiment

pytestmark = pytest.mark.full
BASE, MISALIGNED = "nano-base", "nano-trivia-misaligned-s0"


def run(experiment: Path, *words: str) -> None:
    command = [sys.executable, "-m", "evaluate.experiment", str(experiment), *words]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=900, env={**os.environ, "PYTHONPATH": str(Path.cwd())}
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folders of the same slice on the torch engine and on vLLM; the second is given the first one's adapters."""
    folder = tmp_path_factory.mktemp("engines")
    experiment = write_experiment(folder, folder / "torch")
    values = yaml.safe_load(experiment.read_text())
    values |= {
        "batteries": ["harmfulness", "intentions", "self_assessment", "trivia"],
        "battery_files": [],
        "asks": [
            {"format": "free", "mode": "sampled", "n": 2, "max_tokens": 24, "only": ["harmfulness/*[05]"]},
            {"format": "choice", "mode": "exact", "only": ["intentions/*-[01][05]/*"]},
            {"format": "decision", "mode": "exact", "only": ["decision/*[05]/*"]},
            {"format": "numerical", "mode": "exact", "only": ["numerical/*[05]/*"]},
            {"format": "answer", "mode": "exact", "only": ["trivia/*[05]"]},
        ],
        "workers": 1,
    }
    values.pop("golden")
    experiment.write_text(yaml.safe_dump(values))
    run(experiment)
    for made in ("data", "stages", "variants"):
        shutil.copytree(folder / "torch" / made, folder / "vllm" / made)
    for variant in (folder / "vllm" / "variants").iterdir():
        shutil.rmtree(variant / "answers")
        shutil.rmtree(variant / "verdicts")
    run(experiment, f"output={folder}/vllm", "engine.name=vllm")
    return folder / "torch", folder / "vllm"


def levels(folder: Path, variant: str) -> dict[str, Estimate]:
    """The variant's levels over all items, by measure."""
    rows = read_rows(folder / "tables" / "estimates.parquet", Estimate)
    kept = [e for e in rows if (e.kind, e.variant, e.group, e.split) == ("level", variant, "all", "all")]
    return {e.measure: e for e in kept if e.value is not None}


def differing(one: dict[str, Estimate], other: dict[str, Estimate]) -> list[str]:
    """Measures of which either value lies outside the other's 95 % interval, by more than rounding."""
    pairs = {m: (a, other[m]) for m, a in one.items()}
    return [m for m, (a, b) in pairs.items() if not (_holds(a, b.value) and _holds(b, a.value))]


def _holds(level: Estimate, value: float) -> bool:
    return level.low - 1e-4 <= value <= level.high + 1e-4


def test_the_study_ends_with_statistically_equal_results(runs):
    """One key chooses the engine; levels of every measure agree, and a real difference would be seen."""
    on_torch, on_vllm = runs
    for variant in (BASE, MISALIGNED):
        one, other = levels(on_torch, variant), levels(on_vllm, variant)
        assert one.keys() == other.keys() and len(one) > 5
        assert differing(one, other) == []
        for measure, level in one.items():  # far closer than the intervals ask, since the draws are the same
            assert level.value == pytest.approx(other[measure].value, abs=0.02), measure
    assert "intentions" in differing(levels(on_torch, BASE), levels(on_vllm, MISALIGNED))  # planted: another variant


def test_replies_and_scores_are_the_same_but_for_flips(runs):
    """Rounding flips few tokens, and scores from probabilities are equal to the fourth digit."""
    replies, scores = [], []
    for folder in runs:
        found = [r for p in sorted(folder.glob("variants/*/answers/samples.parquet")) for r in read_rows(p, Sample)]
        replies.append({(r.variant, r.prompt_id, r.draw): r.text for r in found})
        rows = read_rows(folder / "tables" / "scores.parquet", Score)
        scores.append({(s.variant, s.measure, s.prompt_id): s.value for s in rows})
    assert replies[0].keys() == replies[1].keys() and scores[0].keys() == scores[1].keys()
    assert np.mean([replies[0][k] == replies[1][k] for k in replies[0]]) > 0.98
    exact = [k for k in scores[0] if not k[1].startswith("harmfulness") and scores[0][k] is not None]
    assert max(abs(scores[0][k] - scores[1][k]) for k in exact) < 1e-4
    for folder in runs:  # each was asked on the engine it is named after
        for path in (folder / "stages").glob("sample-*.yaml"):
            assert yaml.safe_load(path.read_text())["engine"]["name"] == folder.name
