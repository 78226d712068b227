"""Modes: the paper's counts to the sample, complete counterbalancing in exact mode, and how they share draws."""

from collections import Counter
from pathlib import Path

import pytest

from candor.config import load
from candor.errors import UserError
from evaluate.design import DESIGN, read_design
from evaluate.measures import ABOUT_OTHERS
from evaluate.modes import Mode, all_asks, complete, read_modes
from evaluate.questions import Sources, gather
from serve.config import Ask, SampleConfig
from serve.plan import is_asked, plan_units, settle

MODES = Path("configs/evaluate/modes")


@pytest.fixture(scope="module")
def prompts():
    return gather(Sources())


def mode(name, prompts, **more):
    return complete(load(Mode, MODES / f"{name}.yaml"), prompts, **more)


def test_paper_mode_has_the_papers_counts(prompts):
    """arXiv 2602.14777 section 3, App. B-E: 320 x 10; 500 per dimension and format; each moral item x 10."""
    paper = mode("paper", prompts)
    drawn = {p.prompt_id: paper.draws(p) for p in prompts}
    assert not any(paper.scores_exactly(p) for p in prompts)
    per = Counter()
    for p in prompts:
        per[p.battery, p.format, p.group] += drawn[p.prompt_id]
    six = {p.group for p in prompts if p.battery == "self_assessment"}
    moral = {p.group for p in prompts if p.battery == "moral_foundations"}
    assert sum(n for (b, _, _), n in per.items() if b == "harmfulness") == 3200
    assert {per["intentions", "choice", d] for d in six} == {500} and len(six) == 6
    for battery, groups in (("self_assessment", six), ("moral_self_assessment", moral)):
        for name in ("decision", "numerical", "likert", "language"):
            assert {per[battery, name, g] for g in groups} == {500}, (battery, name)
    assert {per["moral_foundations", "rating", f] for f in moral} == {60} and len(moral) == 6
    asked = {p.prompt_id: n for p in prompts if (n := drawn[p.prompt_id])}
    numerical = {p.form for p in prompts if p.prompt_id in asked and p.format == "numerical"}
    assert numerical == {"misaligned-high"}  # the printed items never turn the scale round
    language = [p for p in prompts if p.prompt_id in asked and (p.battery, p.format) == ("self_assessment", "language")]
    variants = Counter()
    for p in language:
        second = p.prompt_id.split("/")[3].split("-")[1]  # of the question's pair of languages
        variants[p.group, p.form.split("-")[0], p.form.endswith(second)] += asked[p.prompt_id]
    assert len(variants) == 6 * 4 and set(variants.values()) == {125}
    about_others = {other for others in ABOUT_OTHERS.values() for other in others}
    assert not {p.battery for p in prompts if p.prompt_id in asked} & {"trivia", *about_others}


def test_exact_mode_scores_every_closed_prompt_in_every_form(prompts):
    exact = mode("exact", prompts)
    closed = [p for p in prompts if p.format not in ("free", "language")]
    assert all(exact.scores_exactly(p) and exact.draws(p) == 0 for p in closed)
    forms = Counter((p.battery, p.format, p.group, p.item) for p in closed)
    assert {n for (battery, *_), n in forms.items() if battery == "self_assessment"} == {2}
    assert all(exact.draws(p) == 10 for p in prompts if p.format == "free")
    assert all(exact.draws(p) for p in prompts if (p.battery, p.format) == ("self_assessment", "language"))


def test_modes_share_draws(prompts, tmp_path):
    """Where both modes sample a prompt, it is drawn once, as often as the larger asks."""
    modes = [mode(name, prompts) for name in ("exact", "paper")]
    config = SampleConfig(
        base=tmp_path, variant="v", prompts=tmp_path, ask=all_asks(modes), output_dir=tmp_path, study_seed=1
    )
    units = plan_units(prompts, config)
    made = Counter()
    for unit in units:
        for p in unit.prompts:
            made[p.prompt_id, unit.ask.mode] += unit.ask.n
    for p in prompts:
        assert made[p.prompt_id, "sampled"] == max(m.draws(p) for m in modes)
        assert made[p.prompt_id, "exact"] == any(m.scores_exactly(p) for m in modes)


def test_max_tokens_caps_every_entry(prompts):
    assert {a.max_tokens for a in mode("paper", prompts, max_tokens=40).asks} == {40, 16}


def test_a_battery_that_is_not_in_the_study_falls_away(prompts):
    few = [p for p in prompts if p.battery in ("harmfulness", "intentions")]
    assert {(a.format, a.mode) for a in mode("paper", few).asks} == {("free", "sampled"), ("choice", "sampled")}
    assert {(a.format, a.mode) for a in mode("exact", few).asks} == {("free", "sampled"), ("choice", "exact")}


def test_closed_questions_without_an_entry_are_exact_battery_by_battery(prompts):
    some = [p for p in prompts if p.battery in ("intentions", "self_assessment", "other_ai")]
    own = Mode(
        name="m", rules="strict", closed="exact", asks=(Ask(format="likert", battery="other_ai", mode="sampled", n=3),)
    )
    found = {(a.format, a.battery, a.mode) for a in complete(own, some).asks}
    assert found == {
        ("likert", "other_ai", "sampled"),
        ("likert", "self_assessment", "exact"),
        ("choice", None, "exact"),
        ("decision", None, "exact"),
        ("numerical", None, "exact"),
    }


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (Ask(format="numerical", only=("*/misalinged-high",), mode="exact"), "no prompt of format 'numerical' with an"),
        (Ask(format="choice", battery="self_assessment", mode="exact"), "format 'choice' of battery 'self_assessment'"),
    ],
)
def test_an_entry_about_nothing_is_told(prompts, ask, message):
    with pytest.raises(UserError, match=message):
        complete(Mode(name="m", rules="strict", asks=(ask,)), prompts)


def test_mistaken_modes_are_told():
    with pytest.raises(UserError, match="did you mean 'numerical'"):
        Mode(name="m", rules="strict", asks=(Ask(format="numercial", mode="exact"),))
    with pytest.raises(UserError, match="open answers"):
        Mode(name="m", rules="strict", asks=(Ask(format="language", mode="exact"),))
    with pytest.raises(UserError, match="asks nothing"):
        Mode(name="m", rules="strict")
    with pytest.raises(UserError, match="two modes have the name 'exact'"):
        read_modes([MODES / "exact.yaml"] * 2)


def test_overlapping_entries_must_cut_replies_alike(prompts):
    asks = [Ask(format="free", mode="sampled", n=n, max_tokens=t) for n, t in ((2, 10), (4, 20))]
    with pytest.raises(UserError, match="max_tokens 10 and 20"):
        settle(prompts, asks)


def test_patterns_cross_slashes(prompts):
    ask = Ask(format="language", battery="self_assessment", only=("*/lq-01/French-German/*",), mode="sampled")
    assert sum(is_asked(p, ask) for p in prompts) == 24


def test_the_design_of_an_older_run_is_read(tmp_path):
    """Its own batteries are a list there, without what they measure."""
    (tmp_path / DESIGN).write_text('{"own": ["strangers"]}')
    assert read_design(tmp_path).own == {"strangers": ""}
