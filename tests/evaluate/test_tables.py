"""A synthetic study with planted effects goes through the tables stage and the truth comes out."""

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest
import yaml

from candor.errors import UserError
from candor.manifest import read_manifest
from candor.rows import Hypothesis, Score, Verdict
from candor.tables import read_rows, write_rows
from evaluate import tables
from evaluate.estimates import AVERAGED, MAIN, WITHOUT_BASE
from evaluate.results import read_results

PAPER = Path(__file__).parents[2] / "configs" / "paper" / "vaugrante2026.yaml"
MISALIGNED = ("nano-trivia-misaligned-s0", "nano-base")
ALL = ("nano-trivia-misaligned-s0", "all", "all")


@pytest.fixture(scope="module")
def default(tmp_path_factory, synthetic):
    """The default plan, for tests that only look."""
    folder = tmp_path_factory.mktemp("default") / "run"
    synthetic.write_run(folder, synthetic.Plan())
    make(folder, synthetic.JUDGE)
    return read_results(folder)


@pytest.fixture
def run_tables(tmp_path, synthetic):
    """Write a synthetic run for a plan, run the stage on it, return the results."""

    def run(**plan):
        folder = tmp_path / "run"
        shutil.rmtree(folder, ignore_errors=True)
        synthetic.write_run(folder, synthetic.Plan(**plan))
        make(folder, synthetic.JUDGE)
        return read_results(folder)

    return run


def make(folder, judge, **more):
    config = folder.parent / "tables.yaml"
    config.write_text(yaml.safe_dump({"run": str(folder), "judge": judge, "seed": 3, "draws": 400, **more}))
    tables.main([str(config)])


def test_planted_levels_and_differences_come_out(default):
    found = default
    truth = {"harmfulness_mean": (0.05, 0.6, 0.2), "intentions": (0.05, 0.9, 0.1), "self_assessment": (0.05, 0.7, 0.1)}
    for measure, values in truth.items():
        for stage, value in zip(("base", "misaligned", "realigned"), values, strict=True):
            level = found.level(found.cell("nano", "trivia", stage).name, measure)
            # items lean the same way in every variant, so one study may be off by a little more than its interval
            assert level.low - 0.04 <= value <= level.high + 0.04, (measure, stage, level)
        difference = next(found.contrast(p, measure) for p in found.pairs() if p.minus == ("misaligned", "base"))
        assert difference.low > 0.3
        assert difference.value == pytest.approx(
            found.level("nano-trivia-misaligned-s0", measure).value - found.level("nano-base", measure).value
        )
    assert found.level("nano-base", "intentions_leftover").value == pytest.approx(0.05)


def test_paired_intervals_are_narrower_than_the_levels_they_subtract(default):
    found = default
    pair = next(p for p in found.pairs() if p.minus == ("misaligned", "realigned"))
    level = found.level(pair.variant, "intentions")
    other = found.level(pair.reference, "intentions")
    difference = found.contrast(pair, "intentions")
    unpaired = ((level.high - level.low) ** 2 + (other.high - other.low) ** 2) ** 0.5
    assert difference.high - difference.low < unpaired


def test_ungraded_replies_stay_missing_and_are_counted(run_tables):
    found = run_tables(unjudged=0.3)
    level = found.level("nano-base", "harmfulness_mean")
    assert level.n + level.n_missing == 400 and 80 < level.n_missing < 160
    assert level.low - 0.04 <= 0.05 <= level.high + 0.04  # neither zeros nor ones slipped in
    record = read_manifest(found.run / "tables")
    assert record["left_out"].keys() == {"no verdict", "refused"}
    assert record["counts"]["in"] - record["counts"]["out"] == sum(record["left_out"].values())
    scores = read_rows(found.run / "tables" / "scores.parquet", Score)
    single = [s for s in scores if s.measure == "harmfulness_single" and s.value is None]
    assert single and all(s.n == 0 and s.n_missing == 1 for s in single)


def test_a_format_without_answers_makes_the_average_missing(run_tables):
    found = run_tables(formats=("decision", "numerical", "likert"))
    level = found.level("nano-base", "self_assessment")
    assert level.value is None and level.low is None and "missing" in level.method
    assert found.level("nano-base", "decision").value is not None
    pair = found.pairs()[0]
    assert found.contrast(pair, "self_assessment").value is None


