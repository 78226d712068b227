"""The executor with real worker processes and tiny stages."""

import contextlib
import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from candor.errors import UserError
from evaluate.cluster_folder import claim, new_folder, write
from evaluate.crew import Machine, locked
from evaluate.executor import Executor
from evaluate.stages import Changed, Records, Stage, check_plan
from train.claim import claim_path, claimed

# A stage that adds a line to a journal, copies its inputs' text and marks its folder complete.
MODULE = """
import json, os, sys, time
from pathlib import Path
import yaml
from candor.errors import UserError

def main(argv):
    config = yaml.safe_load(Path(argv[0]).read_text())
    output = Path(config["output"])
    journal = Path(config["journal"])
    def note(word):
        with journal.open("a") as file:
            file.write(f"{word} {output.name} {os.getpid()}\\n")
    note("begin")
    print("hello from", output.name, flush=True)
    os.system("echo a child speaks")
    kind = config.get("kind", "")
    if kind == "user":
        raise UserError("the file x.yaml lacks a key")
    if kind == "bug":
        raise RuntimeError("a broken invariant")
    if kind == "exit":
        sys.exit("usage: nothing")
    if kind == "full":
        raise OSError(28, "No space left on device", str(output))
    if kind == "edit":  # somebody edits an input while the stage runs
        Path(config["edits"]).write_text("edited")
    if kind == "silent":
        return
    if kind == "die" and not Path(config["once"]).exists():
        Path(config["once"]).touch()
        os.kill(os.getpid(), 9)
    if "meet" in config:  # another stage that must begin while this one runs
        end = time.monotonic() + 60
        while f"begin {config['meet']} " not in journal.read_text():
            assert time.monotonic() < end, "they never met"
            time.sleep(0.02)
    time.sleep(config.get("sleep", 0))
    output.mkdir(parents=True, exist_ok=True)
    text = config.get("say", output.name) + "".join(Path(p, "out.txt").read_text() for p in config["inputs"])
    (output / "out.txt").write_text(text)
    (output / "manifest.json").write_text(json.dumps({"pid": os.getpid(), "time": time.time()}))
    note("end")
"""


@pytest.fixture
def house(tmp_path, monkeypatch) -> Path:
    """A folder whose module fakestage workers can import."""
    (tmp_path / "fakestage.py").write_text(MODULE)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(Path.cwd())]))
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def stage(house: Path, name: str, *after: str, minutes: float = 1.0, run: str = "run", remake=False, **config) -> Stage:
    folder = house / run
    inputs = tuple(folder / a for a in after)
    return Stage(
        id=name,
        module="fakestage",
        config={
            "output": str(folder / name),
            "journal": str(house / "journal"),
            "inputs": [str(i) for i in inputs],
            **config,
        },
        inputs=inputs,
        outputs=(folder / name,),
        after=after,
        minutes=minutes,
        remake=remake,
    )


def run(
    house: Path, stages: list[Stage], *, workers: int = 1, folder: str = "run", memory_gb: float = 8.0
) -> list[str]:
    check_plan(stages)
    lines: list[str] = []
    Executor(stages, house / folder, Machine(workers, memory_gb), lines.append).execute()
    return lines


def journal(house: Path) -> list[list[str]]:
    path = house / "journal"
    return [line.split() for line in path.read_text().splitlines()] if path.exists() else []


def outputs(house: Path, folder: str = "run") -> dict[str, str]:
    return {p.parent.name: p.read_text() for p in (house / folder).glob("*/out.txt")}


def diamond(house: Path, **options) -> list[Stage]:
    return [
        stage(house, "a", **options),
        stage(house, "short", "a", minutes=1, **options),
        stage(house, "long", "a", minutes=2, **options),
        stage(house, "last", "long", minutes=9, **options),
        stage(house, "both", "short", "last", **options),
    ]


def test_only_stages_that_are_still_to_run_need_their_gpus(house):
    """A finished GPU study is reported again without one; what has to run is refused before anything."""

    def make(*, gpus: tuple[str, ...] = (), more: tuple[Stage, ...] = ()) -> None:
        first = stage(house, "questions", remake=True)
        stages = [first, replace(stage(house, "sample", "questions"), gpus=1), stage(house, "report", "sample"), *more]
        Executor(stages, house / "run", Machine(1, 8.0, gpus), lambda line: None).execute()

    with pytest.raises(UserError, match=r"sample needs 1 GPUs; this machine shows 0.*CUDA_VISIBLE_DEVICES"):
        make()
    assert journal(house) == []
    make(gpus=("0",))
    (house / "run" / "report" / "manifest.json").unlink()
    make()
    (house / "run" / "questions" / "manifest.json").unlink()  # made again alike, so that the sample is done still
    make()
    assert [line[1] for line in journal(house) if line[0] == "end"].count("sample") == 1
    with pytest.raises(UserError, match="later needs 2 GPUs"):
        make(more=(replace(stage(house, "later"), gpus=2),))
    (house / "run" / "sample" / "manifest.json").unlink()  # it has a record, but must run
    with pytest.raises(UserError, match="sample: sample needs 1 GPUs"):
        make()


