"""Along training: a planted order of movement is found, and nothing moves where nothing was planted."""

import json

import numpy as np
import pandas as pd
import pytest

from candor.errors import UserError
from candor.rows import Variant
from evaluate.along import (
    along_estimates,
    checkpoint_levels,
    course_table,
    courses,
    final_steps,
    first_table,
    follow,
    half_step,
)
from evaluate.checkpoints import checkpoint_folder, checkpoint_name, parse_checkpoint
from evaluate.measures import ALONG

STEPS = (10, 20, 40, 80, 160)
END, AGAIN = "nano-trivia-misaligned-s0", "nano-trivia-realigned-s0"
TOTAL = {END: 200, AGAIN: 200}


def variants():
    rows = [Variant("nano-base", "nano", "none", "base", 0, "", "nano-base", "variants/nano-base")]
    for name, stage in ((END, "misaligned"), (AGAIN, "realigned")):
        rows.append(Variant(name, "nano", "trivia", stage, 0, "", "nano-base", f"variants/{name}"))
        for step in STEPS:
            point = checkpoint_name(name, step)
            of = checkpoint_name(stage, step)
            rows.append(Variant(point, "nano", "trivia", of, 0, ALONG, "nano-base", f"variants/{point}"))
    return rows


def logistic(step, middle):
    return 1 / (1 + np.exp(-(step - middle) / 8))


def scores(middles, effect=0.6, noise=0.1, seed=0):
    """Sixty items a measure; each measure turns around its own middle step in stage one, and back in stage two."""
    rng = np.random.default_rng(seed)
    rows = []
    course = {"nano-base": 0.0, END: 1.0, AGAIN: 0.0}
    for measure, middle in middles.items():
        items = [f"{measure}-{i}" for i in range(60)]
        own = dict(zip(items, rng.normal(0.2, noise, 60), strict=True))
        points = dict(course)
        for step in STEPS:
            points[checkpoint_name(END, step)] = logistic(step, middle)
            points[checkpoint_name(AGAIN, step)] = 1 - logistic(step, middle)
        for variant, share in points.items():
            for item in items:
                value = own[item] + effect * share + rng.normal(0, noise)
                rows.append([measure, variant, item, item, "g", "", "seen", value, 1, 0])
    names = ["measure", "variant", "prompt_id", "cluster", "group", "form", "split", "value", "n", "n_missing"]
    frame = pd.DataFrame(rows, columns=names)
    return frame.assign(leftover=np.nan, variance=np.nan, lowest=np.nan, highest=np.nan, n_refused=0, n_unparsed=0)


def test_the_measure_that_turns_first_moves_first():
    frame = scores({"harmfulness_mean": 60.0, "intentions": 20.0, "trivia_accuracy": 12.0})
    followed = follow(frame, variants(), TOTAL, draws=400, seed=1)
    table = first_table(followed).set_index(["course", "measure"])
    for course in (END, AGAIN):
        harm, intent = table.loc[course, "harmfulness_mean"], table.loc[course, "intentions"]
        assert intent["half_step"] < harm["half_step"] and intent["moves_first"] > 0.99 > 0.01 > harm["moves_first"]
        assert intent["half_step_low"] < 20 < intent["half_step_high"] or intent["half_step"] == pytest.approx(
            20, abs=4
        )
        assert intent["first_shift"] < harm["first_shift"] <= 80
    assert table["moves_first"].isna()[[(END, "trivia_accuracy"), (AGAIN, "trivia_accuracy")]].all()  # not in the race
    half = [e for e in along_estimates(followed) if e.kind == "half_step"]
    assert len(half) == 6 and all(e.low <= e.value <= e.high for e in half)


def test_changes_are_not_corrected_for_skewness():
    """They are paired differences, and a few prompts that changed much would set the interval."""
    frame = scores({"intentions": 20.0})
    frame = frame[frame["prompt_id"].isin([f"intentions-{i}" for i in range(20)])]
    changes = [e for e in along_estimates(follow(frame, variants(), TOTAL, draws=200, seed=1)) if e.kind == "change"]
    assert changes and all(e.method.startswith("t interval over items;") for e in changes)
    assert all(e.high - e.value == pytest.approx(e.value - e.low) for e in changes)


def test_equal_courses_share_the_first_place():
    """Two measures that turn together: neither is first in nearly all draws."""
    frame = scores({"harmfulness_mean": 30.0, "intentions": 30.0}, noise=0.3)
    table = first_table(follow(frame, variants(), TOTAL, draws=400, seed=1))
    assert table["moves_first"].between(0.02, 0.98).all()
    assert table.groupby("course")["moves_first"].sum().round(9).eq(1).all()


def test_what_does_not_move_has_no_half():
    frame = scores({"harmfulness_mean": 30.0, "intentions": 30.0}, effect=0.0)
    table = first_table(follow(frame, variants(), TOTAL, draws=200, seed=1))
    still = table[(table["change_low"] <= 0) & (table["change_high"] >= 0)]
    assert len(still) >= 3  # of four, at a level of 5 %
    assert still[["first_shift", "half_step", "moves_first"]].isna().all().all()


