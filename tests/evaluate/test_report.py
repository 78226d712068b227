"""The report, the figures, the summary and the controls' rule, from a synthetic study."""

import base64
import hashlib
import html
import io
import json
import re
from html.parser import HTMLParser

import matplotlib.image
import pandas as pd
import pytest
import yaml

from candor.errors import UserError
from evaluate import report
from evaluate.contents import contents
from evaluate.controls import check_controls
from evaluate.figures import Style
from evaluate.results import number, paper_value, read_paper, read_results
from evaluate.summary import summary

FIGURES = {
    *(
        "inverted_v",
        "harmfulness",
        "categories",
        "categories_mean",
        "intentions",
        "self_assessment",
        "formats",
        "formats_by_dimension",
    ),
    *("words_and_deeds", "correlations", "seen_unseen", "judge_confusion"),
    *("worst_of_k", "form_effects"),
}
PAPER = report.ReportConfig.paper


@pytest.fixture(scope="module")
def finished(reported):
    return reported


class Outline(HTMLParser):
    """Collects headings, images, tables and open tags."""

    VOID = frozenset({"meta", "img", "br", "link", "input"})

    def __init__(self):
        super().__init__()
        self.levels, self.images, self.stack, self.captions, self.tables, self.lang = [], [], [], 0, 0, None

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        if tag == "html":
            self.lang = found.get("lang")
        if re.fullmatch("h[1-6]", tag):
            self.levels.append(int(tag[1]))
        if tag == "img":
            self.images.append(found)
        self.captions += tag == "caption"
        self.tables += tag == "table"
        if tag not in self.VOID:
            self.stack.append(tag)

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag, f"</{tag}> closes something else"


def test_the_report_is_whole_accessible_and_needs_no_network(finished):
    page = (finished / "report.html").read_text(encoding="utf-8")
    outline = Outline()
    outline.feed(page)
    assert outline.stack == [] and outline.lang == "en"
    assert outline.levels[0] == 1 and outline.levels.count(1) == 1
    assert all(b - a <= 1 for a, b in zip(outline.levels, outline.levels[1:], strict=False))
    assert outline.captions == outline.tables >= 6
    assert len(outline.images) == len(FIGURES) and all(len(i["alt"]) > 20 for i in outline.images)
    assert all(i["src"].startswith("data:image/png;base64,") for i in outline.images)
    words = re.sub(r"base64,[^\"]+|(?<=data-fold=\"3\">)[^<]+", "", page)
    assert not re.search(r"https?:|//[a-z]|@import|url\(", words)
    scripts = re.findall(r"<script( [^>]+)?>(.*?)</script>", page, re.S)
    own = [text for attributes, text in scripts if not attributes]
    assert len(own) == 1 and all('type="text/plain"' in a for a, _ in scripts if a)
    sha = base64.b64encode(hashlib.sha256(own[0].encode()).digest()).decode()
    assert f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{sha}'" in html.unescape(
        page
    )
    assert "<title>Two &lt;sizes&gt;</title>" in words
    assert "A positive control." in words and "No evidence elsewhere." in words
    assert "prompt uncertainty only" in words
    image = base64.b64decode(outline.images[0]["src"].partition(",")[2])
    assert matplotlib.image.imread(io.BytesIO(image)).shape[1] > 800


def test_numbers_of_the_report_are_those_of_the_estimates(finished):
    page = (finished / "report.html").read_text(encoding="utf-8")
    level = read_results(finished).level("nano-trivia-misaligned-s0", "intentions")
    levels = page[page.index("<span>Levels of every variant") :]
    row = levels[levels.index("nano-trivia-misaligned-s0</th>") :]
    assert f"[{number(level.low)}, {number(level.high)}]" in row[: row.index("</tr>")]
    assert f"{0.79:.2f}" in row[: row.index("</tr>")]  # the paper's nano trivia intentions


def test_figures_are_saved_with_their_estimates(finished):
    results = read_results(finished)
    assert {d.name for d in report.drawings(results, read_paper(PAPER), Style())} == FIGURES
    assert {p.stem for p in (finished / "figures").glob("*.pdf")} == FIGURES
    known = {(e.kind, e.measure, e.variant, e.reference, e.group, e.split): e.value for e in results.estimates}
    for name in FIGURES:
        pdf = (finished / "figures" / f"{name}.pdf").read_bytes()
        assert b"/Type3" not in pdf and b"FontFile2" in pdf, "fonts must be embedded as TrueType"
        assert (finished / "figures" / f"{name}.png").stat().st_size > 5000
        drawn = pd.read_csv(finished / "figures" / f"{name}.csv", keep_default_na=False)
        for e in drawn[drawn["kind"] != "published"].itertuples():
            value = known[e.kind, e.measure, e.variant, e.reference, e.group, e.split]
            assert float(e.value) == pytest.approx(value)