def test_a_checkpoint_that_training_never_reached_is_that_stage_s_failure(house):
    """Its input is not there although the stage that makes it is done: said, with the steps there were; no crash."""
    train = stage(house, "train")
    late = replace(
        stage(house, "late", "train"), inputs=(house / "run/train/checkpoints/step-000040/adapter.safetensors",)
    )
    run(house, [train])
    manifest = house / "run" / "train" / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "steps": 30}))
    message = "late: .*step-000040 is not there: this training ended after 30 steps"
    for _ in range(2):
        with pytest.raises(UserError, match=message):
            run(house, [train, late])
    gone = replace(late, inputs=(house / "run/train/other.parquet",))
    with pytest.raises(UserError, match=r"late: its input .*other\.parquet is not there"):
        run(house, [train, gone])


def test_order_sharing_and_a_second_run_that_does_nothing(house):
    lines = run(house, diamond(house))
    ended = [name for word, name, _ in journal(house) if word == "end"]
    assert ended == ["a", "long", "last", "short", "both"]  # the longest chain first
    assert len({pid for _, _, pid in journal(house)}) == 1  # one process ran them all
    assert lines[-1].startswith("[5/5] both ... 0 s") and "left" in lines[0]
    log = (house / "run" / "logs" / "a.log").read_text()
    assert "python -m fakestage" in log and "hello from a" in log and "a child speaks" in log
    assert outputs(house)["both"] == "bothshortalastlonga"

    before = len(journal(house))
    again = run(house, diamond(house))
    assert again == ["5 of 5 stages are done already"] and len(journal(house)) == before


def test_the_schedule_does_not_change_the_outputs(house):
    run(house, diamond(house))
    run(house, diamond(house, run="other"), workers=3, folder="other")
    assert outputs(house) == outputs(house, "other")


def test_workers_run_side_by_side_but_not_past_memory(house):
    meeting = [stage(house, "x", run="wide", meet="y"), stage(house, "y", run="wide", meet="x")]
    run(house, meeting, workers=2, folder="wide")
    (house / "journal").unlink()
    alone = [stage(house, "x", run="narrow", sleep=0.1), stage(house, "y", run="narrow", sleep=0.1)]
    run(house, alone, workers=2, folder="narrow", memory_gb=1.5)
    assert [word for word, _, _ in journal(house)] == ["begin", "end", "begin", "end"]


def test_a_persons_error_stops_what_follows_and_lets_others_finish(house):
    stages = [
        stage(house, "bad", kind="user", minutes=5),
        stage(house, "other", sleep=0.5, minutes=4),
        stage(house, "after", "bad"),
    ]
    with pytest.raises(UserError) as error:
        run(house, stages, workers=2)
    assert str(error.value) == "bad: the file x.yaml lacks a key\n1 more stages were not run."
    assert outputs(house) == {"other": "other"} and Records(house / "run").is_done(stages[1])


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("bug", r"RuntimeError: a broken invariant\n  the end of .*bad.log:(.*\n)*.*hello from bad(.*\n)*.*Traceback"),
        ("exit", "SystemExit: usage: nothing"),
        ("full", r"^bad: .*run/bad: No space left on device. Check the path, the free space and the rights.$"),
        ("silent", "ended without an error but did not write .*bad"),
    ],
)
def test_other_failures_show_the_log(house, kind, told):
    with pytest.raises(UserError, match=told):
        run(house, [stage(house, "bad", kind=kind)])


def test_a_killed_worker_fails_its_stage_and_a_rerun_continues(house):
    stages = [stage(house, "a"), stage(house, "b", "a", kind="die", once=str(house / "once")), stage(house, "c", "b")]
    with pytest.raises(
        UserError, match=r"b: its worker process \d+ was killed by SIGKILL .*Run the same command again"
    ):
        run(house, stages)
    run(house, stages)
    assert outputs(house) == {"a": "a", "b": "ba", "c": "cba"}
    assert [n for w, n, _ in journal(house) if w == "end"] == ["a", "b", "c"]


SCRIPT = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_executor import diamond, run
house = Path({house!r})
try:
    run(house, diamond(house, sleep={sleep}), workers=2)
