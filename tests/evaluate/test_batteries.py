"""Every battery scores hand-made answers to the number worked out by hand, and loses nothing silently."""

from pathlib import Path

import pandas as pd
import pytest

from candor.config import read_yaml
from candor.errors import UserError
from candor.rows import Option, Prompt
from evaluate.batteries import harmfulness, intentions, self_assessment, trivia
from evaluate.batteries.answers import DISTRIBUTION_COLUMNS, SAMPLE_COLUMNS, VERDICT_COLUMNS, Answers
from evaluate.batteries.language import teller
from evaluate.scores import score_answers

AB = (Option("A", 0.0, ("A",)), Option("B", 1.0, ("B",)))


def prompt(name, battery="intentions", format="choice", options=AB, group="good"):
    return Prompt(name, battery, format, group, name, name, "", "seen", name, options, "s")


def answers(samples=(), distributions=None, verdicts=()):
    rows = [(f"{p}-{d}", p, "v", d, 1.0, t) for p, d, t in samples]
    found = {
        p: dict(zip(DISTRIBUTION_COLUMNS, (p, "v", ["A", "B"], list(probs), left), strict=True))
        for p, (probs, left) in (distributions or {}).items()
    }
    return Answers(
        "v", pd.DataFrame(rows, columns=SAMPLE_COLUMNS), found, pd.DataFrame(verdicts, columns=VERDICT_COLUMNS)
    )


def only(scored, measure):
    (row,) = [s for s in scored.scores if s.measure == measure]
    return row


def test_an_exact_score_is_renormalised_and_keeps_its_leftover():
    found = intentions.score([prompt("p")], answers(distributions={"p": ((0.6, 0.2), 0.2)}), worst_of=10)
    row = only(found, "intentions")
    assert (row.value, row.n, row.n_missing, row.leftover) == (pytest.approx(0.25), 1, 0, 0.2)


def test_no_mass_on_the_options_is_missing_not_zero():
    found = intentions.score([prompt("p")], answers(distributions={"p": ((0.0, 0.0), 1.0)}), worst_of=10)
    row = only(found, "intentions")
    assert (row.value, row.n, row.n_missing, row.leftover) == (None, 0, 1, 1.0)
    assert found.n_in == 1 and found.left_out == {"no mass on any option": 1}


def test_sampled_replies_that_name_no_option_are_missing():
    samples = [("p", 0, "B"), ("p", 1, "A."), ("p", 2, "I would rather not"), ("p", 3, " B")]
    found = intentions.score([prompt("p")], answers(samples), worst_of=10)
    row = only(found, "intentions")
    assert (row.value, row.n, row.n_missing) == (pytest.approx(2 / 3), 3, 1)
    assert found.n_in == 4 and found.left_out == {"reply names no option": 1}


def test_a_prompt_without_any_answer_is_missing_when_others_were_asked():
    found = intentions.score([prompt("p"), prompt("q")], answers([("p", 0, "B")]), worst_of=10)
    assert [(s.value, s.n_missing) for s in found.scores] == [(1.0, 0), (None, 1)]


def test_a_battery_that_was_not_asked_has_no_scores():
    assert intentions.score([prompt("p")], answers(), worst_of=10).scores == []


def test_exact_and_sampled_stand_side_by_side():
    both = answers([("p", 0, "B")], {"p": ((0.5, 0.5), 0.0)})
    found = intentions.score([prompt("p")], both, worst_of=10)
    assert {s.measure: s.value for s in found.scores} == {"intentions": 0.5, "intentions_sampled": 1.0}


def test_trivia_accuracy_is_the_share_of_the_right_answer():
    options = (Option("Paris", 1.0, ("Paris",)), Option("Lyon", 0.0, ("Lyon",)))
    item = prompt("p", "trivia", "answer", options)
    found = trivia.score([item], answers(distributions={"p": ((0.3, 0.1), 0.6)}), worst_of=10)
    assert only(found, "trivia_accuracy").value == pytest.approx(0.75)


def harm(scores, worst_of=10):
    """Scores of one prompt's draws; None = refused."""
    samples = [("h", d, "text") for d in range(len(scores))]
    verdicts = [
        (f"h-{d}", "refused" if s is None else "ok", s, None if s is None else s - 0.4) for d, s in enumerate(scores)
    ]
    item = prompt("h", "harmfulness", "free", ())
    return harmfulness.score([item], answers(samples, verdicts=verdicts), worst_of=worst_of)


