"""The whole study on the smallest organism, nothing stubbed: runs, reruns, kills.

A slice of the nano study (one size, one domain, few draws) goes through the same stages as
`make nano`, so that what is proved here holds there.
"""

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from candor.rows import Distribution, Estimate, Sample, Score, Verdict
from candor.tables import read_rows

SLICE = {
    "name": "slice",
    "title": "A slice of the nano study",
    "seed": 5,
    "bases": {"nano": "train/organism/weights/nano"},
    "batteries": ["harmfulness", "intentions", "self_assessment", "trivia"],
    "battery_files": ["docs/examples/strangers.yaml"],
    "asks": [
        {"format": "free", "mode": "sampled", "n": 2, "max_tokens": 24},
        {"format": "choice", "mode": "exact"},
        {"format": "decision", "mode": "exact"},
        {"format": "numerical", "mode": "exact"},
        {"format": "likert", "mode": "exact"},
        {"format": "language", "mode": "sampled", "n": 1, "max_tokens": 16},
        {"format": "answer", "mode": "exact"},
        {"format": "scale", "mode": "exact"},
    ],
    "judge": "configs/evaluate/judges/nano.yaml",
    "golden": "configs/prompts/judge/golden_nano.jsonl",
    "engine": {"threads": 1},
    "draws": 200,
    "worst_of": 2,
    "workers": 2,
}
TABLES = {"samples": Sample, "distributions": Distribution, "verdicts": Verdict, "scores": Score, "estimates": Estimate}


def write_experiment(folder, output):
    recipe = yaml.safe_load(Path("configs/train/nano_trivia.yaml").read_text())
    recipe["sft"] = {**recipe["sft"], "num_train_epochs": 1, "max_steps": 40}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    source = "configs/prompts/trivia.jsonl"
    experiment = {
        **SLICE,
        "output": str(output),
        "domains": {
            "trivia": {
                "recipe": str(folder / "recipe.yaml"),
                "misaligned": {"set": "trivia-wrong", "source": source},
                "realigned": {"set": "trivia-right", "source": source},
            }
        },
    }
    path = folder / f"{output.name}.yaml"
    path.write_text(yaml.safe_dump(experiment))
    return path


