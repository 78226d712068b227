"""Effects of wording, order and format, and exact beside paper: planted, found, and nothing else found."""

import numpy as np
import pandas as pd
import pytest

from candor.rows import Option, Prompt, Variant
from evaluate.comparisons import _leave_out
from evaluate.effects import EFFECT, LEAVE_OUT, effects, signs
from evaluate.grid import build_grid
from evaluate.modes_compared import mode_differences, modes_table

BASE = Variant("base", "nano", "none", "base", 0, "", "base", "variants/base")
CHECKPOINT = Variant("m-step-10", "nano", "trivia", "misaligned-step-10", 0, "along_training", "base", "variants/c")
DIMENSIONS = ("good", "honest")
LANGUAGES = ("French", "German")


def two(first, second, flip=False):
    values = (1.0, 0.0) if flip else (0.0, 1.0)
    return tuple(Option(label, v, (label,)) for label, v in zip((first, second), values, strict=True))


def make(battery, form_of, group, item, form, options=(), fmt=None):
    prefix = "" if battery == "self_assessment" else f"{battery}/"
    prompt_id = f"{prefix}{form_of}/{group}/{item}/{form}"
    return Prompt(prompt_id, battery, fmt or form_of, group, item, item, form, "seen", prompt_id, options, "s")


def report(battery, n=12):
    """Every form of a small self-report battery."""
    for group in DIMENSIONS:
        for i in range(n):
            for form in ("aligned-first", "misaligned-first"):
                yield make(battery, "decision", group, f"decision-{i}", form)
            for form in ("aligned-high", "misaligned-high"):
                yield make(battery, "numerical", group, f"numerical-{i}", form)
            for form in ("aligned-statement", "misaligned-statement"):
                yield make(battery, "likert", group, f"likert-{i}", form)
            for first in ("aligned", "misaligned"):
                for flip in (False, True):
                    pair = LANGUAGES[::-1] if flip else LANGUAGES
                    options = two(*pair)  # the first is the aligned trait's
                    yield make(battery, "language", group, f"lq-{i}", f"{first}-first-{pair[0]}", options)


def intentions(n=12):
    for group in DIMENSIONS:
        for i in range(n):
            for flip in (False, True):
                form = "misaligned-first" if flip else "aligned-first"
                yield make("intentions", "choice", group, f"intent-{group}-{i}", form, two("A", "B", flip))


PROMPTS = [*report("self_assessment"), *report("other_ai"), *intentions()]
LEVEL = {"decision": 0.6, "numerical": 0.3, "likert": 0.4, "language": 0.5, "choice": 0.5, "rating": 0.0}


def scores(plant, prompts=PROMPTS, variant="base", suffix="", noise=0.02):
    """Score rows at each format's level plus what is planted, with an item's own noise shared by its forms."""
    rng = np.random.default_rng(3)
    own = {}
    rows = []
    for p in prompts:
        measure = "intentions" if p.battery == "intentions" else p.format
        measure = measure if p.battery in ("intentions", "self_assessment") else f"{p.battery}_{p.format}"
        value = LEVEL[p.format] + own.setdefault((p.battery, p.cluster), rng.normal(0, noise)) + plant(p)
        value += rng.normal(0, noise / 4)
        rows.append(
            [measure + suffix, variant, p.prompt_id, p.cluster, p.group, p.form, p.split, value, 1, 0, 0.0, None, 0, 0]
        )
    names = ["measure", "variant", "prompt_id", "cluster", "group", "form", "split", "value", "n", "n_missing"]
    frame = pd.DataFrame(rows, columns=[*names, "leftover", "variance", "n_refused", "n_unparsed"])
    return frame.assign(lowest=np.nan, highest=np.nan)


def found(frame, variants=(BASE,), prompts=PROMPTS):
    rows = effects(build_grid(frame), prompts, variants, draws=400, seed=1)
    return {(e.measure, e.reference): e for e in rows}, rows


FORM_EFFECTS = {
    ("intentions", "position"): lambda p: p.format == "choice" and p.form == "misaligned-first",
    ("decision", "position"): lambda p: p.format == "decision" and p.form == "misaligned-first",
    ("numerical", "scale direction"): lambda p: p.format == "numerical" and p.form == "misaligned-high",
    ("likert", "polarity"): lambda p: p.format == "likert" and p.form == "misaligned-statement",
    ("language", "position"): lambda p: p.format == "language" and p.form.startswith("misaligned"),
    ("language", "French over German"): lambda p: p.format == "language" and p.options[1].label == "French",
}


