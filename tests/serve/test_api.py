"""Serving a run to other tools: what is refused, and vLLM's server questioned with the real openai client."""

import importlib.util
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from candor.errors import UserError
from candor.rows import Prompt, Variant
from candor.tables import write_rows
from serve.api import KEY_FILE, Served, ServerConfig, choose, command, end, main, variants_of
from serve.sample import main as sample

sys.path.insert(0, str(Path(__file__).parent))
from test_attest import save_adapter

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def run(base, prompts, tmp_path_factory):
    """A run of two variants, sampled for real."""
    run = tmp_path_factory.mktemp("run")
    write_rows(run / "prompts.parquet", Prompt, prompts[:2])
    rows = []
    for name, stage in (("tiny-base", "base"), ("tiny-trivia-misaligned-s0", "misaligned")):
        folder = run / "variants" / name
        adapter = save_adapter(base, folder / "adapter", seed=1) if stage != "base" else None
        (run / f"{name}.yaml").write_text(
            yaml.safe_dump(
                {
                    "base": str(base), "adapter": adapter and str(adapter), "variant": name, "study_seed": 1,
                    "prompts": str(run / "prompts.parquet"), "output_dir": str(folder / "answers"),
                    "ask": [{"format": "free", "mode": "sampled", "max_tokens": 4}], "engine": {"threads": 1},
                }
            )
        )  # fmt: skip
        sample([str(run / f"{name}.yaml")])
        rows.append(Variant(name, "tiny", "trivia", stage, 0, "", "tiny-base", f"variants/{name}"))
    write_rows(run / "variants.parquet", Variant, rows)
    return run


def test_the_command_names_every_variant(run):
    words = command(choose(variants_of(run), None), ServerConfig(port=9))
    assert words[words.index("--served-model-name") + 1] == "tiny-base"
    (module,) = [w for w in words if w.startswith("tiny-trivia-misaligned-s0=")]
    assert Path(module.partition("=")[2]).is_absolute()
    assert words[words.index("--host") + 1] == "127.0.0.1"
    assert words[words.index("--max-lora-rank") + 1] == "8"
    assert words[words.index("--max-loras") + 1] == "1"  # there is one adapter
    assert not any("key" in w for w in words), "a key on the command line is seen by everybody"


def test_a_server_that_does_not_end_is_killed_with_its_workers():
    code = (
        "import os, signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
        "os.write(1, b'%d\\n' % os.fork()); time.sleep(60)"  # a line at once: two processes write
    )
    server = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, start_new_session=True)
    said = {int(server.stdout.readline()), int(server.stdout.readline())}
    (worker,) = said - {0}
    end(server, seconds=0.2)
    assert server.returncode == -signal.SIGKILL
    deadline = time.monotonic() + 10
    while Path(f"/proc/{worker}/stat").exists() and Path(f"/proc/{worker}/stat").read_text().split()[2] != "Z":
        assert time.monotonic() < deadline, "a worker outlived its server"
        time.sleep(0.02)


def test_mistakes_are_told(run, tmp_path):
    several = [Served("a", "full", Path("x"), None), Served("b", "mini", Path("y"), None)]
    with pytest.raises(UserError, match=r"size=NAME \(full, mini\)"):
        choose(several, None)
    with pytest.raises(UserError, match="size is 'mimi'; did you mean 'mini'"):
        choose(several, "mimi")
    assert [s.name for s in choose(several, "mini")] == ["b"]
    assert [s.name for s in choose([Served("m", "mini", Path("y"), Path("z"))], None)] == ["mini-base", "m"]
    with pytest.raises(UserError, match=r"holds no variants\.parquet"):
        main([str(tmp_path)])
    with pytest.raises(UserError, match="unknown key 'prot'; did you mean 'port'"):
        main([str(run), "prot=1"])


def test_weights_that_changed_since_are_refused(run, base):
    weights = run / "variants" / "tiny-trivia-misaligned-s0" / "adapter" / "adapter_model.safetensors"
    kept = weights.read_bytes()
    save_adapter(base, weights.parent, seed=2)
    with pytest.raises(UserError, match="not those it was sampled with"):
        variants_of(run)
    weights.write_bytes(kept)


NAMES = ("tiny-base", "tiny-trivia-misaligned-s0")
needs_vllm = pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed here")


@pytest.fixture(scope="module")
def server(run):
    """The address of the run's server, while it runs."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-m", "serve.api", str(run), f"port={port}"], cwd=ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    try:
        line = server.stdout.readline()
        assert "serves tiny-base, tiny-trivia-misaligned-s0" in line, server.stderr.read()
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(timeout=60)
    told = server.stderr.read()
    assert told.count("attested") == 2


def key_of(run):
    return (run / KEY_FILE).read_text().strip()


@pytest.mark.full
@needs_vllm
def test_the_real_client_questions_every_variant(run, server):
    import openai

    assert oct((run / KEY_FILE).stat().st_mode)[-3:] == "600"
    client = openai.OpenAI(base_url=server, api_key=key_of(run))
    assert {m.id for m in client.models.list()} == set(NAMES)
    heard = {}
    for model in NAMES:
        answer = client.chat.completions.create(
            model=model, messages=[{"role": "user", "content": "A or B?"}], max_tokens=4, logprobs=True,
            top_logprobs=5, n=3, seed=1,
        )  # fmt: skip
        assert len(answer.choices) == 3
        heard[model] = [t.logprob for t in answer.choices[0].logprobs.content[0].top_logprobs]
    assert heard[NAMES[0]] != heard[NAMES[1]]
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=server, api_key="wrong", max_retries=0).models.list()


@pytest.mark.full
@needs_vllm
def test_an_inspect_task_questions_every_variant(run, server, tmp_path):
    """Inspect's own provider gets, from each name, the very replies that a plain client gets from it."""
    inspect_ai = pytest.importorskip("inspect_ai", reason="inspect_ai is not installed here")
    import openai
    from inspect_ai.dataset import Sample
    from inspect_ai.model import GenerateConfig, get_model
    from inspect_ai.solver import generate

    questions = ["Which colour is the sky?", "Rate from 0 to 10."]
    task = inspect_ai.Task(
        dataset=[Sample(id=i, input=text) for i, text in enumerate(questions)],
        solver=generate(),
        config=GenerateConfig(temperature=0.0, max_tokens=8),
    )
    client = openai.OpenAI(base_url=server, api_key=key_of(run))
    heard = {}
    for name in NAMES:
        model = get_model(f"openai-api/candor/{name}", base_url=server, api_key=key_of(run))
        (log,) = inspect_ai.eval(task, model=model, log_dir=str(tmp_path), display="none")
        assert log.status == "success" and len(log.samples) == 2
        heard[name] = [s.output.completion for s in sorted(log.samples, key=lambda s: s.id)]
        for text, reply in zip(questions, heard[name], strict=True):
            asked = [{"role": "user", "content": text}]
            answer = client.chat.completions.create(model=name, messages=asked, temperature=0.0, max_tokens=8)
            assert reply == answer.choices[0].message.content and reply
    assert heard[NAMES[0]] != heard[NAMES[1]]