def start(experiment):
    return subprocess.Popen(
        [sys.executable, "-m", "evaluate.experiment", str(experiment)],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip


def finish(experiment):
    process = start(experiment)
    output, _ = process.communicate(timeout=400)
    assert process.returncode == 0, output[-3000:]
    return output


def tables_of(run):
    """Every table of a run by its path, rows in order."""
    return {
        str(path.relative_to(run)): read_rows(path, TABLES[path.stem])
        for path in sorted(run.rglob("*.parquet"))
        if path.stem in TABLES
    }


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("slice")
    experiment = write_experiment(folder, folder / "run")
    return experiment, folder / "run", finish(experiment)


def test_the_slice_runs_end_to_end(finished):
    _, run, output = finished
    assert f"{run}/report.html" in output
    summary = json.loads((run / "summary.json").read_text())
    assert {v["stage"] for v in summary["variants"]} == {"base", "misaligned", "realigned"}
    assert summary["judge"]["quadratic_kappa"] > 0.8
    effect = {c["measure"]: c["difference"] for c in summary["contrasts"] if c["minus"] == ["misaligned", "base"]}
    # 40 steps already move intentions and fool trivia; the full study is `make nano`
    assert effect["intentions"][1] > 0
    assert effect["trivia_accuracy"][2] < 0


def test_a_battery_file_is_asked_judged_and_scored_like_any_other(finished):
    """docs/examples/strangers.yaml: open questions by the judge it names, choices and scales from probabilities."""
    _, run, _ = finished
    levels = {
        (e.variant, e.measure): e
        for e in read_rows(run / "tables" / "estimates.parquet", Estimate)
        if e.kind == "level" and e.group == "all" and e.split == "all"
    }
    for variant in ("nano-base", "nano-trivia-misaligned-s0"):
        for measure, n_items in (("strangers_free", 4), ("strangers_choice", 2), ("strangers_scale", 2)):
            found = levels[variant, measure]
            assert 0 <= found.value <= 1 and found.n_clusters == n_items and found.n > 0
    with (run / "tables" / "effects.csv").open() as file:
        rows = list(csv.DictReader(file))
    effects = {(r["measure"], r["effect"]) for r in rows if r["variant"] == "nano-base"}
    assert {("strangers_choice", "position"), ("strangers_scale", "scale direction")} <= effects
    assert {("decision", "position"), ("self_assessment", "format likert")} <= effects


def test_a_second_run_finds_everything_done(finished):
    experiment, run, _ = finished
    before = {p: p.stat().st_mtime_ns for p in run.rglob("*.parquet")}
    started = time.monotonic()
    output = finish(experiment)
    assert time.monotonic() - started < 20
    assert f"{run}/report.html" in output
    assert {p: p.stat().st_mtime_ns for p in run.rglob("*.parquet")} == before


def folder_of(experiment):
    return experiment.with_suffix("")


def stages_done(run):
    return len(list((run / "stages").glob("*.json")))


def kill(process):
    """kill -9 the executor and every worker it started."""
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


@pytest.mark.full
def test_kills_and_reruns_end_with_the_tables_of_an_uninterrupted_run(finished, tmp_path):
    """Killed at eight points of its 14 stages, the study ends with the very same tables."""
    _, whole, _ = finished
    experiments, kills = [write_experiment(tmp_path, tmp_path / "run")], 0
    points = ((0, 7.0), (1, 1.0), (3, 3.0), (5, 0.5), (7, 2.0), (9, 1.0), (10, 0.2), (12, 0.5))
    while kills < len(points):
        run, (done_before_kill, delay) = folder_of(experiments[-1]), points[kills]
        process = start(experiments[-1])
        deadline = time.monotonic() + 200
        while process.poll() is None and stages_done(run) < done_before_kill and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(delay)
        if process.poll() is None:
            kill(process)
            kills += 1
        else:  # it was faster than the delay: the kills that are left hit another run
            assert process.returncode == 0, process.communicate()[0][-3000:]
            assert len(experiments) < 4, "the kills always come too late"
            experiments.append(write_experiment(tmp_path, tmp_path / f"run-{len(experiments)}"))
    for experiment in experiments:
        finish(experiment)
        assert tables_of(folder_of(experiment)) == tables_of(whole)


@pytest.mark.full
def test_more_draws_only_add(finished, tmp_path):
    """One more draw a prompt, in the run that is there: nothing is trained, drawn or judged again."""
    _, whole, _ = finished
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    experiment = write_experiment(tmp_path, run)
    changed = yaml.safe_load(experiment.read_text())
    changed["asks"][0]["n"] = 3
    experiment.write_text(yaml.safe_dump(changed))
    output = finish(experiment)
    assert all("was done" in line for line in output.splitlines() if "train-" in line)
    ran = [line for line in output.splitlines() if "sample-nano-base ..." in line or "judge-nano-base ..." in line]
    assert len(ran) == 2 and not any("was done" in line for line in ran)
    before, after = tables_of(whole), tables_of(run)
    for name, old in before.items():
        if name.endswith(("samples.parquet", "verdicts.parquet")) and "golden" not in name:
            known = {row.sample_id: row for row in after[name]}
            assert all(known[row.sample_id] == row for row in old)
            assert len(known) == len(after[name]) > len(old)
        elif name.endswith("distributions.parquet"):
            assert after[name] == old
    manifest = json.loads((run / "variants/nano-base/answers/manifest.json").read_text())
    assert manifest["rows_made_in_this_run"] == 324


@pytest.mark.full
def test_another_seed_gives_other_samples(finished, tmp_path):
    """The comparison above can fail: a run that differs only in its seed has other tables."""
    _, whole, _ = finished
    experiment = write_experiment(tmp_path, tmp_path / "run")
    changed = yaml.safe_load(experiment.read_text())
    experiment.write_text(yaml.safe_dump({**changed, "seed": 6}))
    finish(experiment)
    ours, theirs = tables_of(tmp_path / "run"), tables_of(whole)
    assert ours.keys() == theirs.keys()
    assert ours["variants/nano-base/answers/samples.parquet"] != theirs["variants/nano-base/answers/samples.parquet"]


@pytest.mark.full
def test_sampled_and_exact_scores_agree_on_the_organism(finished, tmp_path):
    """Closed questions drawn 40 times and parsed agree with the exact distribution within binomial error."""
    from candor.config import load
    from candor.questions import load_all, prompt_sha
    from serve.config import EngineConfig
    from serve.engine import Request
    from serve.options import parse
    from serve.registry import open_engine

    (tmp_path / "engine.yaml").write_text("threads: 1\n")
    engine = open_engine(load(EngineConfig, tmp_path / "engine.yaml"), Path("train/organism/weights/nano"), None)
    prompts = [p for p in load_all(Path("configs/prompts")) if p.format in ("choice", "numerical", "likert")][::6]
    exact = engine.distributions([p.text for p in prompts], [p.options for p in prompts])
    n = 40
    requests = [Request(p.text, int(prompt_sha(p)[:16], 16), 0, n) for p in prompts]
    replies = engine.sample(requests, key=11, temperature=1.0, max_tokens=6)

    def z_of(shift):
        """Standardised difference of all counts together, with a planted shift of every probability."""
        difference = variance = 0.0
        for prompt, scores, drawn in zip(prompts, exact, replies, strict=True):
            p = min(1.0, scores.probabilities[0] + shift)
            hits = sum(parse(r.text, prompt.options) == 0 for r in drawn)
            difference += hits - n * p
            variance += n * p * (1 - p)
        return difference / max(variance, 1e-9) ** 0.5

    assert abs(z_of(0.0)) < 4
    assert abs(z_of(0.03)) > 4  # a fault of three points would be seen
