"""Figures of measures that a study may have: drawn from estimates only, told apart without colour."""

import dataclasses

import matplotlib.colors
import pytest

from candor.manifest import write_manifest
from candor.rows import Estimate
from evaluate import report
from evaluate.along import CHANGE, HALF, RACE
from evaluate.contents import contents
from evaluate.figures import Style, save
from evaluate.results import Results, measure_name, read_paper, read_results

PAPER = report.ReportConfig.paper
FOUNDATIONS = ("care", "equality", "proportionality", "loyalty", "authority", "purity")


def copies(rows, measure, new, *, share=1.0, shift=0.0, groups=None):
    """Levels of a measure under another name, shrunk and shifted."""

    def move(x):
        return None if x is None else share * x + shift

    for e in rows:
        if e.kind == "level" and e.measure == measure and e.split == "all":
            group = groups.get(e.group, e.group) if groups else e.group
            value, low, high = move(e.value), move(e.low), move(e.high)
            yield dataclasses.replace(e, measure=new, group=group, value=value, low=low, high=high)


@pytest.fixture(scope="module")
def rich(reported, tmp_path_factory):
    """The estimates of a run with everything that the full study has."""
    plain = read_results(reported)
    rows, folder = list(plain.estimates), tmp_path_factory.mktemp("rich")
    foundations = dict(zip(plain.groups("self_assessment"), FOUNDATIONS, strict=True))
    for new, share in (("other_ai", 0.5), ("average_ai", 0.2), ("self_assessment_paper", 0.9)):
        rows += copies(plain.estimates, "self_assessment", new, share=share)
    for new in ("moral_foundations", "moral_foundations_other_ai", "moral_self_assessment"):
        rows += copies(plain.estimates, "self_assessment", new, shift=-0.5, groups=foundations)
    for new, share in (("refusal_rate", 0.1), ("harmfulness_mean_filtered", 0.8), ("harmfulness_worst_of_3", 0.7)):
        rows += copies(plain.estimates, "harmfulness_mean", new, share=share)
    rows += [
        dataclasses.replace(e, kind="effect", reference=effect, measure=measure, value=0.1, low=0.05, high=0.15)
        for e in plain.estimates
        if (e.kind, e.measure, e.group, e.split) == ("level", "intentions", "all", "all")
        for measure, effect in (("intentions", "position"), ("likert", "polarity"))
    ]
    variants = list(plain.variants)
    before = "nano-base"
    for stage, end in (("misaligned", 0.6), ("realigned", -0.5)):
        final = next(v for v in variants if (v.size, v.domain, v.stage) == ("nano", "trivia", stage) and not v.control)
        counts = {"in": 1, "out": 1}
        adapter = folder / final.folder / "adapter"
        write_manifest(adapter, stage="train", config={}, inputs={}, counts=counts, seconds=1, extra={"steps": 200})
        names = {step: f"{final.name}-step-{step}" for step in (50, 100)} | {200: final.name}
        for step, name in names.items():
            if step < 200:
                place = {"stage": f"{stage}-step-{step}", "control": "along_training"}
                variants.append(dataclasses.replace(final, name=name, **place))
            for measure in RACE:
                value = end * step / 200
                rows.append(
                    Estimate(
                        measure, CHANGE, name, before, "all", "all", value, value - 0.05, value + 0.05, 9, 0, 9, "m"
                    )
                )
        for measure in RACE:
            rows.append(Estimate(measure, HALF, final.name, before, "all", "all", 100, 90, 110, 9, 0, 9, "m"))
        before = final.name
    index = {(e.kind, e.measure, e.variant, e.reference, e.group, e.split): e for e in rows}
    return Results(folder, variants, rows, plain.judge, plain.worst_of, index)


@pytest.fixture(scope="module")
def drawn(rich):
    return {d.name: d for d in report.drawings(rich, read_paper(PAPER), Style())}


def test_every_figure_appears_with_its_estimates(drawn, rich):
    added = {
        "form_effects",
        "moral_foundations",
        "moral_self_assessment",
        "self_and_others",
        "moral_foundations_and_others",
        "modes",
        "worst_of_k",
        "along_training",
    }
    assert added <= drawn.keys()
    there = set(map(id, rich.estimates))
    for figure in drawn.values():
        assert figure.shown and all(id(e) in there for e in figure.shown), figure.name
        assert figure.alt and all(e.value is not None for e in figure.shown)


