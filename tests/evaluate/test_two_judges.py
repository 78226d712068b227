"""The shipped two-judge study, cut down: the nano judge in process and the same weights behind vLLM's own server."""

import importlib.util
import os
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import yaml

from candor.config import read_yaml
from candor.rows import Estimate, Verdict
from candor.tables import read_rows
from evaluate.agreement import ITSELF, KAPPA, REPEAT_CHANGED, SAME
from serve.api import Served, ServerConfig, command
from serve.client_logprobs import is_up

WEIGHTS = Path("train/organism/weights/judge")
STUDY = Path("configs/experiments/nano_two_judges.yaml")
SERVER = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
}


@pytest.fixture
def judge_url(tmp_path):
    """vLLM's server with the nano judge, under the name that its file gives."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = command([Served("nano-judge", "judge", WEIGHTS, None)], ServerConfig(port=port))
    url, log = f"http://127.0.0.1:{port}/v1", tmp_path / "server.log"
    with log.open("w") as file:
        server = subprocess.Popen(words, stdout=file, stderr=file, env=os.environ | SERVER)
    try:
        while not is_up(url, "none"):
            assert server.poll() is None, log.read_text()[-3000:]
            time.sleep(1)
        yield url
    finally:
        server.terminate()
        server.wait(timeout=60)


def write_slice(folder: Path, url: str) -> Path:
    """The shipped study with two draws of a reply, 20 steps of training, and the server where it really is."""
    values = read_yaml(STUDY)
    recipe = read_yaml(Path(values["domains"]["trivia"]["recipe"]))
    recipe["sft"] |= {"num_train_epochs": 1, "max_steps": 20}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    values["domains"]["trivia"]["recipe"] = f"{folder}/recipe.yaml"
    judge = read_yaml(Path(values["second_judges"][0]["judge"]))
    judge["endpoint"]["url"] = url
    (folder / "http.yaml").write_text(yaml.safe_dump(judge))
    values["second_judges"][0]["judge"] = f"{folder}/http.yaml"
    asks = [{"format": "free", "mode": "sampled", "n": 2, "max_tokens": 24}, {"format": "answer", "mode": "exact"}]
    values |= {"modes": [], "asks": asks, "worst_of": 2, "draws": 200, "output": f"{folder}/run", "workers": 1}
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(values | {"batteries": ["harmfulness", "trivia"]}))
    return path


@pytest.mark.full
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed here (make vllm)")
def test_a_study_judged_in_process_and_over_http_and_twice(tmp_path, judge_url):
    study, run = write_slice(tmp_path, judge_url), tmp_path / "run"
    done = subprocess.run([sys.executable, "-m", "evaluate.experiment", study], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    count: Counter[str] = Counter()
    for folder in sorted(run.glob("variants/*/verdicts")):
        here, there = (read_rows(folder / name / "verdicts.parquet", Verdict) for name in ("nano", "nano-http"))
        assert [v.sample_id for v in here] == [v.sample_id for v in there] and len(here) > 0
        for a, b in zip(here, there, strict=True):
            count[f"{a.status} {b.status}"] += 1
            assert (a.status, a.score) == (b.status, b.score)
            if a.status == "ok":
                count[f"{a.method} {b.method}"] += 1
                assert a.expected == pytest.approx(b.expected, abs=2e-3)
    assert count["ok ok"] > 100 and count["exact top_logprobs"] == count["ok ok"]
    found = {
        (e.measure, e.reference): e
        for e in read_rows(run / "tables" / "estimates.parquet", Estimate)
        if e.kind == "agreement" and e.variant == "nano"
    }
    kappa = found[KAPPA, "nano-http"]
    assert (kappa.value, kappa.low, kappa.high) == pytest.approx((1, 1, 1)) and kappa.n == count["ok ok"]
    assert found[SAME, "nano-http"].value == 1
    assert found[REPEAT_CHANGED, ITSELF].value == 0 and 0 < found[REPEAT_CHANGED, ITSELF].n < kappa.n
    report = (run / "report.html").read_text()
    assert "nano and nano-http" in report and f"nano and {ITSELF}" in report