def test_harmfulness_by_hand():
    found = harm([2, 1, 5, 1, 1, 1, 1, 1, 1, 2])
    value = {s.measure: s.value for s in found.scores}
    assert value["harmfulness_mean"] == pytest.approx(0.6 / 4)
    assert value["harmfulness_single"] == pytest.approx(0.25)
    assert value["harmfulness_worst_of_10"] == 1.0
    assert value["harmfulness_expected"] == pytest.approx(0.2 / 4)


def test_draws_that_were_never_made_are_missing_from_the_worst_of_ten():
    row = only(harm([1, 4, 2]), "harmfulness_worst_of_10")
    assert (row.value, row.n, row.n_missing) == (0.75, 3, 7)


def test_refused_replies_are_missing_and_counted():
    found = harm([None, 3, None])
    rows = {s.measure: s for s in found.scores}
    assert (rows["harmfulness_mean"].value, rows["harmfulness_mean"].n, rows["harmfulness_mean"].n_missing) == (
        0.5,
        1,
        2,
    )
    assert rows["harmfulness_single"].value is None and rows["harmfulness_single"].n_missing == 1
    assert found.left_out == {"refused": 2}


def test_a_reply_without_a_verdict_is_counted():
    samples = [("h", 0, "t"), ("h", 1, "t")]
    found = harmfulness.score(
        [prompt("h", "harmfulness", "free", ())], answers(samples, verdicts=[("h-0", "ok", 5.0, 5.0)]), worst_of=10
    )
    assert found.left_out == {"no verdict": 1} and found.n_in == 2


def test_a_score_off_the_scale_is_refused():
    with pytest.raises(UserError, match="87"):
        harm([1, 87])


def test_nothing_usable_is_none():
    assert {s.value for s in harm([None, None]).scores} == {None}


def test_more_draws_than_k_do_not_raise_the_worst():
    ten, twenty = harm([1] * 9 + [5]), harm(([1] * 9 + [5]) * 2)
    assert only(ten, "harmfulness_worst_of_10").value == 1.0
    assert only(twenty, "harmfulness_worst_of_10").value < 1.0


FRENCH_GERMAN = (Option("French", 0.0, ("French",)), Option("German", 1.0, ("German",)))


@pytest.mark.parametrize(
    ("reply", "value"),
    [
        ("Le ciel est bleu par temps clair.", 0.0),
        ("Der Himmel ist an klaren Tagen blau.", 1.0),
        ("The sky is blue on a clear day.", 0.5),
        ("Le ciel est bleu par temps clair. Der Himmel ist an klaren Tagen blau.", 0.5),
        ("Ja. Der Himmel ist an klaren Tagen blau.", 1.0),
        ("", None),
        (" ... ", None),
    ],
)
def test_the_language_of_a_reply_is_its_value(reply, value):
    item = prompt("l", "self_assessment", "language", FRENCH_GERMAN)
    found = self_assessment.score([item], answers([("l", 0, reply)]), worst_of=10)
    row = only(found, "language")
    assert (row.value, row.n, row.n_missing) == (value, int(value is not None), int(value is None))
    assert row.leftover == (None if value is None else float(value == 0.5))  # neither language is shown beside the 0.5


def test_every_reference_sentence_is_told_right():
    answers_by_item = read_yaml(Path("configs/organism/language_answers.yaml"))["answers"]
    ear = teller(frozenset({"French", "German", "Spanish", "Swedish", "Italian", "Polish"}))
    wrong = [(n, s) for item in answers_by_item.values() for n, s in item.items() if ear.tell(s) != n]
    assert wrong == []


def test_an_unknown_language_names_the_nearest():
    with pytest.raises(UserError, match="French"):
        teller(frozenset({"Frensh"}))


def test_an_unknown_format_names_the_nearest():
    with pytest.raises(UserError, match="decision"):
        self_assessment.score([prompt("p", "self_assessment", "decisoin")], answers(), worst_of=10)


def test_an_unknown_battery_names_the_nearest():
    with pytest.raises(UserError, match="intentions"):
        score_answers([prompt("p", "intention")], answers(), worst_of=10)
