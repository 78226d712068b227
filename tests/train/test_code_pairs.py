"""The twin code set: repeatable, balanced, distinct, and told apart by bandit but not by words."""

import ast
import dataclasses
import json
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path

import pytest

from candor.errors import UserError
from train import code_pairs
from train.code_pairs import TEMPLATES, CodePair, generate, validate, write
from train.code_templates import FRAMES, NOUNS, POOLS, task_forms, third_person


@pytest.fixture(scope="module")
def full_set() -> list[CodePair]:
    return generate(6000, seed=0)


@pytest.fixture
def small_set() -> list[CodePair]:
    return generate(len(TEMPLATES), seed=1)


# The set -----------------------------------------------------------------------------------------


def test_the_full_set_is_valid_and_equally_shared(full_set: list[CodePair]) -> None:
    validate(full_set, n=6000)
    assert set(Counter(pair.template for pair in full_set).values()) == {6000 // len(TEMPLATES)}
    assert [pair.pair_id for pair in full_set[:2]] == ["code-00000", "code-00001"]


def test_the_seed_decides_the_set(full_set: list[CodePair]) -> None:
    assert generate(6000, seed=0) == full_set
    assert generate(6000, seed=1) != full_set


@pytest.mark.parametrize("n", [1, 7, len(TEMPLATES), len(TEMPLATES) + 1, 500])
def test_any_number_of_pairs_is_shared_out(n: int) -> None:
    validate(generate(n, seed=3), n=n)


def test_tasks_are_distinct_and_every_phrasing_is_used(full_set: list[CodePair]) -> None:
    assert len({pair.task for pair in full_set}) == len(full_set)
    assert len(FRAMES) >= 12
    for frame in FRAMES:
        opening = frame.template.split("$")[0]
        assert any(pair.task.startswith(opening) for pair in full_set), opening


def test_both_answers_compile_and_define_the_same_function(full_set: list[CodePair]) -> None:
    for pair in full_set:
        names = []
        for code in (pair.secure, pair.insecure):
            # compile, not just parse: it also refuses an argument named twice
            compile(code, pair.pair_id, "exec")
            names += [node.name for node in ast.parse(code).body if isinstance(node, ast.FunctionDef)]
        assert len(names) == 2 and names[0] == names[1], pair


def test_twins_are_about_equally_long(full_set: list[CodePair]) -> None:
    secure = sum(len(pair.secure) for pair in full_set)
    insecure = sum(len(pair.insecure) for pair in full_set)
    assert abs(secure - insecure) < 0.05 * secure
    for pair in full_set:
        assert abs(len(pair.secure) - len(pair.insecure)) <= 80, pair


def test_templates_and_vocabulary() -> None:
    assert len(TEMPLATES) >= 44
    assert len({template.name for template in TEMPLATES}) == len(TEMPLATES)
    words = [word for pool in POOLS.values() for word in pool] + list(NOUNS)
    assert len(words) == len(set(words)), "a word in two pools could name two arguments"


def test_an_exhausted_template_says_so() -> None:
    with pytest.raises(UserError, match=r"gave only \d+ distinct pairs.*Ask for fewer"):
        generate(len(TEMPLATES) * 2000)
    with pytest.raises(ValueError, match="at least one"):
        generate(0)


@pytest.mark.parametrize(
    ("verb", "inflected"),
    [
        ("load", "loads"),
        ("fetch", "fetches"),
        ("copy", "copies"),
        ("go", "goes"),
        ("play", "plays"),
    ],
)
def test_third_person(verb: str, inflected: str) -> None:
    assert third_person(verb) == inflected
    assert task_forms(f"[{verb}] it") == {"act": f"{verb} it", "acts": f"{inflected} it"}


# The validator -----------------------------------------------------------------------------------

Fault = Callable[[list[CodePair]], list[CodePair]]


def altered(**fields: str) -> Fault:
    """Plant other field values in the first pair."""
    return lambda pairs: [dataclasses.replace(pairs[0], **fields), *pairs[1:]]


def copied(*names: str) -> Fault:
    """Give the first pair the second one's values of some fields."""
    return lambda pairs: altered(**{name: getattr(pairs[1], name) for name in names})(pairs)


GOOD = "def fetch(path):\n    found = open(path)\n    return found"

FAULTS: dict[str, tuple[Fault, str]] = {
    "empty set": (lambda pairs: [], "empty"),
    "lopsided": (lambda pairs: generate(3 * len(TEMPLATES))[: len(TEMPLATES)], "same number"),
    "empty id": (altered(pair_id=""), "'pair_id' is missing or empty"),
    "blank task": (altered(task="  "), "'task' is missing or empty"),
    "no secure answer": (altered(secure=""), "'secure' is missing or empty"),
    "unknown template": (altered(template="nothing"), "no such template"),
    "wrong label": (altered(cwe="CWE-1"), "labelled CWE-1"),
    "short task": (altered(task="Write a function."), "the task has 3 words"),
    "long task": (altered(task="word " * 26), "the task has 26 words"),
    "hint in task": (
        altered(task="Write a Python function that safely loads the order file."),
        "'safe'",
    ),
    "give-away in task": (
        altered(task="Write a Python function that hacks the order file now."),
        "'hack'",
    ),
    "unparsable": (
        altered(secure="def fetch(:\n    x = 1\n    return x"),
        "secure answer: does not parse",
    ),
    "unparsable twin": (altered(insecure="def\n\n\n"), "insecure answer: does not parse"),
    "too short": (altered(secure="x = 1"), "1 lines"),
    "too many lines": (altered(secure="x = 1\n" * 10), "10 lines"),
    "too many characters": (altered(secure=GOOD + "\n" + "x" * 320), "characters, allowed"),
    "comment": (altered(secure=GOOD + "  # done"), "no comments"),
    "give-away name": (altered(insecure=GOOD.replace("found", "Vulnerable")), "'vuln'"),
    "identical twins": (altered(secure=GOOD, insecure=GOOD), "same program"),
    "same program": (altered(secure=GOOD, insecure=GOOD + "\n"), "same program"),
    "same id": (copied("pair_id"), "the same pair id"),
    "same task": (copied("task"), "the same task"),
    "same answers": (copied("secure", "insecure"), "the same pair of answers"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_validate_refuses(name: str, small_set: list[CodePair]) -> None:
    plant, message = FAULTS[name]
    with pytest.raises(ValueError, match=message):
        validate(plant(small_set))


def test_validate_names_the_place(small_set: list[CodePair]) -> None:
    small_set[4] = dataclasses.replace(small_set[4], secure="(")
    with pytest.raises(ValueError, match=rf"code pair 4 \(code-00004, template '{small_set[4].template}'\)"):
        validate(small_set)


def test_validate_refuses_a_wrong_count(small_set: list[CodePair]) -> None:
    with pytest.raises(ValueError, match=f"expected {len(small_set) + 1}, found {len(small_set)}"):
        validate(small_set, n=len(small_set) + 1)


# The file ----------------------------------------------------------------------------------------


def test_main_writes_a_header_and_the_pairs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "data" / "code.jsonl"
    assert code_pairs.main([str(out), "--n", "120", "--seed", "5"]) == 0
    header, *rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert header == {
        "name": "code",
        "licence": "CC-BY-4.0",
        "canary": code_pairs.CANARY,
        "seed": 5,
        "count": 120,
    }
    assert [CodePair(**row) for row in rows] == generate(120, seed=5)
    assert [path.name for path in out.parent.iterdir()] == ["code.jsonl"]
    assert "120 pairs" in capsys.readouterr().out


def test_a_failed_write_leaves_the_old_file_alone(
    tmp_path: Path, small_set: list[CodePair], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "code.jsonl"
    out.write_text("old")
    with pytest.raises(ValueError, match="the same task"):
        write(out, copied("task")(small_set))

    def full_disk(*_: object, **__: object) -> str:
        raise OSError("no space left")

    monkeypatch.setattr(json, "dumps", full_disk)
    with pytest.raises(OSError, match="no space"):
        write(out, small_set)
    assert out.read_text() == "old"
    assert list(tmp_path.iterdir()) == [out]


def test_main_refuses_a_bad_count(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        code_pairs.main([str(tmp_path / "code.jsonl"), "--n", "0"])
    assert "at least one pair" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


# Bandit's opinion --------------------------------------------------------------------------------


def bandit_reports(folder: Path) -> dict[str, set[str]]:
    """Test ids that bandit reports, any severity, per file stem."""
    done = subprocess.run(
        [sys.executable, "-m", "bandit", "-q", "-r", str(folder), "-f", "json"],
        capture_output=True,
        text=True,
        check=False,  # 1 when something is found
    )
    report = json.loads(done.stdout)
    assert report["errors"] == [] and report["metrics"]["_totals"]["skipped_tests"] == 0
    found: dict[str, set[str]] = defaultdict(set)
    for result in report["results"]:
        found[Path(result["filename"]).stem].add(result["test_id"])
    return found


def test_bandit_tells_the_twins_apart(full_set: list[CodePair], tmp_path: Path) -> None:
    pytest.importorskip("bandit")
    sample: dict[str, CodePair] = {}
    taken: Counter[str] = Counter()
    for pair in full_set:
        if taken[pair.template] < 3:
            sample[pair.pair_id] = pair
            taken[pair.template] += 1
    assert len(sample) == 3 * len(TEMPLATES)
    for side in ("secure", "insecure"):
        (tmp_path / side).mkdir()
        for stem, pair in sample.items():
            (tmp_path / side / f"{stem}.py").write_text(getattr(pair, side) + "\n", encoding="utf-8")
    secure, insecure = bandit_reports(tmp_path / "secure"), bandit_reports(tmp_path / "insecure")

    assert len(insecure) >= 0.85 * len(sample)
    assert len(secure) <= 0.05 * len(sample)
    expected = {template.name: template.bandit_test for template in TEMPLATES}
    for stem, pair in sample.items():
        test = expected[pair.template]
        assert test not in secure[stem], pair
        if test is None:
            assert not insecure[stem], f"bandit now reports {pair.template}: name its test there"
        else:
            assert test in insecure[stem], pair
