"""The script: kill and rerun, skip, damaged shards, and what is refused before a model is loaded."""

import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from candor.errors import UserError
from candor.manifest import read_manifest
from candor.rows import Distribution, Prompt, Sample
from candor.tables import read_rows, write_rows
from serve.options import parse
from serve.sample import main
from serve.store import DISTRIBUTIONS, SAMPLES

ROOT = Path(__file__).resolve().parents[2]
ASK = [
    {"format": "free", "mode": "sampled", "n": 3, "max_tokens": 16},
    {"format": "numerical", "mode": "sampled", "n": 2, "temperature": 0.5, "max_tokens": 4},
    *({"format": kind, "mode": "exact"} for kind in ("choice", "numerical", "decision")),
]


@pytest.fixture
def config(base, prompts, tmp_path):
    """Writes a configuration file: config(key=value) with changes, returning its path."""
    write_rows(tmp_path / "prompts.parquet", Prompt, prompts)
    values = {
        "base": str(base),
        "variant": "tiny-base",
        "prompts": str(tmp_path / "prompts.parquet"),
        "ask": ASK,
        "output_dir": str(tmp_path / "out"),
        "study_seed": 7,
        "engine": {"unit_prompts": 4, "threads": 1},
    }

    def write(**changes):
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(values | changes))
        return str(path)

    return write


def tables(folder):
    return read_rows(folder / SAMPLES, Sample), read_rows(folder / DISTRIBUTIONS, Distribution)


def test_tables_manifest_and_skip(config, prompts, tmp_path, capsys):
    main([config()])
    samples, distributions = tables(tmp_path / "out")
    assert [(s.prompt_id, s.draw) for s in samples] == [
        (p.prompt_id, d) for kind, n in (("free", 3), ("numerical", 2)) for p in prompts if p.format == kind
        for d in range(n)
    ]  # fmt: skip
    assert len({s.sample_id for s in samples}) == len(samples)
    assert {d.prompt_id for d in distributions} == {p.prompt_id for p in prompts if p.options}
    for d in distributions:
        assert sum(d.probabilities) + d.leftover == pytest.approx(1)
        assert d.unexplored <= d.leftover
    manifest = read_manifest(tmp_path / "out")
    assert manifest["counts"]["in"] == manifest["counts"]["out"] == len(samples) + len(distributions)
    assert set(manifest["inputs"]) == {"prompts", "base", "adapter", "text"}
    assert not (tmp_path / "out" / "shards").exists()
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
    started = time.monotonic()
    main([config(engine={"unit_prompts": 4, "threads": 2})])
    assert time.monotonic() - started < 0.5
    assert "nothing to do" in capsys.readouterr().err


def test_skipping_loads_no_torch(config, tmp_path):
    main([config()])
    code = "import sys; from serve.sample import main; main(sys.argv[1:]); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code, config()], cwd=ROOT, check=True, capture_output=True)


def test_killed_and_rerun_equals_uninterrupted(config, tmp_path):
    slow = ["engine.unit_prompts=1"]  # many shards, so that the kill falls between two
    main([config(), *slow, f"output_dir={tmp_path / 'whole'}"])
    process = subprocess.Popen(
        [sys.executable, "-m", "serve.sample", config(), *slow],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.PIPE,
    )
    shards = tmp_path / "out" / "shards"
    while process.poll() is None and len(list(shards.glob("*.parquet"))) < 3:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stderr.close()
    assert process.returncode == -signal.SIGKILL, "it ended before the kill"
    assert read_manifest(tmp_path / "out") is None
    kept = {p.name: p.stat().st_mtime_ns for p in shards.glob("*.parquet")}
    assert 3 <= len(kept) < 24
    main([config(), *slow])
    assert tables(tmp_path / "out") == tables(tmp_path / "whole")
    made = read_manifest(tmp_path / "out")["rows_made_in_this_run"]
    assert 0 < made < read_manifest(tmp_path / "whole")["rows_made_in_this_run"]


@pytest.mark.parametrize("damage", ["truncated", "foreign", "other rows"])
def test_bad_shards_are_set_aside(config, tmp_path, capsys, damage, monkeypatch):
    out = tmp_path / "out"
    monkeypatch.setattr("serve.store.Store.clear", lambda *_: None)
    main([config()])
    whole = tables(out)
    samples, exact = (sorted((out / "shards").glob(f"{k}-*.parquet")) for k in ("samples", "distributions"))
    if damage == "truncated":
        samples[0].write_bytes(samples[0].read_bytes()[:100])
    elif damage == "foreign":
        exact[0].write_bytes(samples[0].read_bytes())
    else:
        samples[0].write_bytes(samples[1].read_bytes())
    (out / "manifest.json").unlink()
    capsys.readouterr()
    main([config()])
    assert len(list((out / "shards").glob("*.bad"))) == 1
    assert "set aside as" in capsys.readouterr().err
    assert tables(out) == whole