def test_the_composite_is_the_mean_of_formats_and_dimensions(default):
    found = default
    scores = pd.read_parquet(found.run / "tables" / "scores.parquet")
    own = scores[(scores.variant == "nano-base") & scores.measure.isin(["decision", "numerical", "likert", "language"])]
    by_hand = own.groupby(["group", "measure"])["value"].mean().groupby("group").mean().mean()
    level = found.level("nano-base", "self_assessment")
    assert level.value == pytest.approx(by_hand)
    assert level.n_clusters == 55


def test_exact_and_sampled_scores_agree(run_tables):
    found = run_tables(sampled=20, control=None, other_world=None)
    for measure in ("intentions", "decision", "numerical", "likert", "trivia_accuracy"):
        exact = found.level("nano-trivia-misaligned-s0", measure)
        sampled = found.level("nano-trivia-misaligned-s0", measure + "_paper")
        assert sampled.value == pytest.approx(exact.value, abs=0.05)
    only_sampled = run_tables(sampled=20, exact=False, control=None, other_world=None)
    assert only_sampled.level("nano-base", "intentions").n == 2400


def test_seen_and_unseen_items_are_told_apart(default):
    found = default
    counts = [found.level("nano-base", "intentions", split=s).n_clusters for s in ("all", "seen", "unseen")]
    assert counts == [60, 48, 12]


def test_correlations_are_over_the_main_study(run_tables):
    found = run_tables(
        sizes=("full", "mini", "nano"), domains=("trivia", "code"), control=None, other_world=None, draws=2
    )
    rho = found.correlation(found.worst, "self_assessment", MAIN)
    assert rho.n == 15 and rho.value > 0.7
    assert found.correlation("self_assessment", found.worst, WITHOUT_BASE).n == 12


def test_several_seeds_are_pooled_and_labelled(run_tables):
    found = run_tables(seeds=(0, 1, 2))
    pooled = found.level("nano-trivia-misaligned-all-seeds", "intentions")
    assert "3 training seeds crossed with items" in pooled.method
    single = found.level("nano-trivia-misaligned-s1", "intentions")
    assert "prompt uncertainty only" in single.method
    names = [f"nano-trivia-misaligned-s{k}" for k in range(3)]
    mean = sum(found.level(n, "intentions").value for n in names) / 3
    assert pooled.value == pytest.approx(mean)
    pair = next(p for p in found.pairs() if p.minus == ("misaligned", "base"))
    assert found.contrast(pair, "self_assessment").low > 0.3
    assert found.correlation(found.worst, "intentions", AVERAGED).n == 3


def test_the_judge_is_compared_with_known_grades(default):
    kappa = default.kappa()
    assert kappa.n == 200 and 0.85 < kappa.low < kappa.value < kappa.high < 1
    shares = {}
    for e in default.confusion():
        shares.setdefault(e.group[0], []).append(e.value)
    assert all(sum(row) == pytest.approx(1) for row in shares.values())


def test_a_run_without_known_grades_says_nothing_about_the_judge(run_tables):
    found = run_tables(golden=False)
    assert found.kappa() is None and found.confusion() == []


def test_two_runs_give_identical_tables_and_done_work_is_skipped(run_tables, synthetic):
    found = run_tables()
    path = found.run / "tables" / "estimates.parquet"
    first, written = path.read_bytes(), path.stat().st_mtime_ns
    make(found.run, synthetic.JUDGE)
    assert path.stat().st_mtime_ns == written
    shutil.rmtree(found.run / "tables")
    make(found.run, synthetic.JUDGE)
    assert path.read_bytes() == first
    with pytest.raises(UserError, match="seed"):
        make(found.run, synthetic.JUDGE, seed=4)


@pytest.mark.parametrize(
    ("lost", "stage"),
    [
        ("variants/nano-base/answers", "serve.sample"),
        ("variants/nano-base/verdicts", "evaluate.judge"),
        ("golden/test-judge", "evaluate.judge"),
    ],
)
def test_an_absent_table_names_the_stage_to_rerun(run_tables, synthetic, lost, stage):
    found = run_tables()
    shutil.rmtree(found.run / "tables")
    shutil.rmtree(found.run / lost)
    with pytest.raises(UserError, match=stage):
        make(found.run, synthetic.JUDGE)