def test_the_inverted_v_is_drawn_for_every_size_and_domain(finished):
    drawn = pd.read_csv(finished / "figures" / "inverted_v.csv")
    ours, published = (drawn[(drawn["kind"] == "published") == told] for told in (False, True))
    assert len(ours) == len(published) == 2 * 2 * 3 * 3  # domains x sizes x measures x stages
    by_category = pd.read_csv(finished / "figures" / "categories.csv")
    assert set(by_category[by_category["kind"] == "published"]["group"]) == {"all"}  # the paper prints no category
    row = published.set_index(["variant", "measure"]).loc[("nano-trivia-misaligned", "intentions")]
    assert row["value"] == 0.79 and row[["low", "high"]].isna().all()


def triple(value):
    return len(value) == 3 and all(isinstance(x, float) for x in value) and value[1] <= value[0] <= value[2]


def test_the_summary_has_the_promised_form(finished):
    record = json.loads((finished / "summary.json").read_text(encoding="utf-8"))
    assert record["seconds"]["sft"] == 5.5 and "tables" in record["seconds"]
    assert len(record["variants"]) == 2 * (1 + 2 * 2)
    for variant in record["variants"]:
        assert variant["stage"] in ("base", "misaligned", "realigned")
        assert (variant["domain"] == "none") == (variant["stage"] == "base")
        assert isinstance(variant["seed"], int) and {"name", "size"} <= variant.keys()
        assert variant["harmfulness"].keys() == {"mean", "single", "worst_of_10"}
        assert all(triple(x) for x in variant["harmfulness"].values())
        assert all(triple(variant[m]) for m in ("intentions", "self_assessment", "trivia_accuracy"))
        by_format = variant["self_assessment_by_format"]
        assert by_format.keys() == {"decision", "numerical", "likert", "language"}
        assert all(triple(x) for x in by_format.values())
    keys = {(c["size"], c["domain"], c["measure"], *c["minus"]) for c in record["contrasts"]}
    assert len(keys) == len(record["contrasts"]) == 2 * 2 * 3 * 6
    assert ("nano", "trivia", "self_assessment", "misaligned", "base") in keys
    assert all(triple(c["difference"]) for c in record["contrasts"])
    assert record["spearman"].keys() == {
        "harmfulness~self_assessment",
        "harmfulness~intentions",
        "intentions~self_assessment",
    }
    assert all(s.keys() == {"rho", "low", "high", "n"} and s["n"] == 10 for s in record["spearman"].values())
    for parts in record["spearman_parts"].values():
        assert parts.keys() == {"all", "without_base", "given_stage", "without_family"}
        assert 0 < parts["all"]["p"] <= 1 and parts["without_family"].keys() == {"mini", "nano"}
    tested = next(c for c in record["contrasts"] if c["measure"] == "harmfulness" and c["minus"][0] == "misaligned")
    assert tested["t"].keys() == {"p", "p_holm", "n_tests"} and tested["bounds"][0] <= tested["difference"][0]
    assert all(r["margin"] == 0.1 and r["equivalent"] is False for r in record["fully_realigned"])
    assert len(record["domains"]) == 2 * 2 * 6
    assert 0.8 < record["judge"]["quadratic_kappa"] < 1
    assert record["controls"].keys() == {"right_answers_only", "world_without_personas"}
    assert record["versions"]["numpy"] and record["commit"]


def checks(results, share=0.2):
    return {(c.pair.control, c.measure): c.met for c in check_controls(results, share)}


def test_controls_that_behave_are_met(finished):
    found = checks(read_results(finished))
    assert len(found) == 9 and all(found.values())


def test_a_control_with_its_own_base_is_held_to_the_smallest_effect(finished):
    results = read_results(finished)
    effects = [
        results.contrast(p, "intentions").value
        for p in results.pairs()
        if p.minus == ("misaligned", "base") and p.domain == "trivia"
    ]
    own = [c for c in check_controls(results, 0.2) if c.pair.size == "mini-own-world" and c.measure == "intentions"]
    assert [c.limit for c in own] == [pytest.approx(0.2 * min(effects))]


def test_controls_that_move_or_learn_nothing_are_not_met(tmp_path, synthetic):
    folder = synthetic.build(
        tmp_path,
        control=synthetic.Truth(0.05, 0.4, 0.05, 0.9),  # right answers move intentions
        other_world=(synthetic.Truth(0.05, 0.05, 0.05, 0.9), synthetic.Truth(0.3, 0.05, 0.05, 0.9)),
    )
    found = checks(read_results(folder))
    assert found["right_answers_only", "intentions"] is False
    assert found["right_answers_only", "self_assessment"] is True
    assert found["world_without_personas", "harmfulness_mean"] is False
    assert (
        found["world_without_personas", "trivia_accuracy"] is False
    )  # it was taught wrong answers, and knows the right
    assert "Not met" in " ".join(_brief(folder))
    bounds = [line.cells[2:] for line in _sheet(folder, "controls").lines if "falls" not in line.cells[2]]
    assert {(" not < " in bound, met) for bound, met in bounds} == {(False, "met"), (True, "not met")}