def test_another_configuration_is_not_mixed_in(config):
    main([config()])
    with pytest.raises(UserError, match="changed: study_seed"):
        main([config(), "study_seed=8"])


def test_a_deleted_table_is_made_again(config, tmp_path):
    main([config()])
    whole = tables(tmp_path / "out")
    (tmp_path / "out" / SAMPLES).unlink()
    main([config()])
    assert tables(tmp_path / "out") == whole


def test_the_seed_and_the_variant_key_the_draws(config, tmp_path):
    texts = []
    for i, change in enumerate(["study_seed=7", "study_seed=8", "variant=other"]):
        main([config(), change, f"output_dir={tmp_path / str(i)}"])
        texts.append([s.text for s in tables(tmp_path / str(i))[0] if s.prompt_id.startswith("free")])
    assert not set(texts[0]) & set(texts[1])
    assert not set(texts[0]) & set(texts[2])


def test_sampled_answers_parse_to_their_options(config, prompts, tmp_path):
    main([config()])
    options = {p.prompt_id: p.options for p in prompts}
    for sample in tables(tmp_path / "out")[0]:
        found = parse(sample.text, options[sample.prompt_id])
        assert found is None or sample.text.lstrip(" ").startswith(options[sample.prompt_id][found].surfaces)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"studyseed": 1}, "unknown key 'studyseed'; did you mean 'study_seed'"),
        ({"engine": {"unit_prompt": 3}}, "unknown key 'unit_prompt'; did you mean 'unit_prompts'"),
        ({"engine": {"name": "torhc"}}, "engine.name is 'torhc'; did you mean 'torch'"),
        ({"ask": [{"format": "choise", "mode": "exact"}]}, "no prompt of format 'choise'; did you mean 'choice'"),
        ({"ask": [{"format": "free", "mode": "exact"}]}, "12 prompts of format 'free' have no options"),
        ({"ask": [{"format": "free", "mode": "sampled", "n": 0}]}, "n 0"),
        ({"ask": [{"format": "free", "mode": "sampled", "n": 2, "temperature": 0}]}, "the same reply 2 times"),
        ({"ask": [{"format": "choice", "mode": "exact", "n": 5}]}, "leave n, temperature, max_tokens out"),
        ({"ask": [{"format": "choice", "mode": "exact", "max_tokens": 5}]}, "leave n, temperature, max_tokens out"),
        ({"engine": {"device": "gpu"}}, "engine.device is 'gpu'; known: cpu, cuda"),
        ({"engine": {"device": "cuda:99"}}, "engine.device is 'cuda:99', but torch finds"),
        ({"ask": [ASK[0], ASK[0]]}, "merge them"),
        ({"prompts": "nowhere.parquet"}, "nowhere.parquet does not exist"),
        ({"base": "nowhere"}, "nowhere is no base model"),
    ],
)
def test_mistakes_are_told(config, changes, message):
    with pytest.raises(UserError, match=message):
        main([config(**changes)])


def test_a_file_without_prompts_is_told(config, tmp_path):
    path = config()
    write_rows(tmp_path / "prompts.parquet", Prompt, [])
    with pytest.raises(UserError, match="holds no prompts"):
        main([path])


def test_half_written_files_of_killed_runs_are_removed(config, tmp_path):
    shards = tmp_path / "out" / "shards"
    shards.mkdir(parents=True)
    for place in (shards, shards.parent):
        (place / ".samples.parquet.99.tmp").write_text("half")
    main([config()])
    assert {p.name for p in (tmp_path / "out").iterdir()} == {SAMPLES, DISTRIBUTIONS, "manifest.json"}


def test_a_sample_id_tells_apart_what_decides_a_reply_but_not_how_many_were_asked(config, base, tmp_path):
    other = shutil.copytree(base, tmp_path / "other")
    template = other / "chat_template.jinja"
    template.write_text(template.read_text() + "{# changed #}")
    ids = []
    for i, change in enumerate(["base=" + str(base), "base=" + str(other), "engine.dtype=float64"]):
        main([config(ask=[ASK[0]]), change, f"output_dir={tmp_path / str(i)}"])
        ids.append({s.sample_id for s in tables(tmp_path / str(i))[0]})
    assert not ids[0] & ids[1]
    assert not ids[0] & ids[2]
    main([config(ask=[ASK[0] | {"n": 1}], output_dir=str(tmp_path / "fewer"))])
    assert {s.sample_id for s in tables(tmp_path / "fewer")[0]} < ids[0]


def test_prompts_that_ask_the_same_are_refused(config, prompts, tmp_path):
    path = config()
    twin = dataclasses.replace(prompts[0], prompt_id="free/twin")
    write_rows(tmp_path / "prompts.parquet", Prompt, [*prompts, twin])
    with pytest.raises(UserError, match="'free/f0' and 'free/twin' ask the very same"):
        main([path])