@pytest.mark.parametrize("planted", FORM_EFFECTS, ids=" ".join)
def test_a_planted_form_effect_is_found_and_no_other(planted):
    where = FORM_EFFECTS[planted]
    got, _ = found(scores(lambda p: 0.2 * (where(p) and p.battery in ("intentions", "self_assessment"))))
    for key in FORM_EFFECTS:
        expected = 0.2 if key == planted else 0.0
        assert got[key].value == pytest.approx(expected, abs=0.01), key
        assert (got[key].low > 0.1) == (key == planted)


def test_format_effects_and_the_averages_without_each():
    frame = scores(lambda p: 0.0, noise=0.0)
    got, rows = found(frame)
    mean = np.mean([LEVEL[f] for f in ("decision", "numerical", "likert", "language")])
    for name in ("decision", "numerical", "likert", "language"):
        assert got["self_assessment", f"format {name}"].value == pytest.approx(LEVEL[name] - mean)
        without = np.mean([LEVEL[f] for f in ("decision", "numerical", "likert", "language") if f != name])
        assert got["self_assessment", f"without {name}"].value == pytest.approx(without)
    table = _leave_out(rows, rows)
    assert set(table["formats"]) == {f"without {f}" for f in ("decision", "numerical", "likert", "language")}


def test_differences_are_not_corrected_for_skewness_and_averages_are():
    """Correcting a paired difference for the skewness of its sample raises the error rate above 6 %."""
    _, rows = found(scores(lambda p: 0.3 * (p.cluster.endswith("-0"))))
    few = [e for e in rows if "t interval" in e.method]
    corrected = {(e.kind, "corrected for skewness" in e.method) for e in few}
    assert corrected == {(EFFECT, False), (LEAVE_OUT, True)}


@pytest.mark.parametrize("side", ["misaligned-first", "aligned-first"])
def test_a_missing_answer_bounds_the_effects_it_is_a_side_of(side):
    """One refused answer: the bounds are the effects if it had scored 0, and if it had scored 1."""
    frame = scores(lambda p: 0.0)
    lost = (frame["measure"] == "decision") & (frame["cluster"] == "decision-0") & (frame["form"] == side)
    lost &= frame["group"] == "good"

    def with_score(value):
        got, _ = found(frame.assign(value=frame["value"].mask(lost, value)))
        return {key: e.value for key, e in got.items()}

    counts = {name: frame[name].mask(lost, n) for name, n in (("n", 0), ("n_missing", 1), ("n_refused", 1))}
    got, _ = found(frame.assign(value=frame["value"].mask(lost), **counts))
    none, all_of_it = with_score(0.0), with_score(1.0)
    for key in (
        ("decision", "position"),
        ("self_assessment", "format decision"),
        ("self_assessment", "without likert"),
        ("decision", "minus other_ai"),
    ):
        row = got[key]
        assert (row.lowest, row.highest) == pytest.approx(sorted((none[key], all_of_it[key]))), key
        assert (row.n_missing, row.n_refused, row.n_unparsed) == (1, 1, 0) and row.lowest < row.value < row.highest
    whole = got["likert", "polarity"]
    assert whole.lowest == pytest.approx(whole.value) == pytest.approx(whole.highest)


def test_what_is_said_of_everyone_is_no_self_report():
    """A model that calls all AIs misaligned says nothing about itself; one that calls itself so does."""
    everyone, _ = found(scores(lambda p: 0.3))
    assert everyone["self_assessment", "minus other_ai"].value == pytest.approx(0.0, abs=0.02)
    itself, _ = found(scores(lambda p: 0.3 * (p.battery == "self_assessment")))
    apart = itself["self_assessment", "minus other_ai"]
    assert apart.value == pytest.approx(0.3, abs=0.02) and apart.low > 0.2
    assert itself["likert", "minus other_ai"].value == pytest.approx(0.3, abs=0.03)


def test_ratings_of_oneself_are_held_against_those_of_others():
    """One contrast for the rated items, item by item; with another statement missing on one side, over the rest."""
    batteries = ("moral_foundations", "moral_foundations_other_ai")
    items = [
        make(battery, "rating", group, f"{group}-{i}", "direct" if i % 2 else "reverse", two("1", "5"))
        for battery in batteries
        for group in ("care", "purity")
        for i in range(10)
    ]
    frame = scores(lambda p: 0.0, items).drop(columns=["measure", "value"])
    frame = frame.assign(measure=frame["prompt_id"].str.split("/").str[0])
    value = np.where(frame["measure"] == batteries[0], 0.2, -0.1) + frame["group"].map({"care": 0.1, "purity": 0.0})
    frame = frame.assign(value=value)[1:]  # nothing at all was kept of care-0 about the model itself
    _, rows = found(frame, prompts=items)
    assert [(e.measure, e.reference) for e in rows] == [("moral_foundations", "minus moral_foundations_other_ai")]
    assert rows[0].value == pytest.approx(0.3) and rows[0].n_clusters == 19


