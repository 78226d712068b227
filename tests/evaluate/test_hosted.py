"""A model behind an endpoint as a variant of an experiment: planned, asked over real HTTP, judged and reported."""

import json
import sys
from pathlib import Path

import pytest
import yaml

from candor.config import build
from candor.errors import UserError
from candor.rows import Distribution, Estimate, Sample
from candor.tables import read_rows
from evaluate import questions
from evaluate.experiment import main
from evaluate.experiment_config import Experiment
from evaluate.plan import build_plan, subjects_of
from evaluate.stages import write_config
from serve import sample
from serve.torch_engine import TorchEngine

sys.path.insert(0, str(Path(__file__).parents[1] / "serve"))
from subject_server import subject_server

NANO = "train/organism/weights/nano"


@pytest.fixture(scope="module")
def hosted():
    return TorchEngine(Path(NANO), None)


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")


def values(folder: Path, url: str = "http://127.0.0.1:1/v1", **change) -> dict:
    """One base model of ours, and the same weights behind an endpoint, called a fine-tune of it."""
    api = {"model": "ft:far", "endpoint": {"url": url, "retries": 1, "backoff_s": 0.01, "concurrency": 4}}
    far = {"size": "nano", "domain": "afar", "stage": "misaligned", "reference": "nano-base", "api": api}
    return {
        "name": "hosted",
        "title": "A hosted model",
        "output": f"{folder}/run",
        "seed": 3,
        "bases": {"nano": NANO},
        "domains": {},
        "hosted": {"far": far},
        "batteries": ["harmfulness", "intentions"],
        "asks": [
            {"format": "free", "mode": "sampled", "n": 1, "max_tokens": 12, "only": ["harmfulness/*1"]},
            {"format": "choice", "mode": "exact", "battery": "intentions"},
        ],
        "judge": "configs/evaluate/judges/nano.yaml",
        "judge_any_model": True,  # no file shows what is behind an endpoint
        "engine": {"threads": 1},
        "draws": 100,
        "worst_of": 1,
        "paper": None,
        "workers": 1,
        **change,
    }  # fmt: skip


def test_it_is_sampled_and_judged_but_not_trained(tmp_path):
    experiment = build(Experiment, values(tmp_path), where="test")
    stages = {s.id: s for s in build_plan(experiment)}
    config = stages["sample-far"].config
    assert config["base"] is None and config["adapter"] is None
    assert config["engine"]["name"] == "api" and config["engine"]["api"]["model"] == "ft:far"
    assert stages["sample-far"].inputs == (tmp_path / "run" / "prompts.parquet",)
    assert stages["judge-far"].config["engine"]["name"] == "torch"
    assert {"sample-far", "judge-far"} <= set(stages["tables"].after)
    assert not [i for i in stages if i.startswith("train-")]
    (row,) = [s.row for s in subjects_of(experiment) if s.row.name == "far"]
    assert (row.stage, row.reference, row.control) == ("misaligned", "nano-base", "")


def test_mistakes_are_told(tmp_path):
    given = values(tmp_path)
    with pytest.raises(UserError, match=r"engine\.name is api, but models that are trained here.*hosted:"):
        build(Experiment, {**given, "engine": {"name": "api", "api": given["hosted"]["far"]["api"]}}, where="test")
    given["hosted"]["far"]["reference"] = "nano-bse"
    with pytest.raises(UserError, match=r"hosted\.far: reference 'nano-bse'; did you mean 'nano-base'"):
        build_plan(build(Experiment, given, where="test"))
    with pytest.raises(UserError, match=r"bases \(or hosted\)"):
        build(Experiment, {**given, "bases": {}, "hosted": {}}, where="test")
    given["hosted"] = {"nano-base": {**given["hosted"]["far"], "reference": None}}
    with pytest.raises(UserError, match="two variants would be called nano-base"):
        subjects_of(build(Experiment, given, where="test"))


def test_the_planned_stage_asks_the_endpoint(tmp_path, hosted):
    with subject_server(hosted) as (url, asked):
        experiment = build(Experiment, values(tmp_path, url), where="test")
        stages = {s.id: s for s in build_plan(experiment)}
        questions.main([str(write_config(experiment.output, stages["questions"]))])
        sample.main([str(write_config(experiment.output, stages["sample-far"]))])
        assert {body["model"] for body in asked} == {"ft:far"}
        n_asked = len(asked)
        sample.main([str(write_config(experiment.output, stages["sample-far"]))])
        assert len(asked) == n_asked, "what is done was asked again"
    folder = experiment.output / "variants" / "far" / "answers"
    replies = read_rows(folder / "samples.parquet", Sample)
    assert replies and {r.variant for r in replies} == {"far"}
    assert {d.method for d in read_rows(folder / "distributions.parquet", Distribution)} == {"top_logprobs"}
    assert "hosted" in json.loads((folder / "manifest.json").read_text())["attestation"]["status"]


@pytest.mark.full
def test_it_stands_in_the_report_beside_ours(tmp_path, hosted):
    """The same weights here and behind the endpoint: closed questions agree, and the difference is no difference."""
    with subject_server(hosted) as (url, _):
        (tmp_path / "experiment.yaml").write_text(yaml.safe_dump(values(tmp_path, url)))
        main([str(tmp_path / "experiment.yaml")])
    run = tmp_path / "run"
    assert {v["name"] for v in json.loads((run / "summary.json").read_text())["variants"]} == {"far", "nano-base"}
    rows = read_rows(run / "tables" / "estimates.parquet", Estimate)
    whole = [e for e in rows if (e.measure, e.group, e.split) == ("intentions", "all", "all")]
    level = {e.variant: e.value for e in whole if e.kind == "level"}
    assert level["far"] == pytest.approx(level["nano-base"], abs=0.02)
    (difference,) = [e for e in whole if e.kind == "contrast"]
    assert (difference.variant, difference.reference) == ("far", "nano-base")
    report = (run / "report.html").read_text()
    assert "ft:far" in report and "(top_logprobs)" in report