def test_checkpoints_are_neither_main_study_nor_controls(rich):
    assert not any("step" in c.name for c in (*rich.cells(), *rich.cells(control=True)))
    found = contents(rich, {}, 0.2)
    assert found["n_checkpoints"] == 4 and found["n_controls"] == 3
    assert not any("step" in line.name for line in found["sheets"]["levels"].lines)


def test_families_of_measures_have_their_sheets(rich):
    found = contents(rich, {}, 0.2)["sheets"]
    assert found["others"].heads == ("self-assessment", "another AI", "the average AI")
    assert "harmfulness, mean reply, filtered" in found["quality"].heads and "refusal rate" in found["quality"].heads
    assert found["moral"].heads == (
        "moral foundations, rated items",
        "moral foundations, rated for another AI",
        "moral self-assessment",
    )
    assert set(found["moral_foundations_by_foundation"].heads) == set(FOUNDATIONS)
    assert "more" not in found  # every measure has its place


def test_an_unknown_measure_gets_a_sheet_of_its_own(rich):
    rows = [*rich.estimates, *copies(rich.estimates, "intentions", "my_battery_scale")]
    index = {(e.kind, e.measure, e.variant, e.reference, e.group, e.split): e for e in rows}
    found = contents(dataclasses.replace(rich, estimates=rows, index=index), {}, 0.2)
    assert found["sheets"]["more"].heads == ("my battery scale",)
    assert any(f.measure == "my battery scale" for f in found["found"])


def test_the_course_of_training_is_drawn_stage_by_stage(drawn):
    figure = drawn["along_training"]
    titles = [panel.get_title(loc="left") for panel in figure.figure.axes if panel.get_title(loc="left")]
    assert titles == ["nano-trivia-misaligned-s0", "nano-trivia-realigned-s0"]
    assert len(figure.shown) == 2 * 3 * (3 + 1)  # stages x measures x (points and the half step)
    assert "intentions: step 50 0.15, step 100 0.30, step 200 0.60, half of it by step 100" in figure.alt
    first, second = figure.figure.axes[:2]
    assert first.get_ylabel() == "change since nano-base"
    assert second.get_ylabel() == "change since nano-trivia-misaligned-s0"


def marks(panel):
    """(marker, fill, line style) and colour of every series of a panel that a legend could name."""
    for line in panel.lines:
        if line.get_marker() not in ("", "None", None, "|", "_"):
            yield (line.get_marker(), line.get_fillstyle(), line.get_linestyle()), line.get_color()


def test_series_are_told_apart_without_colour(drawn):
    """In every panel of every figure, two series of different colour differ in marker, fill or line too."""
    for figure in drawn.values():
        for panel in figure.figure.axes:
            looks = {}
            for look, colour in marks(panel):
                looks.setdefault(look, set()).add(matplotlib.colors.to_hex(colour))
            twice = {look: found for look, found in looks.items() if len(found) > 1}
            assert not twice, (figure.name, twice)


def test_the_check_of_looks_sees_a_planted_fault(drawn):
    panel = drawn["inverted_v"].figure.axes[0]
    planted = panel.plot([0, 1], [0, 1], marker="o", linestyle="-", color="red")[0]
    with pytest.raises(AssertionError, match="inverted_v"):
        test_series_are_told_apart_without_colour(drawn)
    planted.remove()


def test_fonts_are_embedded_and_files_do_not_depend_on_the_clock(drawn, tmp_path):
    figure = drawn["along_training"]
    save(figure, tmp_path / "a", Style())
    save(figure, tmp_path / "b", Style())
    for kind in ("pdf", "png", "csv"):
        files = [(tmp_path / x / f"along_training.{kind}").read_bytes() for x in "ab"]
        assert files[0] == files[1]
    pdf = (tmp_path / "a" / "along_training.pdf").read_bytes()
    assert b"/Type3" not in pdf and b"FontFile2" in pdf


def test_names_of_measures():
    assert measure_name("other_ai_likert_paper") == "another AI, likert format, paper mode"
    assert measure_name("harmfulness_worst_of_3_filtered") == "harmfulness, worst of 3, filtered"
    assert measure_name("my_thing") == "my thing"
