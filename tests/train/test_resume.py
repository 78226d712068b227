"""kill -9 anywhere: a rerun continues and ends in the very same bytes; two processes never train one stage.

Children are forked from this process, which has the libraries loaded already, and really killed.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from candor.errors import UserError
from candor.manifest import read_manifest
from train import claim, lineage, saving, tuning, unfinished
from train.claim import claimed
from train.lineage import ADAPTER
from train.sft import main
from train.unfinished import last_state, partial_folder

ROOT = Path(__file__).parents[2]
LORA: dict[str, Any] = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.1, "target_modules": ["o_proj", "down_proj"]}
# 10 rows in batches of 3: epochs of 4 steps, so that kills fall inside epochs and between them
SFT: dict[str, Any] = {"per_device_train_batch_size": 3, "num_train_epochs": 4, "learning_rate": 1e-2}
SLOW = {**SFT, "num_train_epochs": 100_000}


@pytest.fixture
def stage(config_file) -> Callable[..., list[str]]:
    """Arguments of main for a stage with dropout, states every 3 steps and adapters kept every 5."""

    def make(output: Path, **changes: Any) -> list[str]:
        common = {"lora": LORA, "sft": SFT, "resume_every": 3, "checkpoint_every": 5}
        return [str(config_file(output_dir=str(output), **{**common, **changes}))]

    return make


def in_child(work: Callable[[], None]) -> int:
    """Run in a forked process; its exit status, negative for the signal that ended it."""
    pid = start_child(work)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Any:
    """A forked child waits forever for the threads of a pool that its parent had started."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def start_child(work: Callable[[], None]) -> int:
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        work()
        status = 0
    except UserError as error:
        os.write(2, f"error: {error}\n".encode())
        status = 2
    finally:
        os._exit(status)


