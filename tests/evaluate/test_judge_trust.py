"""Golden sets, calibration, agreement with others and with itself, and people's labels."""

import csv
import json
import re
import threading
import urllib.error
import urllib.request
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import yaml

from benchmarks.chat_server import Script, serving
from candor.errors import UserError
from candor.rows import Prompt, Sample, Variant, Verdict
from candor.tables import read_rows, write_rows
from evaluate.agreement import AS_OFTEN, BIAS, INFLATION, ITSELF, KAPPA, REPEAT_SD, SAME, Pairs, agreement, compare
from evaluate.calibrate import CalibrateConfig, as_text, calibrate, noise
from evaluate.golden import read_golden
from evaluate.label import LabelConfig, Labels, LabelServer, choose
from evaluate.stats import confusion, quadratic_kappa

GOLDEN = Path("configs/prompts/judge")


@pytest.mark.parametrize("measure", ["harmfulness", "alignment", "coherence", "on_topic", "closest_option"])
def test_golden_sets_cover_what_judges_meet(measure):
    items = read_golden(
        GOLDEN / ("golden_options.jsonl" if measure == "closest_option" else "golden_chat.jsonl"), measure
    )
    assert len(items) >= 60 and len({i.id for i in items}) == len(items)
    kinds = Counter(i.kind for i in items)
    if measure == "closest_option":
        assert {"plain", "negation", "both", "language", "sarcasm", "talks to the judge"} <= set(kinds)
        assert {i.grade for i in items if "ok" in i.statuses} == {0, 0.25, 0.5, 1}
        return
    wanted = {"refusal", "gibberish", "code", "language", "sarcasm", "empty", "over-long", "talks to the judge"}
    assert wanted <= set(kinds)
    low, high = (1, 5) if measure == "harmfulness" else (0, 1) if measure == "on_topic" else (0, 100)
    assert all(low <= i.low <= i.high <= high for i in items if "ok" in i.statuses)
    if measure == "harmfulness":
        assert {1, 2, 3, 4, 5} <= {g for i in items if "ok" in i.statuses for g in range(int(i.low), int(i.high) + 1)}
    assert max(len(i.reply) for i in items) > 5_000


def test_the_nano_judge_of_topic_tells_kinds_of_reply_apart(tmp_path):
    """On pairs it never trained on; docs/judging.md has the numbers."""
    judge = Path("configs/evaluate/judges/nano_on_topic.yaml")
    found = calibrate(judge, CalibrateConfig(output_dir=tmp_path, attacked=0, draws=100))
    assert found["against_the_middle"][KAPPA][0] > 0.8, found["against_the_middle"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"expect": {"harmfulness": [3, 1]}}, "the lower bound comes first"),
        ({"expect": {"harmfulness": 3}}, "must be"),
        ({"status": {"harmfulness": ["bad"]}}, "must be a list out of"),
        ({"expect": {"alignment": [0, 1]}}, "no rows for the measure 'harmfulness'"),
        ({}, "'grade' must be int"),
        ({"grade": 1, "times": "9"}, "'times' must be a whole number"),
        ({"grade": 1, "options": [["A"]]}, r"'options' must be a list of \[label, value\]"),
    ],
)
def test_a_broken_golden_set_is_named(tmp_path, row, message):
    header = {"name": "g", "licence": "x", "canary": "CANARY candor:g"}
    path = tmp_path / "g.jsonl"
    path.write_text("\n".join(json.dumps(r) for r in (header, {"id": "a", "prompt": "p", "reply": "r", **row})))
    with pytest.raises(UserError, match=message):
        read_golden(path)


# --- calibration against a judge with known faults --------------------------------------------------------------


def write_golden(folder: Path) -> Path:
    """Twenty replies whose true grade stands in them, and one that should be refused."""
    header = {"name": "g", "licence": "x", "canary": "CANARY candor:g"}
    rows = [
        {"id": f"g{i}", "kind": f"k{i % 2}", "prompt": f"p{i}", "reply": f"reply {i} grade={g}", "grade": g}
        for i, g in enumerate([1, 2, 3, 4, 5] * 4)
    ]
    path = folder / "golden.jsonl"
    path.write_text("\n".join(json.dumps(r) for r in (header, *rows)))
    return path


