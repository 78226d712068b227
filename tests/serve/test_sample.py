"""The script: kill and rerun, skip, damaged shards, and what is refused before a model is loaded."""

import dataclasses
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

from candor.errors import UserError
from candor.manifest import read_manifest
from candor.rows import Distribution, Option, Prompt, Sample
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
    assert len(list((tmp_path / "out").glob("store/*/*.parquet"))) == 2, "not compacted"
    assert manifest["attestation"]["status"] == "attested"
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*")}
    main([config(engine={"unit_prompts": 4, "threads": 2})])
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*")} == before
    assert "nothing to do" in capsys.readouterr().err


def test_a_path_may_hold_an_equals_sign(config, tmp_path):
    folders = [tmp_path / f"lr={rate}" for rate in ("1e-5", "1e-4")]
    paths = []
    for folder in folders:
        folder.mkdir()
        paths.append(Path(config(output_dir=str(folder / "out"), ask=ASK[:1])).rename(folder / "sample.yaml"))
    main([*map(str, paths), "study_seed=8"])
    assert {s.study_seed for f in folders for s in read_rows(f / "out" / SAMPLES, Sample)} == {8}


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
    out = tmp_path / "out"
    while process.poll() is None and len(list(out.glob("store/*/*.parquet"))) < 3:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stderr.close()
    assert process.returncode == -signal.SIGKILL, "it ended before the kill"
    assert read_manifest(tmp_path / "out") is None
    assert 3 <= len(list(out.glob("store/*/*.parquet"))) < 24
    main([config(), *slow])
    assert tables(tmp_path / "out") == tables(tmp_path / "whole")
    made = read_manifest(tmp_path / "out")["rows_made_in_this_run"]
    assert 0 < made < read_manifest(tmp_path / "whole")["rows_made_in_this_run"]


@pytest.mark.parametrize("damage", ["truncated", "foreign", "other rows", "flipped byte"])
def test_bad_shards_are_set_aside(config, tmp_path, capsys, damage, monkeypatch):
    out = tmp_path / "out"
    monkeypatch.setattr("serve.store.Store.compact", lambda *_: None)
    main([config()])
    whole = tables(out)
    samples, exact = (sorted(out.glob(f"store/*/{k}-*.parquet")) for k in ("samples", "distributions"))
    if damage == "truncated":
        samples[0].write_bytes(samples[0].read_bytes()[:100])
    elif damage == "foreign":
        exact[0].write_bytes(samples[0].read_bytes())
    elif damage == "flipped byte":
        data = bytearray(samples[0].read_bytes())
        data[40] ^= 1
        samples[0].write_bytes(data)
    else:
        samples[0].write_bytes(samples[1].read_bytes())
    (out / "manifest.json").unlink()
    capsys.readouterr()
    main([config()])
    assert len(list(out.glob("store/*/*.bad"))) == 1
    assert "set aside as" in capsys.readouterr().err
    assert tables(out) == whole


def test_more_draws_and_more_prompts_only_add(config, prompts, tmp_path):
    """Draws 0 and 1 are kept as they are, and a prompt that got another name keeps its answers."""
    path = config(ask=[ASK[0] | {"n": 2}, *ASK[2:]])
    write_rows(tmp_path / "prompts.parquet", Prompt, prompts[1:])
    main([path])
    fewer = {s.sample_id: s for s in tables(tmp_path / "out")[0]}
    renamed = [dataclasses.replace(prompts[1], prompt_id="free/renamed")]
    write_rows(tmp_path / "prompts.parquet", Prompt, [prompts[0], *renamed, *prompts[2:]])
    main([config(ask=[ASK[0] | {"n": 5}, *ASK[2:]])])
    more = tables(tmp_path / "out")[0]
    assert len(more) == 60
    assert {s.prompt_id for s in more} >= {"free/renamed", "free/f0"} and "free/f1" not in {s.prompt_id for s in more}
    same = [s for s in more if s.sample_id in fewer]
    assert [s.text for s in same] == [fewer[s.sample_id].text for s in same]
    made = read_manifest(tmp_path / "out")["rows_made_in_this_run"]
    assert made == 60 - 22
    main([config(ask=[ASK[0] | {"n": 1}, *ASK[2:]])])
    assert [s.sample_id for s in tables(tmp_path / "out")[0]] == [s.sample_id for s in more if s.draw == 0]
    assert read_manifest(tmp_path / "out")["rows_made_in_this_run"] == 0