def die(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def die_after(calls: int, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, but the process is killed when it is called once more than ``calls`` times."""
    count = 0

    def counting(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        if count > calls:
            die()
        return function(*args, **kwargs)

    return counting


def half_write(function: Callable[..., Any]) -> Callable[..., Any]:
    """Saves, cuts the file in half and dies, as a kill in the middle of writing does."""

    def halving(value: Any, path: Any, *args: Any, **kwargs: Any) -> None:
        function(value, path, *args, **kwargs)
        size = os.path.getsize(path)
        os.truncate(path, size // 2)
        die()

    return halving


def content(folder: Path) -> dict[str, Any]:
    """What must be equal: every file's bytes, but for times in logs and manifests."""
    found: dict[str, Any] = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = path.relative_to(folder).as_posix()
        if path.name == "manifest.json":
            record = json.loads(path.read_text())
            timed = ("seconds", "seconds_by_part", "finished", "tokens_per_second", "resumed_at")
            found[name] = {k: v for k, v in record.items() if k not in timed}
        elif path.suffix == ".jsonl":
            rows = [json.loads(line) for line in path.read_text().splitlines()]
            found[name] = [{k: v for k, v in row.items() if k != "tokens_per_second"} for row in rows]
        elif path.name == "adapter_config.json":  # PEFT writes the names of modules in any order
            config = json.loads(path.read_text())
            found[name] = {k: sorted(v) if isinstance(v, list) else v for k, v in config.items()}
        else:
            found[name] = path.read_bytes()
    return found


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict[str, Any]:
    """Filled by the first test: the content of the run that was never killed, by mode."""
    return {}


KILLS = {
    "before-the-first-state": lambda m: m.setattr(tuning.Log, "on_log", die_after(2, tuning.Log.on_log)),
    "in-an-epoch": lambda m: m.setattr(tuning.Log, "on_log", die_after(7, tuning.Log.on_log)),
    "right-after-an-epoch": lambda m: m.setattr(tuning.Log, "on_log", die_after(8, tuning.Log.on_log)),
    "while-writing-a-state": lambda m: m.setattr(torch, "save", half_write(torch.save)),
    "before-a-state-is-marked": lambda m: m.setattr("train.callbacks.mark_whole", die_after(1, unfinished.mark_whole)),
    "while-keeping-an-adapter": lambda m: m.setattr(saving, "write_manifest", die_after(1, saving.write_manifest)),
    "while-writing-the-adapter": lambda m: m.setattr(lineage, "model_card", die_after(4, lineage.model_card)),
    "before-the-manifest": lambda m: m.setattr(tuning, "write_manifest", die),
    "before-the-folder-gets-its-name": lambda m: m.setattr(unfinished, "finish", die),
}
FAST = ("in-an-epoch", "while-writing-a-state", "before-the-folder-gets-its-name")
MOMENTS = [pytest.param(name, marks=() if name in FAST else pytest.mark.full) for name in KILLS]


def uninterrupted(whole: dict[str, Any], tmp_path: Path, make: Any, **changes: Any) -> dict[str, Any]:
    key = changes.get("mode", "first")
    if key not in whole:
        main(make(tmp_path / "adapter", **changes))
        whole[key] = content(tmp_path / "adapter")
        shutil.rmtree(tmp_path / "adapter")
    return whole[key]


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_stage_ends_as_if_it_had_never_stopped(tmp_path, stage, whole, monkeypatch, moment):
    wanted = uninterrupted(whole, tmp_path, stage)
    arguments = stage(tmp_path / "adapter")

    def killed() -> None:
        KILLS[moment](monkeypatch)
        main(arguments)

    assert in_child(killed) == -signal.SIGKILL
    assert not (tmp_path / "adapter").exists()
    state = last_state(partial_folder(tmp_path / "adapter"))
    main(arguments)
    record = read_manifest(tmp_path / "adapter")
    assert record is not None
    expected = int(state.name.rpartition("-")[2]) if state else None
    if moment != "before-the-folder-gets-its-name":
        assert record["resumed_at"] == expected
    assert content(tmp_path / "adapter") == wanted
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


@pytest.mark.full
@pytest.mark.parametrize("mode", ["continue", "stack", "merge"])
def test_a_killed_second_stage_too(tmp_path, stage, stage_one, other_data, whole, monkeypatch, mode):
    lora = None if mode == "continue" else LORA
    changes = {"adapter": str(stage_one), "mode": mode, "lora": lora, "data": str(other_data), "stage": "realigned"}
    wanted = uninterrupted(whole, tmp_path, stage, **changes)

    def killed() -> None:
        KILLS["in-an-epoch"](monkeypatch)
        main(stage(tmp_path / "adapter", **changes))

    assert in_child(killed) == -signal.SIGKILL
    main(stage(tmp_path / "adapter", **changes))
    assert content(tmp_path / "adapter") == wanted


def kill_in_an_epoch(stage: Any, output: Path, monkeypatch: Any) -> Path:
    """Leave the folder of a stage killed at step 8, with a state of step 6."""
    arguments = stage(output)

    def killed() -> None:
        KILLS["in-an-epoch"](monkeypatch)
        main(arguments)

    assert in_child(killed) == -signal.SIGKILL
    return partial_folder(output)


def test_a_damaged_state_is_not_continued(tmp_path, stage, whole, monkeypatch):
    """The mark names sizes and hashes: a file that a crash of the machine cut or emptied is noticed."""
    wanted = uninterrupted(whole, tmp_path, stage)
    folder = kill_in_an_epoch(stage, tmp_path / "adapter", monkeypatch)
    state = last_state(folder)
    assert state is not None
    assert state.name == "checkpoint-6"
    weights = bytearray((state / ADAPTER).read_bytes())
    weights[-1] ^= 1
    (state / ADAPTER).write_bytes(weights)
    assert last_state(folder) is None
    main(stage(tmp_path / "adapter"))
    record = read_manifest(tmp_path / "adapter")
    assert record is not None
    assert record["resumed_at"] is None
    assert content(tmp_path / "adapter") == wanted


def test_a_changed_stage_begins_anew_and_says_so(tmp_path, stage, monkeypatch, capsys):
    kill_in_an_epoch(stage, tmp_path / "adapter", monkeypatch)
    main(stage(tmp_path / "adapter", seed=9))
    assert "begun anew" in capsys.readouterr().err
    record = read_manifest(tmp_path / "adapter")
    assert record is not None
    assert record["resumed_at"] is None


def test_another_number_of_processes_is_refused(tmp_path, stage, monkeypatch):
    kill_in_an_epoch(stage, tmp_path / "adapter", monkeypatch)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="was begun with 1 processes, now there are 2"):
        main(stage(tmp_path / "adapter"))


def test_an_interrupted_stage_leaves_nothing_when_it_has_no_state(tmp_path, stage, monkeypatch):
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(tuning.Log, "on_log", interrupt)
    with pytest.raises(KeyboardInterrupt):
        main(stage(tmp_path / "adapter"))
    assert [p.name for p in tmp_path.iterdir()] == ["stage.yaml"]


@pytest.mark.full
def test_kill_9_of_a_script_of_its_own(tmp_path, stage, whole):
    """The same without forks: python -m train.sft, killed from outside at any moment, run again."""
    wanted = uninterrupted(whole, tmp_path, stage)
    command = [sys.executable, "-m", "train.sft", *stage(tmp_path / "adapter")]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    process = subprocess.Popen(command, env=env, cwd=ROOT)
    deadline = time.monotonic() + 600  # seconds; only a machine in trouble comes near
    while last_state(partial_folder(tmp_path / "adapter")) is None and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "adapter").exists()
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert content(tmp_path / "adapter") == wanted