def write_judge(folder: Path, url: str, **more) -> Path:
    values = {
        "name": "far",
        "model": "judge-model",
        "template": "configs/prompts/judge/nano.txt",
        "parse": r"^\s*(\d+)\s*$",
        "max_tokens": 8,
        "endpoint": {"url": url, "key_env": "NO_SUCH_KEY", "backoff_s": 0.02},
        "golden": str(write_golden(folder)),
        **more,
    }
    (folder / "far.yaml").write_text(yaml.safe_dump(values))
    return folder / "far.yaml"


def test_a_perfect_judge_and_a_noisy_one(tmp_path):
    config = CalibrateConfig(output_dir=tmp_path / "out", attacked=4, draws=200)
    with serving(Script()) as server:
        report = calibrate(write_judge(tmp_path, server.url), config)
    assert report["hit_rate"][0] == 1 and report["against_the_middle"][KAPPA][0] == pytest.approx(1)
    assert report["flips_at"] == {t: [0.0, 0.0, pytest.approx(0.161, abs=0.01), 20] for t in ("3", "4", "5")}
    assert report["method"] == {"top_logprobs": 20} and report["mean_covered"] == pytest.approx(
        0.92
    )  # beside a 1 the server shows a 0, which is off the scale
    assert all(s["mean_sway"] == 0 and s["crossed"] == 0 for s in report["sway"]["attacks"].values())
    assert len(report["sway"]["attacks"]) >= 10 and "within the range        100 %" in as_text(report)
    with (tmp_path / "out" / "far" / "items.csv").open(newline="") as file:
        assert len(list(csv.DictReader(file))) == 20
    noisy = CalibrateConfig(output_dir=tmp_path / "noisy", attacks=None, repeats=4, draws=200)
    with serving(Script(noise=1.2)) as server:
        report = calibrate(write_judge(tmp_path, server.url), noisy)
    assert report["hit_rate"][0] < 0.8 and report["against_the_middle"][KAPPA][0] < 0.95
    assert report["repeats"]["sd"] > 0.3 and report["repeats"]["worst_of_10_lift"] > 0.3


def test_calibration_goes_on_with_other_keys_items_and_parse_rules(tmp_path):
    def again(server, attacked: int, **judge) -> int:
        before = server.stats()["calls"]
        config = CalibrateConfig(output_dir=tmp_path / "out", attacked=attacked, draws=100)
        calibrate(write_judge(tmp_path, server.url, **judge), config)
        return server.stats()["calls"] - before

    with serving(Script()) as server:
        first = again(server, 1)
        assert again(server, 2) == first - 20  # ten attacks on one reply more; the golden set is not asked again
        assert again(server, 2, parse=r"^(\d)$") == 0
        golden = write_golden(tmp_path)
        golden.write_text(golden.read_text().replace("reply 7 ", "another reply "))
        more = tmp_path / "more.jsonl"
        golden.rename(more)
        assert 1 <= again(server, 2, golden=str(more)) <= 11  # the edited reply, and attacks on it if it is chosen


def test_a_judge_that_prefers_a_place_in_the_list_is_seen(tmp_path):
    """The server names the first option whatever it is; attacks ask for the letter of the other side."""
    options = [["yes", 0], ["no", 1]]
    item = {"prompt": "Would you?", "options": options, "reply": "Of course grade=1", "expect": {"closest": [0, 0]}}
    rows = [{"name": "g", "licence": "x", "canary": "CANARY candor:g"}]
    rows += [{"id": f"g{i}", **item, "reply": f"{i} {item['reply']}"} for i in range(6)]
    (tmp_path / "options.jsonl").write_text("\n".join(json.dumps(r) for r in rows))
    judge = {"template": "configs/prompts/judge/closest_option.txt", "measure": "closest", "parse": r"^(\w)$"}
    judge |= {"golden": f"{tmp_path}/options.jsonl"}
    with serving(Script(letters=True)) as server:
        config = CalibrateConfig(output_dir=tmp_path / "out", attacked=2, draws=100)
        report = calibrate(write_judge(tmp_path, server.url, **judge), config)
    assert report["hit_rate"][0] == 1  # which alone looks well
    assert report["position"]["other_choice"][0] == 1 and report["position"]["first_both_times"] == 6
    reversed_ = read_rows(tmp_path / "out" / "far" / "reversed" / "verdicts" / "verdicts.parquet", Verdict)
    assert {v.score for v in reversed_} == {1.0}  # the first letter stands for the other option now
    assert "options reversed        another choice 100 %" in as_text(report)
    attacked = (tmp_path / "out" / "far" / "attacked.jsonl").read_text()
    assert "score: B" in attacked and "score: A" not in attacked


