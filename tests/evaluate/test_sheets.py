"""Sheets as LaTeX and CSV: nothing breaks out, every number is there, and a real LaTeX takes them."""

import dataclasses
import io
import shutil
import subprocess

import pandas as pd
import pytest

from candor.rows import Estimate
from evaluate.results import read_results
from evaluate.sheets import Entry, Line, Plain, Sheet, csv, escape, export, latex, with_scope

NASTY = r"50 % of {a}_b & $x$ #1 ~ ^ \input{secret} <b> |"


def number(value, low=None, high=None):
    return Estimate("m", "level", "v", "", "all", "all", value, low, high, 10, 1, 5, "by hand")


def sheet(*cells):
    return Sheet("planted", "Caption " + NASTY, "model", ("a_b", "words", "none"), (Line("x_" + NASTY, cells),))


PLANTED = sheet(Entry(number(-0.126, -0.2, -0.05), 0.3), NASTY, Entry(None))


def test_latex_is_booktabs_and_escaped():
    text = latex(PLANTED)
    for word in (r"\toprule", r"\midrule", r"\bottomrule", r"\label{tab:planted}", r"\begin{tabular}{lrlr}"):
        assert word in text
    assert r"\shortstack[r]{{$-$0.13} \\ {[$-$0.20, $-$0.05]} \\ {paper: 0.30}}" in text
    assert r"\input" not in text and r"a\_b" in text and " -- " in text
    plain = text.replace(r"\_", "").replace(r"\%", "").replace(r"\&", "").replace(r"\#", "").replace(r"\$", "")
    assert "_" not in plain.replace("tab:planted", "") and "#" not in plain
    assert "%" not in plain.split("\n", 1)[1]


def test_escape_leaves_no_special_character_bare():
    assert escape("a_b%") == r"a\_b\%"
    assert escape("\\") == r"\textbackslash{}"
    assert escape("{}") == r"\{\}"


def test_csv_has_a_line_per_cell():
    rows = pd.read_csv(io.StringIO(csv(PLANTED)))
    assert rows["column"].tolist() == ["a_b", "words", "none"]
    first = rows.iloc[0]
    assert (first.value, first.low, first.high, first.published, first.n) == (-0.126, -0.2, -0.05, 0.3, 10)
    assert rows.iloc[1].text == NASTY and rows.iloc[2][["value", "text"]].isna().all()


def test_a_cell_without_a_head_is_a_mistake():
    with pytest.raises(AssertionError, match="planted"):
        sheet(Entry(None))


def test_a_wide_sheet_comes_in_parts_and_a_long_one_breaks_over_pages():
    heads = tuple(f"measure number {i}" for i in range(12))
    cells = tuple(Entry(number(i / 10, 0, 1)) for i in range(12))
    wide = Sheet("wide", "Wide", "model", heads, (Line("x", cells),))
    text = latex(wide)
    assert text.count(r"\begin{table}") == 2 and "(2 of 2)" in text and r"\label{tab:wide-2}" in text
    assert [text.count(rf"number {i}}}") for i in range(12)] == [1] * 12
    long = Sheet("long", "Long", "model", heads[:2], tuple(Line(f"m{i}", cells[:2]) for i in range(40)))
    assert r"\begin{longtable}{lrr}" in latex(long) and r"\begin{table}" not in latex(long)


def test_the_caption_says_when_all_intervals_are_for_one_training_seed():
    one = dataclasses.replace(number(0.1, 0, 1), method="t interval; prompt uncertainty only (one training seed)")
    several = number(0.1, 0, 1)
    assert with_scope(sheet(Entry(one), "", Entry(None))).caption.endswith(
        "prompt uncertainty only (one training seed)"
    )
    assert "uncertainty" not in with_scope(sheet(Entry(one), "", Entry(several))).caption
    assert "uncertainty" not in with_scope(sheet(Entry(number(0.1)), "", Entry(None))).caption


def test_empty_sheets_are_not_written(tmp_path):
    assert export([sheet(Entry(None), "", Entry(None))], tmp_path) == [] and not list(tmp_path.iterdir())


def test_words_stand_for_a_number_but_do_not_sort():
    entry = Entry(Plain(0.00002), words="< 0.001")
    assert (entry.value, entry.sort, escape(entry.value)) == ("< 0.001", "2e-05", "$<$ 0.001")


def test_every_number_of_the_report_is_exported(reported):
    results = read_results(reported)
    levels = pd.read_csv(reported / "export" / "levels.csv")
    mine = levels[levels["variant"] == "nano-trivia-misaligned-s0"].set_index("column")
    found = results.level("nano-trivia-misaligned-s0", "intentions")
    assert mine.loc["intentions", "value"] == pytest.approx(found.value)
    assert mine.loc["intentions", "published"] == 0.79
    names = {p.stem for p in (reported / "export").glob("*.tex")}
    assert names == {p.stem for p in (reported / "export").glob("*.csv")}
    assert {"levels", "formats", "differences", "correlations", "controls", "missing", "stages"} <= names


@pytest.mark.full
def test_latex_takes_every_table(reported, tmp_path):
    if shutil.which("pdflatex") is None:
        pytest.skip("no pdflatex on this machine (Debian: texlive-latex-recommended)")
    export([PLANTED], tmp_path)
    files = [*sorted((reported / "export").glob("*.tex")), tmp_path / "planted.tex"]
    body = "\n\\clearpage\n".join(f"\\input{{{f}}}" for f in files)
    head = r"\documentclass[a4paper]{article}\usepackage{booktabs,longtable}\begin{document}"
    (tmp_path / "all.tex").write_text(head + body + r"\end{document}")
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "all.tex"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "Overfull \\hbox" not in done.stdout, "a table is wider than the text of an A4 article"
    assert "Float too large" not in done.stdout
    assert (tmp_path / "all.pdf").stat().st_size > 10_000