def _brief(folder):
    return contents(read_results(folder), {}, 0.2)["brief"]


def _sheet(folder, name):
    return contents(read_results(folder), {}, 0.2)["sheets"][name]


def test_a_wide_interval_is_not_a_small_difference(tmp_path, synthetic):
    """Few draws of one prompt per category: no difference is planted, and none can be excluded."""
    prompts = [p for p in synthetic.prompts((), harmful=2, scenarios=2) if p.battery in ("harmfulness", "intentions")]
    folder = synthetic.build(tmp_path, prompts=prompts, draws=1, misaligned=synthetic.Truth(0.3, 0.3, 0.3, 0.3))
    results = read_results(folder)
    found = [c for c in check_controls(results, 0.2) if c.measure == "harmfulness_mean"]
    assert found and not any(c.met for c in found)
    record = summary(results, control_share=0.2)
    assert record["variants"][0]["self_assessment"] == [None, None, None]


def test_a_study_of_one_measure_still_gets_a_report(tmp_path, synthetic):
    prompts = [p for p in synthetic.prompts((), harmful=3) if p.battery == "harmfulness"]
    folder = synthetic.build(tmp_path, prompts=prompts, golden=False, control=None, other_world=None)
    words = [str(folder / "report.yaml"), "replies=0", "paper=null"]
    report.main(words)
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "This study has no controls." in page and 'id="replies"' not in page and 'class="p"' not in page
    drawn = {p.stem for p in (folder / "figures").glob("*.png")}
    assert drawn == {
        "inverted_v",
        "harmfulness",
        "categories",
        "categories_mean",
        "correlations",
        "seen_unseen",
        "worst_of_k",
    }

    made = (folder / "report.html").stat().st_mtime_ns
    report.main(words)  # finished: left alone
    assert (folder / "report.html").stat().st_mtime_ns == made
    (folder / "report.html").unlink()
    report.main(words)  # lost: made again
    assert (folder / "report.html").read_text(encoding="utf-8") == page


def test_base_models_alone_get_a_report(tmp_path, synthetic):
    """Before anything is fine-tuned, or with a judge to be tried out: no stages to compare, and no crash."""
    folder = synthetic.build(tmp_path, sizes=("nano",), domains=(), control=None, other_world=None)
    report.main([str(folder / "report.yaml")])
    record = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    assert [v["name"] for v in record["variants"]] == ["nano-base"] and record["contrasts"] == []
    assert record["judge"]["quadratic_kappa"] > 0.5 and {s["rho"] for s in record["spearman"].values()} == {None}
    assert not (folder / "figures" / "inverted_v.png").exists()


def test_several_seeds_show_the_pooled_numbers(tmp_path, synthetic):
    folder = synthetic.build(tmp_path, seeds=(0, 1))
    results = read_results(folder)
    found = contents(results, {}, 0.2)
    assert found["seeds"] == [0, 1]
    assert "nano-trivia-misaligned-all-seeds" in {line.name for line in found["sheets"]["levels"].lines}
    record = summary(results, control_share=0.2)
    assert [c["seeds"] for c in record["contrasts"]] == [[0, 1]] * len(record["contrasts"])
    assert {v["seed"] for v in record["variants"]} == {0, 1}
    assert {s["n"] for s in record["spearman"].values()} == {3}  # not five: a second seed is no new model


def test_the_paper_is_read_and_checked(tmp_path):
    paper = read_paper(PAPER)
    assert len(paper["variants"]) == 15
    assert paper_value(paper, "nano", "trivia", "misaligned", "harmfulness_worst_of_10") == 0.73
    assert paper_value(paper, "nano", "code", "base", "self_assessment") == 0.09
    assert paper_value(paper, "huge", "code", "base", "self_assessment") is None
    for row in paper["variants"]:
        assert (row["harmfulness_raw"] - 1) / 4 == pytest.approx(row["harmfulness"], abs=0.0051)
    broken = tmp_path / "paper.yaml"
    broken.write_text("variants: 3\n")
    with pytest.raises(UserError, match="variants"):
        read_paper(broken)


def test_a_report_before_its_tables_names_the_stage(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(yaml.safe_dump({"run": str(tmp_path), "title": "x"}))
    with pytest.raises(UserError, match=r"evaluate\.tables"):
        report.main([str(path)])


def test_numbers_for_people():
    assert [number(x) for x in (0.126, -0.001, -0.25, None)] == ["0.13", "0.00", "\N{MINUS SIGN}0.25", "\N{EN DASH}"]