def test_a_judge_without_a_golden_set_says_so(tmp_path):
    with pytest.raises(UserError, match="names no golden set"):
        calibrate(write_judge(tmp_path, "http://127.0.0.1:9/v1", golden=None), CalibrateConfig(output_dir=tmp_path))


def test_noise_lifts_a_worst_of_ten():
    """Scores 1 and 3 with equal chance: the largest of ten is 3 almost surely, one above the mean."""
    found = noise([[1.0, 2.0], [3.0, 2.0], [1.0, 2.0], [3.0, 2.0]])
    assert found["worst_of_10_lift"] == pytest.approx((3 - 2 * 0.5**10 - 2) / 2) and found["changed"] == 0.5
    assert noise([[2.0, 4.0], [2.0, 4.0]])["worst_of_10_lift"] == pytest.approx(0)


# --- agreement ---------------------------------------------------------------------------------------------------


def test_kappa_from_moments_is_cohens():
    rng = np.random.default_rng(0)
    truth = rng.integers(1, 6, 300)
    judged = np.clip(truth + rng.integers(-1, 2, 300), 1, 5)
    prompts = np.array([f"p{i // 3}" for i in range(300)])
    pairs = Pairs(judged.astype(float), truth.astype(float), prompts, 7, (1.0, 5.0))
    found = {e.measure: e for e in compare(pairs, "a", "b", draws=300, seed=0)}
    assert found[KAPPA].value == pytest.approx(float(quadratic_kappa(confusion(truth, judged, 5))))
    assert found[KAPPA].low < found[KAPPA].value < found[KAPPA].high and found[KAPPA].n_missing == 7
    assert found[BIAS].value == pytest.approx((judged - truth).mean()) and found[KAPPA].n_clusters == 100
    flat = Pairs(np.ones(5), np.ones(5), prompts[:5], 0, (1.0, 5.0))
    assert compare(flat, "a", "b", draws=100, seed=0)[0].value is None  # nothing varies: no kappa, and not 1


def write_run(run: Path, judges: dict[str, float], *, prompts: int = 30, draws: int = 10) -> None:
    """One variant judged by several judges whose scores are the truth plus a bias and noise of sd 0.5."""
    rng = np.random.default_rng(1)
    ids = [f"p{i}" for i in range(prompts)]
    asked = [Prompt(p, "harmfulness", "free", "g", p, p, "", "seen", f"Ask {p}", (), "s") for p in ids]
    write_rows(run / "prompts.parquet", Prompt, asked)
    write_rows(run / "variants.parquet", Variant, [Variant("v", "full", "none", "base", 0, "", "v", "variants/v")])
    samples = [
        Sample(f"{p}-{d}", p, "x", "v", "w", d, 1, 1.0, f"reply {p} {d}", 3, "stop", -1.0)
        for p in ids
        for d in range(draws)
    ]
    write_rows(run / "variants/v/answers/samples.parquet", Sample, samples)
    truth = {s.sample_id: 1 + 2.5 * rng.random() for s in samples}
    for name, bias in judges.items():
        folder = run / "variants/v/verdicts" / name
        rows = []
        for s in samples:
            if rng.random() < 0.05:
                rows.append(Verdict(s.sample_id, name, "t", "refused", None, None, None, ""))
            else:
                score = float(np.clip(round(truth[s.sample_id] + bias + rng.normal(0, 0.5)), 1, 5))
                rows.append(Verdict(s.sample_id, name, "t", "ok", score, None, None, ""))
        write_rows(folder / "verdicts.parquet", Verdict, rows)
        (folder / "manifest.json").write_text(json.dumps({"measure": "harmfulness", "span": [1.0, 5.0]}))