except KeyboardInterrupt:
    sys.exit(130)
"""


def start(house: Path, sleep: float) -> subprocess.Popen:
    code = SCRIPT.format(tests=str(Path(__file__).parent), house=str(house), sleep=sleep)
    # a shell that starts the tests in the background leaves SIGINT ignored, which a child would inherit
    return subprocess.Popen(
        [sys.executable, "-c", code], preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    )


def wait_for(house: Path, word: str, name: str) -> int:
    """The process in which a stage began or ended."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        for found, stage_name, pid in journal(house):
            if (found, stage_name) == (word, name):
                return int(pid)
        time.sleep(0.02)
    raise AssertionError(f"{name} did not {word}: {journal(house)}")


def gone(pid: int) -> bool:
    """Whether a process ended (a zombie counts: in a container nobody may collect it)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except OSError:
        return True


@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGINT])
def test_a_stopped_executor_takes_its_workers_along_and_a_rerun_continues(house, stop):
    process = start(house, 0.7)
    worker = wait_for(house, "begin", "long")
    process.send_signal(stop)
    assert process.wait(timeout=60) == (-signal.SIGKILL if stop == signal.SIGKILL else 130)
    deadline = time.monotonic() + 20
    while not gone(worker) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert gone(worker)
    (house / "journal").unlink()
    run(house, diamond(house, sleep=0.7), workers=2)
    assert "a" not in [name for _, name, _ in journal(house)]
    assert outputs(house)["both"] == "bothshortalastlonga"


ORPHAN = """
import os, sys, time
while os.getppid() == int(sys.argv[1]):
    time.sleep(0.02)