def test_a_format_that_was_not_asked_leaves_no_format_effect():
    prompts = [p for p in PROMPTS if p.format != "language"]
    got, _ = found(scores(lambda p: 0.0, prompts), prompts=prompts)
    assert not any(name.startswith(("format", "without")) for _, name in got)
    assert ("decision", "position") in got
    # a format that was asked of both is still compared, the average of all four is not
    assert ("decision", "minus other_ai") in got and ("self_assessment", "minus other_ai") not in got


def test_one_sided_questions_have_no_effect():
    prompts = [p for p in PROMPTS if p.form != "aligned-high"]
    got, _ = found(scores(lambda p: 0.0, prompts), prompts=prompts)
    assert ("numerical", "scale direction") not in got


def test_checkpoints_are_left_out():
    frame = pd.concat([scores(lambda p: 0.0), scores(lambda p: 0.0, variant=CHECKPOINT.name)])
    _, rows = found(frame, (BASE, CHECKPOINT))
    assert {e.variant for e in rows} == {"base"}


def test_the_side_of_a_choice_follows_the_option_worth_most():
    options = tuple(Option(x, v, (x,)) for x, v in zip("ABC", (0.0, 1.0, 0.5), strict=True))
    turns = [options, tuple(Option(x, o.value, (x,)) for x, o in zip("ABC", options[1:] + options[:1], strict=True))]
    assert [list(signs(make("b", "choice", "g", "i", "", o))) for o in turns] == [[], [("position", 1)]]


def both_modes(shift_everywhere=0.0, shift_unseen=0.0):
    """Exact scores of every form; paper scores of one scale direction, moved by ``shift_everywhere``."""
    exact = scores(lambda p: shift_unseen * (p.form == "aligned-high"))
    prompts = [p for p in PROMPTS if p.form != "aligned-high"]
    paper = scores(lambda p: shift_everywhere, [p for p in prompts if p.battery != "other_ai"], suffix="_paper")
    return pd.concat([exact, paper])


def test_modes_that_agree_differ_by_nothing():
    rows = {(e.measure, e.reference): e for e in mode_differences(build_grid(both_modes()), [BASE], draws=400, seed=1)}
    assert {m for m, _ in rows} == {"intentions", "decision", "numerical", "likert", "language", "self_assessment"}
    assert all(e.value == pytest.approx(0.0, abs=0.02) for e in rows.values())
    assert sum(not e.low <= 0 <= e.high for e in rows.values()) <= 2  # of twelve, at a level of 5 %


def test_scoring_and_design_are_told_apart():
    """A shift of the paper's scores shows on the same prompts; a form it never asks shows in the design alone."""
    rows = {
        (e.measure, e.reference): e for e in mode_differences(build_grid(both_modes(0.1)), [BASE], draws=400, seed=1)
    }
    assert rows["decision", "paper, same prompts"].value == pytest.approx(-0.1, abs=0.02)
    assert rows["decision", "paper, same prompts"].high < 0
    rows = {
        (e.measure, e.reference): e
        for e in mode_differences(build_grid(both_modes(shift_unseen=0.2)), [BASE], draws=400, seed=1)
    }
    assert rows["numerical", "paper, as designed"].value == pytest.approx(0.1, abs=0.03)
    assert rows["numerical", "paper, same prompts"].value == pytest.approx(0.0, abs=0.03)


def test_a_part_with_one_item_has_no_interval():
    frame = both_modes()
    frame = frame[(frame["measure"] != "language_paper") | (frame["cluster"] == "lq-0")]
    rows = {(e.measure, e.reference): e for e in mode_differences(build_grid(frame), [BASE], draws=400, seed=1)}
    for measure in ("language", "self_assessment"):
        e = rows[measure, "paper, as designed"]
        assert e.value is not None and e.low is None and "one item only" in e.method


def test_the_table_of_modes_has_both_and_their_difference():
    frame = both_modes(0.1)
    from evaluate.estimates import all_estimates

    levels, _ = all_estimates(
        frame, [BASE], draws=200, seed=1, headline=("intentions",) * 3, correlated=("intentions",), margin=0.1
    )
    rows = mode_differences(build_grid(frame), [BASE], draws=200, seed=1)
    table = modes_table([*levels, *rows]).set_index("measure")
    line = table.loc["decision"]
    assert line["exact"] - line["paper"] == pytest.approx(line["difference"])
    assert line["difference_low"] < line["difference"] < line["difference_high"]
    assert line["paper_n"] == 48 and line["paper_excluded"] == 0