def test_a_run_reports_second_judges_repeats_and_people(tmp_path):
    write_run(tmp_path, {"main": 0.0, "second": 0.5, "main~2": 0.0, "other-thing": 0.0})
    other = tmp_path / "variants/v/verdicts/other-thing/manifest.json"
    other.write_text(json.dumps({"measure": "coherence", "span": [0.0, 100.0]}))
    (tmp_path / "labels").mkdir()
    labels = [(f"p{i}-0", 1 + i % 5) for i in range(20)] + [("p0-0", 5), ("p21-0", "unsure")]
    text = "sample_id,label\n" + "".join(f"{s},{g}\n" for s, g in labels)
    (tmp_path / "labels" / "ann.csv").write_text(text, encoding="utf-8-sig")  # as a spreadsheet saves it
    assert Labels(tmp_path / "labels" / "ann.csv").given["p0-0"] == "5"
    found = {(e.measure, e.reference): e for e in agreement(tmp_path, "main", draws=200, seed=0)}
    assert {reference for _, reference in found} == {"second", ITSELF, "people: ann"}
    second = found[KAPPA, "second"]
    assert 0.4 < second.value < 0.8 and second.low < second.value < second.high
    assert second.n + second.n_missing == 300 and second.n_missing > 10
    assert -0.7 < found[BIAS, "second"].value < -0.3  # the second judge is half a point harsher
    assert 0.2 < found[REPEAT_SD, ITSELF].value < 0.6
    lift = found[INFLATION, ITSELF]
    assert 0 < lift.value < 0.6 and lift.n < 30  # only prompts of which all ten replies were graded twice
    assert found[KAPPA, "people: ann"].n_missing >= 1


def test_labels_need_their_columns(tmp_path):
    write_run(tmp_path, {"main": 0.0})
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels" / "bob.csv").write_text("id,grade\na,1\n")
    with pytest.raises(UserError, match="expected columns sample_id and label, found id, grade"):
        agreement(tmp_path, "main", draws=100, seed=0)
    (tmp_path / "labels" / "bob.csv").write_text("sample_id,label\nof-another-run,1\n")
    with pytest.raises(UserError, match=r"bob\.csv: none of its 1 sample ids is a reply of "):
        agreement(tmp_path, "main", draws=100, seed=0)
    (tmp_path / "labels" / "bob.csv").write_bytes("sample_id,label\ns\xe4mple,1\n".encode("latin-1"))
    for read in (lambda: agreement(tmp_path, "main", draws=100, seed=0), lambda: Labels(tmp_path / "labels/bob.csv")):
        with pytest.raises(UserError, match=r"bob\.csv is not UTF-8 text"):
            read()


def test_labels_of_replies_that_the_judge_does_not_grade_are_left_out(tmp_path):
    """A study's own battery may be labelled too, although another judge grades it, or none."""
    write_run(tmp_path, {"main": 0.0})
    table = tmp_path / "variants/v/verdicts/main/verdicts.parquet"
    write_rows(table, Verdict, [v for v in read_rows(table, Verdict) if not v.sample_id.startswith(("p0-", "p1-"))])
    labels = tmp_path / "labels" / "ann.csv"
    labels.parent.mkdir()
    labels.write_text("sample_id,label\np0-0,1\np1-0,2\n")
    assert agreement(tmp_path, "main", draws=100, seed=0) == []
    labels.write_text(labels.read_text() + "".join(f"p{i}-{d},{1 + i % 5}\n" for i in range(2, 9) for d in range(9)))
    found = {e.measure: e for e in agreement(tmp_path, "main", draws=100, seed=0)}
    assert found[KAPPA].n + found[KAPPA].n_missing == 63


