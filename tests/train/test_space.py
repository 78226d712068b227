"""A disk that is full, or fills up: told before the first step or when it happens; nothing half-written stays."""

import os
import resource
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from candor.errors import UserError
from candor.manifest import read_manifest
from train import space, tuning
from train.sft import main
from train.unfinished import last_state, partial_folder

SFT: dict[str, Any] = {"per_device_train_batch_size": 3, "num_train_epochs": 4, "learning_rate": 1e-2}


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 700 kB: less than the margin that is asked for, enough for a few states."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=700k", "tmpfs", str(folder)], capture_output=True)
    if done.returncode:
        pytest.skip(f"a file system cannot be mounted here: {done.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_is_too_small_is_told_before_the_first_step(small_disk, config_file, monkeypatch):
    monkeypatch.setattr(tuning.SFTTrainer, "train", lambda *_, **__: pytest.fail("trained"))
    with pytest.raises(UserError, match=r"1\.\d MB are needed \(the adapter, 0 kept on the way, 2 .*0\.7 MB are free"):
        main([str(config_file(output_dir=str(small_disk / "adapter"), sft=SFT, resume_every=3))])
    assert list(small_disk.iterdir()) == []


def test_kept_adapters_count(tmp_path, config_file, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(0, 0, 2_000_000))
    with pytest.raises(UserError, match="1000 kept on the way"):
        main([str(config_file(sft={**SFT, "max_steps": 1000}, checkpoint_every=1))])


def test_a_disk_that_fills_up_is_told_and_the_stage_goes_on_when_there_is_room(small_disk, config_file, monkeypatch):
    path = config_file(output_dir=str(small_disk / "adapter"), sft=SFT, resume_every=3)
    monkeypatch.setattr(space, "check", lambda *_, **__: None)
    original = tuning.Log.on_step_end

    def fill(self: Any, args: Any, state: Any, *rest: Any, **more: Any) -> None:
        original(self, args, state, *rest, **more)
        if state.global_step == 5:  # after the first state
            with (small_disk / "ballast").open("wb") as file:
                file.write(b"x" * (shutil.disk_usage(small_disk).free - 30_000))

    with monkeypatch.context() as patched:
        patched.setattr(tuning.Log, "on_step_end", fill)
        with pytest.raises(UserError, match=r"cannot be written .*run the same command again: it continues"):
            main([str(path)])
    assert not (small_disk / "adapter").exists()
    state = last_state(partial_folder(small_disk / "adapter"))
    assert state is not None
    assert state.name == "checkpoint-3"
    (small_disk / "ballast").unlink()
    main([str(path)])
    record = read_manifest(small_disk / "adapter")
    assert record is not None
    assert record["resumed_at"] == 3


def test_a_limit_on_the_size_of_files_is_told_before_the_first_step(tmp_path, config_file):
    """RLIMIT_FSIZE, as clusters set it; in a child, for it cannot be raised again."""
    path = config_file(sft=SFT, lora={"r": 16, "target_modules": "all-linear"})
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))
        try:
            main([str(path)])
        except UserError as error:
            os.write(write, str(error).encode())
        finally:
            os._exit(0)
    os.close(write)
    os.waitpid(pid, 0)
    told = os.read(read, 10_000).decode()
    assert "may write no more than 0.0 MB into one. Raise the limit (ulimit -f)." in told
    assert [p.name for p in tmp_path.iterdir()] == ["stage.yaml"]