# Two processes, one stage ---------------------------------------------------------------------------


def test_two_processes_that_want_one_stage_train_it_once(tmp_path, stage, monkeypatch):
    arguments = stage(tmp_path / "adapter")
    trained = tmp_path / "trained"
    original = tuning.fine_tune

    def counted(*args: Any, **kwargs: Any) -> bool:
        with trained.open("a") as file:
            file.write(f"{os.getpid()}\n")
        return original(*args, **kwargs)

    monkeypatch.setattr(tuning, "fine_tune", counted)
    children = [start_child(lambda: main(arguments)) for _ in range(3)]
    assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children] == [0, 0, 0]
    assert len(trained.read_text().splitlines()) == 1
    assert (tmp_path / "adapter" / "manifest.json").is_file()


@pytest.mark.parametrize("renamed", ["not yet", "meanwhile"])
def test_every_process_sees_that_a_whole_adapter_only_waits_for_its_name(tmp_path, stage, monkeypatch, renamed):
    """Killed before the renaming, run again: one that still trained would wait for ever for the first, which ended."""
    arguments, folder = stage(tmp_path / "adapter"), partial_folder(tmp_path / "adapter")
    main(arguments)
    (tmp_path / "adapter").rename(folder)

    def of_the_second(self: Any, *args: Any, **kwargs: Any) -> bool:
        (tmp_path / "adapter").exists() or folder.rename(tmp_path / "adapter")  # by the first, at this very moment
        return original(self, *args, **kwargs)

    original = unfinished.is_whole
    if renamed == "meanwhile":
        monkeypatch.setattr(unfinished, "is_whole", of_the_second)
    monkeypatch.setattr("train.sft._train", lambda *_, **__: pytest.fail("it trains"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    main(arguments)
    monkeypatch.undo()
    main(arguments)
    assert (tmp_path / "adapter" / ADAPTER).is_file() and not folder.exists()


def test_a_dead_holder_is_followed_at_once(tmp_path):
    def hold_and_die() -> None:
        with claimed(tmp_path / "adapter", wait=False):
            die()

    assert in_child(hold_and_die) == -signal.SIGKILL
    assert claim.claim_path(tmp_path / "adapter").exists()
    started = time.monotonic()
    with claimed(tmp_path / "adapter", wait=False):
        pass
    assert time.monotonic() - started < 10
    assert not claim.claim_path(tmp_path / "adapter").exists()


def test_a_live_holder_is_named(tmp_path):
    ready = tmp_path / "ready"

    def hold() -> None:
        with claimed(tmp_path / "adapter", wait=False):
            ready.touch()
            time.sleep(60)

    pid = start_child(hold)
    try:
        while not ready.exists():
            time.sleep(0.01)
        with (
            pytest.raises(UserError, match=f"is being made by process {pid} on"),
            claimed(tmp_path / "adapter", wait=False),
        ):
            pass
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def test_a_claim_left_on_another_machine_is_taken_over_also_by_who_does_not_wait(tmp_path, monkeypatch):
    monkeypatch.setattr(claim, "LEASE_SECONDS", 1.0)
    monkeypatch.setattr(claim, "_POLL_SECONDS", 0.1)
    path = claim.claim_path(tmp_path / "adapter")
    with claimed(tmp_path / "adapter", wait=False):
        left = path.read_text()
    path.write_text(left.replace(f"host={socket.gethostname()}", "host=another"))
    with pytest.raises(UserError, match="on another"), claimed(tmp_path / "adapter", wait=False):
        pass  # it may be alive
    os.utime(path, (time.time() - 5, time.time() - 5))
    with claimed(tmp_path / "adapter", wait=False):
        pass


def test_a_holder_that_gives_no_sign_of_life_loses_its_claim_and_notices(tmp_path, monkeypatch):
    """As a machine that sleeps, or is cut off from the file system: another takes over, the first stops."""
    monkeypatch.setattr(claim, "LEASE_SECONDS", 1.0)
    monkeypatch.setattr(claim, "_POLL_SECONDS", 0.1)
    held, taken = tmp_path / "held", tmp_path / "taken"

    def hold() -> None:
        with claimed(tmp_path / "adapter", wait=False) as check:
            held.touch()
            while not taken.exists():
                time.sleep(0.05)
            for _ in range(200):  # until the thread that gives the signs of life has looked
                time.sleep(0.1)
                check()

    pid = start_child(hold)
    while not held.exists():
        time.sleep(0.01)
    os.kill(pid, signal.SIGSTOP)
    with claimed(tmp_path / "adapter", wait=True) as check:
        taken.touch()
        os.kill(pid, signal.SIGCONT)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 2  # a UserError: it lost its claim
        check()