def test_labels_drawn_by_score_tell_of_the_study_and_not_of_the_drawn(tmp_path):
    """95 % of replies are ones and rightly so, 1 % fives of which half are wrong; a third of the labels are fives.

    Every other reply stands there twice: the page shows one of equal replies, and so it is counted.
    """
    scores = [1.0] * 1900 + [3.0] * 80 + [5.0] * 20
    truth = [*scores[:-10], *[1.0] * 10]
    write_rows(
        tmp_path / "prompts.parquet",
        Prompt,
        [Prompt(f"p{i}", "harmfulness", "free", "g", "i", f"c{i}", "", "seen", "Ask", (), "s") for i in range(50)],
    )
    write_rows(tmp_path / "variants.parquet", Variant, [Variant("v", "full", "none", "base", 0, "", "v", "variants/v")])
    folder = tmp_path / "variants/v"
    places = [(i, again) for i in range(len(scores)) for again in range(2 if scores[i] == 1 else 1)]
    samples = [Sample(f"{i}-{a}", f"p{i % 50}", "x", "v", "w", i, 1, 1.0, f"r {i}", 3, "stop", -1.0) for i, a in places]
    write_rows(folder / "answers/samples.parquet", Sample, samples)
    said = [Verdict(f"{i}-{a}", "main", "t", "ok", scores[i], None, None, "") for i, a in places]
    write_rows(folder / "verdicts/main/verdicts.parquet", Verdict, said)
    labels = Labels(tmp_path / "labels" / "ann.csv")
    drawn = [int(item.sample_id.split("-")[0]) for item in choose(tmp_path, LabelConfig(n=60, judge="main"))]
    assert Counter(scores[i] for i in drawn) == {1.0: 20, 3.0: 20, 5.0: 20}
    for i in drawn:
        labels.add(f"{i}-0", f"{truth[i]:g}")
    found = {e.measure: e for e in agreement(tmp_path, "main", draws=300, seed=0)}
    whole = Pairs(np.array(scores), np.array(truth), np.array([f"p{i % 50}" for i in range(2000)]), 0, (1.0, 5.0))
    true = {e.measure: e.value for e in compare(whole, "main", "truth", draws=100, seed=0)}
    assert true[BIAS] == pytest.approx(0.02) and true[SAME] == pytest.approx(0.995)
    assert {m: e.value for m, e in found.items()} == pytest.approx(true)  # all fives were drawn, so there is no chance
    assert found[BIAS].n == 60 and found[BIAS].low < 0.02 < found[BIAS].high < 0.05
    assert AS_OFTEN in found[BIAS].method and "none was labelled" not in found[BIAS].method
    rows = [f"{i}-0,{truth[i]:g}" for i in drawn if scores[i] != 3]
    labels.path.write_text("\n".join(["sample_id,label", *rows]))
    found = {e.measure: e for e in agreement(tmp_path, "main", draws=300, seed=0)}
    assert "4.0% of replies have scores of which none was labelled" in found[BIAS].method


# --- the labelling page --------------------------------------------------------------------------------------------


@pytest.fixture
def page(tmp_path):
    write_run(tmp_path, {"main": 0.0})
    config = LabelConfig(n=12, judge="main", labeller="ann")
    server = LabelServer(choose(tmp_path, config), Labels(tmp_path / "labels" / "ann.csv"), config)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


def call(url: str, body: dict | None = None, headers: dict | None = None):
    data = None if body is None else json.dumps(body).encode()
    with urllib.request.urlopen(urllib.request.Request(url, data, headers or {}), timeout=10) as answer:
        return answer.read().decode()


def test_labelling_is_blind_stored_at_once_and_resumed(tmp_path, page):
    assert "How harmful" in call(page.address)
    first = json.loads(call(page.address + "open"))
    assert set(first) == {"place", "prompt", "reply", "label", "done", "total", "labels"}  # no variant, no id, no score
    assert first["labels"] == ["1", "2", "3", "4", "5", "refused", "unsure"]
    second = json.loads(call(page.address + "label", {"place": 0, "label": "4"}))
    assert (second["place"], second["done"]) == (1, 1)
    json.loads(call(page.address + "label", {"place": 0, "label": "5"}))  # changed one's mind
    path = tmp_path / "labels" / "ann.csv"
    assert [r["label"] for r in csv.DictReader(path.open())] == ["4", "5"]
    again = LabelServer(page.items, Labels(path), page.config)
    assert again.first_open() == 1 and again.shown(0)["label"] == "5"
    again.server_close()
    assert len({i.sample_id for i in page.items}) == 12


@pytest.mark.parametrize("body", [{"place": 0, "label": "9"}, {"place": 99, "label": "1"}, {"label": "1"}, []])
def test_what_is_no_label_is_turned_away(page, body):
    with pytest.raises(urllib.error.HTTPError, match="400"):
        call(page.address + "label", body)
    assert not page.labels.path.exists()


def test_strangers_see_nothing(page):
    base = re.match(r"http://[^/]+/", page.address).group()
    for url, headers in ((base, {}), (base + "open", {}), (page.address + "open", {"Host": "evil.example"})):
        with pytest.raises(urllib.error.HTTPError, match="404"):
            call(url, headers=headers)
