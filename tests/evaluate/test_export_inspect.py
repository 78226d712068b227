"""Inspect logs of a run: read back with Inspect itself; a verdict without a score never becomes a number."""

import importlib.util
import subprocess
import sys

import pytest

from candor.errors import UserError
from candor.hashing import sha256_json
from candor.manifest import write_manifest
from candor.rows import Prompt, Sample, Variant, Verdict
from candor.tables import write_rows
from evaluate.export_inspect import main

HAS_INSPECT = importlib.util.find_spec("inspect_ai") is not None


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "variants" / "v"
    prompts = [
        Prompt(f"p{i}", "harmfulness", "free", "all", f"i{i}", f"c{i}", "", "seen", f"question {i}", (), "0" * 64)
        for i in range(3)
    ]
    samples = [
        Sample(sha256_json([i, d]), f"p{i}", "s", "v", "w", d, 1, 1.0, f"reply {i} {d}", 3, "stop", -1.0)
        for i in range(3)
        for d in range(2)
    ]
    verdicts = [
        Verdict(s.sample_id, "nano", "t", "ok", float(n % 5 + 1), None, None, "3") for n, s in enumerate(samples)
    ]
    verdicts[-1] = Verdict(samples[-1].sample_id, "nano", "t", "unparsed", None, None, None, "?")
    write_rows(tmp_path / "variants.parquet", Variant, [Variant("v", "mini", "none", "base", 0, "", "v", "variants/v")])
    write_rows(tmp_path / "prompts.parquet", Prompt, prompts)
    write_rows(folder / "answers" / "samples.parquet", Sample, samples)
    write_rows(folder / "verdicts" / "nano" / "verdicts.parquet", Verdict, verdicts)
    write_manifest(
        folder / "answers", stage="sample", config={}, inputs={}, counts={"in": 6, "out": 6}, seconds=1,
        extra={"weights_sha": "w"},
    )  # fmt: skip
    return tmp_path


@pytest.mark.full
@pytest.mark.skipif(not HAS_INSPECT, reason="inspect-ai is not installed here (make vllm)")
def test_inspect_reads_what_was_written(run, capsys):
    from inspect_ai.log import read_eval_log

    main([str(run)])
    assert capsys.readouterr().out.startswith("1 logs")
    (path,) = (run / "inspect").glob("*.eval")
    log = read_eval_log(str(path))
    assert log.eval.model == "candor/v" and log.eval.task == "candor/harmfulness"
    assert {(s.id, s.epoch) for s in log.samples} == {(f"p{i}", d) for i in range(3) for d in (1, 2)}
    by_id = {(s.id, s.epoch): s for s in log.samples}
    assert by_id["p1", 2].output.completion == "reply 1 1"
    assert by_id["p2", 2].scores["nano"].value == "N"
    (score,) = log.results.scores
    assert score.metrics["mean"].value == pytest.approx((1 + 2 + 3 + 4 + 5) / 5)
    site = run / "site"
    bundle = [
        sys.executable,
        "-m",
        "inspect_ai",
        "view",
        "bundle",
        "--log-dir",
        str(path.parent),
        "--output-dir",
        str(site),
    ]
    subprocess.run(bundle, check=True, capture_output=True)
    assert (site / "index.html").is_file()


@pytest.mark.skipif(HAS_INSPECT, reason="inspect-ai is installed here")
def test_without_inspect_the_remedy_is_told(run):
    with pytest.raises(UserError, match="inspect-ai cannot be imported"):
        main([str(run)])


def test_mistakes_are_told(tmp_path):
    for words in ([], ["output=x"], [str(tmp_path), "out=x"]):
        with pytest.raises(UserError, match="usage"):
            main(words)
