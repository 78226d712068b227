"""What one element of an array does around its stage. Needs no Slurm."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from evaluate.cluster_element import DONE, FAILED, REQUEUE, Element
from evaluate.cluster_folder import new_folder, read_marks, read_state, write, write_jobs, write_marks
from evaluate.cluster_jobs import Job, Needs
from evaluate.stages import Stage
from train import claim

# Takes a claim as on another machine, and dies without a word.
DIES = """
import os, socket, sys
from pathlib import Path
socket.gethostname = lambda: "elsewhere"
from train import claim
claim.LEASE_SECONDS = 2.0
with claim.claimed(Path(sys.argv[1]), wait=False):
    os._exit(9)
"""


def element(tmp_path: Path, launcher: list[str]) -> Element:
    """One fine-tuning in several processes, started by ``launcher``."""
    run, needs = tmp_path / "run", Needs(cores=1, gpus=0, memory_gb=1.0, minutes=10, wanted=10)
    stage = Stage(id="train-a", module="train.sft", config={}, inputs=(), outputs=(run / "made.json",))
    folder = new_folder(run)
    about = {"run": str(run), "requeues": 5, "signal_seconds": 30, "cores": {"train-1": 1}, "launcher": launcher}
    write(folder / "about.json", about)
    write_jobs(folder, [Job("train-1", "train", needs, {0: (stage,)})])
    write_marks(folder, {})
    return Element(folder, "train-1", 0)


def test_several_processes_start_when_the_claim_of_a_dead_node_is_over(tmp_path, monkeypatch):
    """They do not wait for it themselves: the stage would fail, although its node's death should cost time only."""
    monkeypatch.setattr(claim, "LEASE_SECONDS", 2.0)
    made = tmp_path / "run" / "made.json"
    path = claim.claim_path(made)
    made.parent.mkdir()
    assert subprocess.run([sys.executable, "-c", DIES, str(made)]).returncode == 9 and path.exists()
    started = time.monotonic()
    assert element(tmp_path, ["bash", "-c", f"test ! -e {path} && touch {made}"]).execute() == DONE
    assert time.monotonic() - started >= 2


@pytest.mark.parametrize(
    ("says", "why"),
    [
        ("echo error: no step was taken. >&2; echo more >&2", "no step was taken."),
        ("echo Traceback >&2", "bash ended with status 2 (the end of"),
    ],
    ids=["a-person's-mistake", "a-bug"],
)
def test_why_several_processes_failed_is_told_in_their_words(tmp_path, says, why):
    assert element(tmp_path, ["bash", "-c", f"{says}; exit 2"]).execute() == FAILED
    state = read_state(tmp_path / "run", "train-a")
    assert state is not None and state.why.startswith(why)


def test_large_inputs_are_hashed_in_turns_and_none_twice(tmp_path, monkeypatch):
    """The second one has no end before the time is over; the first is kept, and it is not tried without end."""
    run, needs = tmp_path / "run", Needs(cores=1, gpus=0, memory_gb=1.0, minutes=10, wanted=10)
    first, second = tmp_path / "first", tmp_path / "second"
    first.write_text("a model")
    os.mkfifo(second)
    folder = new_folder(run)
    write(folder / "about.json", {"run": str(run), "large": [str(first), str(second)], "requeues": 1})
    write_jobs(folder, [Job("prepare", "prepare", needs, {0: ()})])
    write_marks(folder, {})
    threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGUSR1)).start()
    assert Element(folder, "prepare", 0).execute() == REQUEUE
    assert list(read_marks(folder)) == [first]
    with monkeypatch.context() as patch:
        patch.setenv("SLURM_RESTART_COUNT", "4")
        assert Element(folder, "prepare", 0).execute() == FAILED
    first.unlink()  # or it would be read again
    second.unlink()
    second.write_text("another")
    assert Element(folder, "prepare", 0).execute() == DONE
    assert set(read_marks(folder)) == {first, second}


@pytest.mark.parametrize(
    ("number", "ends", "status"),
    [
        pytest.param(signal.SIGUSR1, 0, 0, id="done-in-time"),
        pytest.param(signal.SIGUSR1, 75, 75, id="saved"),
        pytest.param(signal.SIGUSR1, 1, 75, id="saved-behind-a-launcher"),
        pytest.param(signal.SIGTERM, 1, 1, id="ended-by-slurm"),
    ],
)
def test_what_is_told_that_its_time_is_over_asks_for_another_turn(tmp_path, number, ends, status):
    """The shell hands the signal on, and ends with 75, upon which a job is requeued."""
    ready = tmp_path / "ready"
    work = f"trap 'exit {ends}' {number.name}; touch {ready}; while :; do sleep 0.05; done"
    shell = subprocess.Popen(
        ["bash", "-c", 'source scripts/slurm/lib.sh; run_requeueable bash -c "$1"; exit $?', "job", work],
        env={"PATH": os.environ["PATH"]},  # no SLURM_JOB_ID
    )
    while not ready.exists():
        assert shell.poll() is None
        time.sleep(0.05)
    shell.send_signal(number)
    assert shell.wait(timeout=30) == status


@pytest.mark.parametrize(
    ("array", "named"), [({}, "12"), ({"SLURM_ARRAY_JOB_ID": "12", "SLURM_ARRAY_TASK_ID": "3"}, "12_3")]
)
def test_an_element_with_the_number_of_its_array_requeues_itself_alone(tmp_path, array, named):
    """Any array has one: its last element, whose siblings would be ended and the finished ones run again."""
    asked, scontrol = tmp_path / "asked", tmp_path / "scontrol"
    scontrol.write_text(f'#!/bin/sh\necho "$*" >{asked}\nexit 1\n')  # refuses, or 60 s would be waited for the end
    scontrol.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "12", **array}
    words = ["bash", "-c", 'source scripts/slurm/lib.sh; run_requeueable bash -c "exit 75"']
    subprocess.run(words, env=environment, check=False)
    assert asked.read_text() == f"requeue {named}\n"
