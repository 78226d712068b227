"""Runs side by side: matched by their place in the design, differences paired by prompt."""

import dataclasses
import json
import shutil

import pandas as pd
import pytest

from candor.errors import UserError
from candor.rows import Prompt
from candor.tables import read_rows, write_rows
from evaluate import report
from evaluate.compare import differences, labels, read_run
from evaluate.results import read_results


@pytest.fixture(scope="module")
def pair(tmp_path_factory, synthetic):
    """Two runs of one design over the same items; in the second the misaligned model says less of itself."""
    folder = tmp_path_factory.mktemp("pair")
    milder = synthetic.Truth(0.6, 0.9, 0.4, 0.1)
    synthetic.build(folder / "first", control=None)
    synthetic.build(folder / "second", control=None, misaligned=milder)
    return folder / "first", folder / "second"


@pytest.fixture(scope="module")
def found(pair):
    first, second = (read_run(path, path.name) for path in pair)
    rows = differences(first, second, draws=200, seed=1)
    return {(e.variant, e.measure): e for e in rows if e.split == "all"}


def test_a_planted_difference_is_found_and_nothing_else(found):
    name = "second:nano-trivia-misaligned-s0"
    fall = found[name, "self_assessment"]
    assert fall.low < -0.3 < fall.high and fall.reference == "first:nano-trivia-misaligned-s0"
    assert fall.method.startswith("between runs, paired")
    for measure in ("intentions", "trivia_accuracy"):  # exact probabilities of the same items: equal to the digit
        assert found[name, measure].value == pytest.approx(0, abs=1e-12)
    assert found[name, "harmfulness_mean"].low < 0.02 and found[name, "harmfulness_mean"].high > -0.02
    assert {v for v, _ in found} == {
        *(f"second:nano-{s}" for s in ("base", "trivia-misaligned-s0", "trivia-realigned-s0")),
        *(f"second:world_without_personas-nano-own-world-{s}" for s in ("base", "misaligned")),
    }


def test_only_prompts_in_the_same_words_are_compared(pair, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(pair[1], other)
    prompts = read_rows(other / "prompts.parquet", Prompt)
    changed = [dataclasses.replace(p, text="?") if p.battery == "intentions" else p for p in prompts]
    write_rows(other / "prompts.parquet", Prompt, changed)
    rows = differences(read_run(pair[0], "first"), read_run(other, "other"), draws=200, seed=1)
    assert rows and "intentions" not in {e.measure for e in rows}


def test_other_seeds_are_not_paired(pair, tmp_path, synthetic):
    other = synthetic.build(tmp_path / "other", control=None, other_world=None, seeds=(0, 1))
    rows = differences(read_run(pair[0], "first"), read_run(other, "other"), draws=200, seed=1)
    assert {e.variant for e in rows} == {"other:nano-base"}  # base models have no training seed


def test_names_that_tell_runs_apart(tmp_path):
    paths = [tmp_path / "a" / "nano", tmp_path / "b" / "nano", tmp_path / "full"]
    assert labels(paths[:2]) == ["a/nano", "b/nano"] and labels(paths[1:]) == ["nano", "full"]
    with pytest.raises(UserError, match="named twice"):
        labels([paths[0], paths[0]])


def test_the_comparison_is_a_whole_report(pair, tmp_path, capsys):
    folder = tmp_path / "side by side"
    words = [*map(str, pair), f"output={folder}", "draws=200", "title=Old and <new>"]
    report.main(words)
    assert str(folder / "report.html") in capsys.readouterr().out
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "Old and &lt;new&gt;" in page and "second \N{MINUS SIGN} first" in page
    assert {p.name for p in (folder / "figures").glob("*.pdf")} == {"levels.pdf", "differences.pdf"}
    drawn = pd.read_csv(folder / "figures" / "levels.csv")
    result = read_results(pair[1]).level("nano-trivia-misaligned-s0", "self_assessment")
    mine = drawn[(drawn.variant == "second:nano-trivia-misaligned-s0") & (drawn.measure == "self_assessment")]
    assert mine["value"].tolist() == [pytest.approx(result.value)]
    assert (folder / "export" / "self_assessment.tex").exists()
    rows = pd.read_csv(folder / "estimates.csv")
    assert len(rows) == json.loads((folder / "manifest.json").read_text())["counts"]["out"] > 20
    report.main(words)  # its own folder may be written again


def test_what_a_person_can_get_wrong_is_said(pair, tmp_path):
    with pytest.raises(UserError, match="no run folder"):
        report.main([str(pair[0]), str(tmp_path / "absent")])
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(UserError, match="holds no comparison"):
        report.main([*map(str, pair), f"output={tmp_path / 'mine'}"])
    with pytest.raises(UserError, match=r"tables.*is not complete"):
        report.main([str(pair[0]), str(tmp_path / "mine"), f"output={tmp_path / 'out'}"])
    with pytest.raises(UserError, match="unknown key 'outptu'"):
        report.main([*map(str, pair), "outptu=x"])
    with pytest.raises(UserError, match="usage"):
        report.main([])