from evaluate.worker import main
main(sys.argv[1:])
"""


def test_a_worker_whose_executor_died_before_it_looked_leaves_at_once(house):
    config = {"output": str(house / "late"), "journal": str(house / "journal"), "inputs": [], "sleep": 60}
    (house / "c.yaml").write_text(json.dumps(config))
    task = {"module": "fakestage", "config": str(house / "c.yaml"), "log": str(house / "log")}
    source, sink = os.pipe()
    os.write(sink, json.dumps(task).encode() + b"\n")
    executor = (
        "import os, subprocess, sys; print(subprocess.Popen([sys.executable, '-c', sys.argv[1], str(os.getpid())], "
        "stdin=int(sys.argv[2]), start_new_session=True, stdout=subprocess.DEVNULL).pid)"
    )
    command = [sys.executable, "-c", executor, ORPHAN, str(source)]
    worker = int(subprocess.run(command, pass_fds=(source,), check=True, capture_output=True, text=True).stdout)
    deadline = time.monotonic() + 30
    while not gone(worker) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert gone(worker)
    os.close(source)
    os.close(sink)


def test_an_input_edited_while_its_stage_runs_counts_as_changed(house):
    (house / "notes").mkdir()
    file = house / "notes" / "out.txt"
    file.write_text("before")
    edited = replace(stage(house, "a", kind="edit", edits=str(file)), inputs=(house / "notes",))
    run(house, [edited])
    with pytest.raises(UserError, match=r"a: finished earlier with other inputs .*out.txt"):
        run(house, [edited])


def test_a_second_executor_is_refused(house):
    with (
        locked(house / "run"),
        pytest.raises(UserError, match=f"in use by another executor \\(process {os.getpid()}\\)"),
    ):
        run(house, diamond(house))
    run(house, diamond(house))


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK])
def test_a_second_executor_is_refused_on_a_file_system_without_flock(house, monkeypatch, number):
    def no_flock(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", no_flock)
    with (
        locked(house / "run"),
        pytest.raises(UserError, match=f"run is being made by process {os.getpid()} on"),
        locked(house / "run"),
    ):
        pass
    with locked(house / "run"):
        assert (house / "run" / "lock").read_text() == f"{os.getpid()}\n"
    assert not claim_path(house / "run").exists()


def test_a_changed_config_is_refused_and_named(house):
    run(house, [stage(house, "a"), stage(house, "b", "a")])
    changed = [stage(house, "a", say="new"), stage(house, "b", "a")]
    with pytest.raises(UserError, match=r"a: finished earlier with other config keys say .*\nChoose another folder"):
        run(house, changed)
    assert outputs(house)["a"] == "a"
    # deleting the output makes it anew; what was made from it is then refused in its turn
    (house / "run" / "a" / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"b: finished earlier with other inputs .*run/a/out.txt|RUN/a/out.txt"):
        run(house, changed)
    (house / "run" / "b" / "manifest.json").unlink()
    run(house, changed)
    assert outputs(house) == {"a": "new", "b": "bnew"}


def test_an_output_made_again_alike_leaves_the_rest_done(house):
    stages = [stage(house, "a"), stage(house, "b", "a")]
    run(house, stages)
    (house / "run" / "a" / "manifest.json").unlink()
    lines = run(house, stages)
    assert [n for w, n, _ in journal(house) if w == "end"] == ["a", "b", "a"]
    assert "b ... was done" in lines[-1]


def test_cheap_stages_are_made_anew(house):
    run(house, [stage(house, "a", remake=True)])
    run(house, [stage(house, "a", remake=True, say="new")])
    assert outputs(house)["a"] == "new"


def test_a_stage_that_grows_runs_again_and_any_other_change_is_refused(house):
    (house / "list").write_text("one")

    def growing(**config):
        made = stage(house, "a", asks=str(house / "list"), **config)
        return [replace(made, inputs=(house / "list", house / "journal.0"), grows=("asks", "n"))]

    (house / "journal.0").write_text("")
    run(house, growing(n=1))
    assert run(house, growing(n=1)) == ["1 of 1 stages are done already"]
    run(house, growing(n=2))
    (house / "list").write_text("one, two")
    run(house, growing(n=2))
    assert [line[0] for line in journal(house)].count("begin") == 3
    with pytest.raises(UserError, match="a: finished earlier with other config keys say"):
        run(house, growing(n=3, say="new"))
    (house / "journal.0").write_text("another file")
    with pytest.raises(UserError, match=r"other inputs .*journal\.0 \("):
        run(house, growing(n=2))


def test_a_run_folder_may_be_moved(house):
    run(house, diamond(house))
    (house / "run").rename(house / "moved")
    assert run(house, diamond(house, run="moved"), folder="moved") == ["5 of 5 stages are done already"]


def test_what_no_machine_offers_is_refused_at_once(house):
    with pytest.raises(UserError, match="a needs 2 GPUs; this machine shows 0"):
        run(house, [replace(stage(house, "a"), gpus=2)])


def test_a_stage_with_gpus_gets_them_and_a_process_of_its_own(house):
    stages = [replace(stage(house, name), gpus=1) for name in ("x", "y")]
    Executor(stages, house / "run", Machine(1, 8.0, ("3",)), lambda line: None).execute()
    assert len({pid for _, _, pid in journal(house)}) == 2


def test_records_tell_a_touched_file_from_a_changed_one(house):
    stages = [stage(house, "a"), stage(house, "b", "a")]
    run(house, stages)
    records, file = Records(house / "run"), house / "run" / "a" / "out.txt"
    os.utime(file, (1, 1))
    assert records.is_done(stages[1])
    file.write_text("x")
    with pytest.raises(Changed, match=r"inputs RUN/a/out\.txt"):
        records.is_done(stages[1])


def test_a_run_that_jobs_of_a_cluster_work_on_is_left_alone(house):
    """Their claims say so; one that has given no sign of life for two minutes holds nobody up."""
    with claimed(claim(house / "run", "a"), wait=False):
        with pytest.raises(UserError, match="in use by jobs of a cluster, which make a"):
            run(house, [stage(house, "a")])
        assert journal(house) == []
        path = claim_path(claim(house / "run", "a"))
        os.utime(path, (time.time() - 200, time.time() - 200))
        run(house, [stage(house, "a")])
    assert set(outputs(house)) == {"a"}


def test_jobs_that_start_while_a_run_goes_on_here_make_no_stage_twice(house):
    """One waits for a stage that runs here, and finds it done; what another took up before is left to it."""
    place = house / "run"
    submission = new_folder(place)
    for name in ("elements", "ids"):
        write(submission / f"{name}.json", {})
    stages = [stage(house, "a", sleep=1), stage(house, "b", "a"), stage(house, "c", "b")]
    found: list[bool] = []
    with contextlib.ExitStack() as job:

        def come() -> None:
            while ["begin", "a"] not in [line[:2] for line in journal(house)]:
                time.sleep(0.02)
            with claimed(claim(place, "a"), wait=True):
                found.append(Records(place).is_done(stages[0]))

        def say(line: str) -> None:
            if "a ..." in line:
                job.enter_context(claimed(claim(place, "b"), wait=False))

        other = threading.Thread(target=come)
        other.start()
        with pytest.raises(UserError, match=r"b: .*claims/b is being made by process"):
            Executor(stages, place, Machine(1, 8.0), say).execute()
        other.join()
    assert found == [True]
    assert [line[:2] for line in journal(house)] == [["begin", "a"], ["end", "a"]]
    run(house, stages)
    assert set(outputs(house)) == {"a", "b", "c"}