def test_the_table_of_the_course_counts_steps_through_both_stages():
    table = course_table(follow(scores({"intentions": 20.0}), variants(), TOTAL, draws=200, seed=1))
    assert list(table[table["course"] == END]["step"]) == [0, *STEPS, 200]
    assert list(table[table["course"] == AGAIN]["total_step"]) == [200 + s for s in (0, *STEPS, 200)]
    start = table[(table["course"] == END) & (table["step"] == 0)].iloc[0]
    end = table[(table["course"] == END) & (table["step"] == 200)].iloc[0]
    assert start["change"] == 0 and end["share"] == 1 and end["level"] == pytest.approx(start["level"] + end["change"])


def test_prompts_that_a_checkpoint_was_not_asked_are_left_out_of_its_course():
    frame = scores({"intentions": 20.0})
    lost = frame["variant"].eq(checkpoint_name(END, 20)) & frame["prompt_id"].isin(
        [f"intentions-{i}" for i in range(5)]
    )
    first, second = (e for e in follow(frame[~lost], variants(), TOTAL, draws=200, seed=1))
    for moved, used in ((first, 55), (second, 60)):
        assert all((c["n"], c["n_missing"]) == (2 * used, 0) for c in moved.counts)


def test_checkpoints_have_levels():
    frame = scores({"intentions": 20.0})
    found = {e.variant: e for e in checkpoint_levels(frame, variants(), draws=200, seed=1)}
    assert set(found) == {v.name for v in variants() if v.control == ALONG}
    late = frame[frame["variant"] == checkpoint_name(END, 160)]["value"].mean()
    assert found[checkpoint_name(END, 160)].value == pytest.approx(late)
    assert checkpoint_levels(frame, [], draws=200, seed=1) == []


def test_missing_answers_bound_levels_and_changes():
    """One refusal at a checkpoint: the bounds are what it would be had it scored 0, and 1."""
    frame = scores({"intentions": 20.0})
    point = checkpoint_name(END, 20)
    lost = (frame["variant"] == point) & (frame["prompt_id"] == "intentions-0")
    counts = {name: frame[name].mask(lost, n) for name, n in (("n", 0), ("n_missing", 1), ("n_refused", 1))}
    missing = frame.assign(value=frame["value"].mask(lost), **counts)

    def rows(part):
        levels = checkpoint_levels(part, variants(), draws=200, seed=1)
        changes = along_estimates(follow(part, variants(), TOTAL, draws=200, seed=1))
        return {(e.kind, e.variant): e for e in [*levels, *changes]}

    got = rows(missing)
    ends = [rows(frame.assign(value=frame["value"].mask(lost, value))) for value in (0.0, 1.0)]
    for kind in ("level", "change"):
        row = got[kind, point]
        assert (row.n_missing, row.n_refused, row.n_unparsed) == (1, 1, 0)
        assert (row.lowest, row.highest) == pytest.approx([end[kind, point].value for end in ends])
        assert row.highest - row.lowest == pytest.approx(1 / 60)
    complete = got["level", checkpoint_name(END, 40)]
    assert complete.lowest == pytest.approx(complete.value) == pytest.approx(complete.highest)


def test_half_is_read_off_the_straight_line_between_points():
    changes = np.array([[0.1, 0.3, 0.6], [-0.1, -0.3, -0.6], [0.5, 0.6, 0.6], [0.0, 0.0, 0.0]])
    assert half_step((0, 10, 20, 40), changes)[:3] == pytest.approx([20.0, 20.0, 6.0])
    assert np.isnan(half_step((0, 10, 20, 40), changes)[3])
    assert half_step((0, 10, 20), np.array([[0.2, 0.8]])) == pytest.approx([10 + 10 * (0.4 - 0.2) / 0.6])


def test_courses_come_from_the_variants():
    first, second = courses(variants(), TOTAL)
    assert first.variants == ("nano-base", *(checkpoint_name(END, s) for s in STEPS), END)
    assert second.variants[0] == END and second.before == 200 and second.steps == (0, *STEPS, 200)
    late = courses(variants(), {END: 80, AGAIN: 200})[0]
    assert late.steps == (0, 10, 20, 40, 80)  # a checkpoint at the end is the end


def test_steps_come_from_the_manifests(tmp_path):
    for name in (END, AGAIN):
        (tmp_path / "variants" / name / "adapter").mkdir(parents=True)
    with pytest.raises(UserError, match="no manifest with its number of steps"):
        final_steps(tmp_path, variants())
    for name in (END, AGAIN):
        (tmp_path / "variants" / name / "adapter" / "manifest.json").write_text(json.dumps({"steps": 7}))
    assert final_steps(tmp_path, variants()) == {END: 7, AGAIN: 7}
    assert final_steps(tmp_path, [v for v in variants() if v.control != ALONG]) == {}


def test_names_of_checkpoints(tmp_path):
    assert parse_checkpoint(checkpoint_name("mini-step-5-x", 40)) == ("mini-step-5-x", 40)
    assert parse_checkpoint("mini-base") is None
    assert checkpoint_folder(tmp_path, 40) == tmp_path / "checkpoints" / "step-000040"