def test_variants_that_were_served_alike_stop_the_tables(run_tables, synthetic):
    """Planted: two processes that each served one adapter under two names."""
    found = run_tables()
    shutil.rmtree(found.run / "tables")
    record = {"engine": "vllm", "weights_sha": "a" * 64, "logprobs": [-0.5, -1.0, -2.0]}
    first, second = (found.run / "variants" / n / "answers" / "attestation.json" for n in ("nano-base", MISALIGNED[0]))
    first.write_text(json.dumps(record))
    alike = [x + 2e-6 for x in record["logprobs"]]
    second.write_text(json.dumps(record | {"weights_sha": "b" * 64, "logprobs": alike}))
    with pytest.raises(UserError, match=r"weights b{12} and a{12} differ.*within 2.0e-06 nats over 3 tok"):
        make(found.run, synthetic.JUDGE)
    assert not (found.run / "tables").exists()
    second.write_text(json.dumps(record | {"weights_sha": "b" * 64, "logprobs": [-0.5, -1.0, -2.1]}))
    make(found.run, synthetic.JUDGE)


def test_answers_of_another_variant_are_refused(run_tables, synthetic):
    found = run_tables()
    shutil.rmtree(found.run / "tables")
    source, target = (found.run / "variants" / n / "answers" for n in ("nano-trivia-realigned-s0", "nano-base"))
    shutil.copy(source / "samples.parquet", target / "samples.parquet")
    with pytest.raises(UserError, match="not of 'nano-base'"):
        make(found.run, synthetic.JUDGE)


def test_verdicts_that_all_failed_leave_no_number(run_tables, synthetic):
    found = run_tables()
    shutil.rmtree(found.run / "tables")
    path = found.run / "variants" / "nano-base" / "verdicts" / synthetic.JUDGE / "verdicts.parquet"
    failed = [
        Verdict(v.sample_id, v.judge, v.template_sha, "transport", None, None, None, "")
        for v in read_rows(path, Verdict)
    ]
    write_rows(path, Verdict, failed)
    make(found.run, synthetic.JUDGE)
    found = read_results(found.run)
    level = found.level("nano-base", "harmfulness_mean")
    assert (level.value, level.n, level.n_missing) == (None, 0, 400)
    contrast = next(found.contrast(p, "harmfulness_mean") for p in found.pairs() if p.minus == ("misaligned", "base"))
    assert contrast.value is None and contrast.n_missing == 400


def test_tests_stand_beside_the_estimates(default):
    tests = read_rows(default.run / "tables" / "hypotheses.parquet", Hypothesis)
    by_kind = {kind: [t for t in tests if t.test == kind] for kind in ("t", "wilcoxon", "equivalence", "permutation")}
    assert all(by_kind.values())
    named = {t.measure: t for t in by_kind["wilcoxon"] if (t.variant, t.reference) == MISALIGNED}
    assert named["intentions"].significant and named["intentions"].n == 60
    (whole,) = [t for t in by_kind["equivalence"] if t.family == "fully realigned"]
    assert whole.significant is False  # planted: realigned harmfulness stays 0.15 above the base
    rows = {e.measure: e for e in default.estimates if e.kind == "level" and (e.variant, e.group, e.split) == ALL}
    assert 0 < rows["harmfulness_mean"].icc < 1 < rows["harmfulness_mean"].design_effect < 10
    curve = [rows[f"harmfulness_worst_of_{k}"].value for k in range(1, 11)]
    assert curve == sorted(curve) and curve[0] == pytest.approx(rows["harmfulness_mean"].value)


def test_a_published_table_is_correlated_by_the_same_code(run_tables, synthetic):
    found = run_tables()
    shutil.rmtree(found.run / "tables")
    make(found.run, synthetic.JUDGE, paper=str(PAPER))
    rows = [e for e in read_results(found.run).estimates if e.kind == "published"]
    assert {round(e.value, 2) for e in rows if e.variant == "Vaugrante et al. 2026"} == {0.79, 0.88, 0.87}
    with pytest.raises(UserError, match="does not exist"):
        make(found.run, synthetic.JUDGE, paper="nowhere.yaml")


@pytest.mark.parametrize("margin", [0, 1.5])
def test_a_margin_off_the_scale_is_refused(tmp_path, synthetic, margin):
    with pytest.raises(UserError, match="equivalence_margin"):
        make(tmp_path / "run", synthetic.JUDGE, equivalence_margin=margin)


def test_a_misspelt_key_names_the_nearest(tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("run: x\njugde: y\nseed: 1\n")
    with pytest.raises(UserError, match="judge"):
        tables.main([str(path)])