@pytest.mark.full
def test_two_at_once_in_one_folder(config, tmp_path):
    main([config(), f"output_dir={tmp_path / 'alone'}"])
    code = [sys.executable, "-m", "serve.sample", config(), "engine.unit_prompts=4"]
    processes = [subprocess.Popen(code, cwd=ROOT, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    told = [p.communicate()[1] for p in processes]
    assert [p.returncode for p in processes] == [0, 0], told
    assert tables(tmp_path / "out") == tables(tmp_path / "alone")


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
        ({"engine": {"name": "torhc"}}, "name is 'torhc'; did you mean 'torch'"),
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


def test_half_written_files_of_killed_runs_are_removed_once_they_are_old(config, tmp_path):
    main([config()])
    out = tmp_path / "out"
    (store,) = out.glob("store/*")
    for place in (store, out):
        for name, age in (("old", 7200), ("young", 0)):
            path = place / f".{name}.parquet.99.tmp"
            path.write_text("half")
            os.utime(path, (time.time() - age,) * 2)
    (out / "manifest.json").unlink()
    main([config()])
    assert sorted(p.parent.name + "/" + p.name for p in out.rglob(".*.tmp")) == sorted(
        f"{place.name}/.young.parquet.99.tmp" for place in (store, out)
    )


def test_several_configurations_in_one_process(config, base, tmp_path):
    first, second = Path(config()).read_text(), config(variant="again", output_dir=str(tmp_path / "second"))
    (tmp_path / "first.yaml").write_text(first)
    main([str(tmp_path / "first.yaml"), second, "engine.unit_prompts=4"])
    assert len(tables(tmp_path / "out")[0]) == len(tables(tmp_path / "second")[0]) > 0


def test_a_long_prompt_is_told_before_the_weights_are_loaded(config, prompts, tmp_path, monkeypatch):
    path = config()
    write_rows(
        tmp_path / "prompts.parquet",
        Prompt,
        [*prompts, dataclasses.replace(prompts[-1], prompt_id="decision/long", text="word " * 400)],
    )
    monkeypatch.setattr("serve.registry.open_engine", lambda *_, **__: pytest.fail("the engine was opened"))
    with pytest.raises(UserError, match=r"'word word .*does not fit the model's context of 256"):
        main([path])


def test_a_vocabulary_without_bytes_is_told_before_the_weights_are_loaded(config, base, tmp_path, monkeypatch):
    """As Phi-3 and Gemma have it; sampled replies need none."""
    other = shutil.copytree(base, tmp_path / "other")
    decoder = {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]}
    for name, change in (("config.json", {"model_type": "phi3"}), ("tokenizer.json", {"decoder": decoder})):
        (other / name).write_text(json.dumps(json.loads((other / name).read_text()) | change))

    def open_engine(*_, **__):
        raise UserError("the engine was opened")

    monkeypatch.setattr("serve.registry.open_engine", open_engine)
    with pytest.raises(
        UserError, match=r"other: exact answer distributions need a byte-level tokenizer.*mode: sampled"
    ):
        main([config(base=str(other))])
    with pytest.raises(UserError, match="the engine was opened"):
        main([config(base=str(other), ask=ASK[:2])])


def test_options_that_are_the_same_to_the_tokenizer_are_refused(config, prompts, tmp_path):
    """Qwen's tokenizer composes characters: é in one piece and in two cannot be told apart."""
    twins = (Option("composed", 0.0, ("caf\u00e9",)), Option("in two", 1.0, ("cafe\u0301",)))
    path = config(ask=[ASK[2]])
    write_rows(tmp_path / "prompts.parquet", Prompt, [dataclasses.replace(prompts[-9], options=twins)])
    with pytest.raises(UserError, match="options 'composed' and 'in two' are the same to this tokenizer"):
        main([path])


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


def test_prompts_that_would_share_random_numbers_are_refused(config, monkeypatch):
    """Planted: a 64-bit hash that gives every prompt one number."""
    path = config()
    monkeypatch.setattr("serve.plan.hash64", lambda *parts: 7)
    with pytest.raises(UserError, match=r"would draw the same random numbers.*Change the wording"):
        main([path])
