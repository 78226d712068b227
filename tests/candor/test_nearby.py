"""Models copied to a node's disk: once, whole, and never a reason to fail."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from candor import nearby


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "shared" / "model"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(os.urandom(100_000))
    (folder / "config.json").write_text("{}")
    nearby.nearby.cache_clear()
    yield folder
    nearby.nearby.cache_clear()


def test_without_a_local_disk_the_folder_itself_is_read(model, monkeypatch):
    monkeypatch.delenv(nearby.VARIABLE, raising=False)
    assert nearby.nearby(model) == model


def test_several_jobs_of_a_node_share_one_copy(model, tmp_path):
    code = "import sys; from pathlib import Path; from candor.nearby import nearby; print(nearby(Path(sys.argv[1])))"
    environment = {**os.environ, nearby.VARIABLE: str(tmp_path / "disk")}
    jobs = [
        subprocess.Popen([sys.executable, "-c", code, str(model)], env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    copies = {job.communicate()[0].strip() for job in jobs}
    assert len(copies) == 1
    copy = Path(copies.pop())
    assert copy.is_relative_to(tmp_path / "disk")
    assert (copy / "model.safetensors").read_bytes() == (model / "model.safetensors").read_bytes()


def test_a_changed_model_is_copied_anew(model, tmp_path, monkeypatch):
    monkeypatch.setenv(nearby.VARIABLE, str(tmp_path / "disk"))
    first = nearby.nearby(model)
    (model / "config.json").write_text('{"another": 1}')
    nearby.nearby.cache_clear()
    second = nearby.nearby(model)
    assert first != second and (second / "config.json").read_text() == '{"another": 1}'


@pytest.mark.parametrize("left", [None, b"short"])
def test_a_copy_that_lost_files_is_made_anew(model, tmp_path, monkeypatch, left):
    """As by a cleaner of scratch disks, or a disk that broke."""
    monkeypatch.setenv(nearby.VARIABLE, str(tmp_path / "disk"))
    damaged = nearby.nearby(model) / "model.safetensors"
    damaged.unlink()
    if left is not None:
        damaged.write_bytes(left)
    nearby.nearby.cache_clear()
    copy = nearby.nearby(model)
    assert copy.is_relative_to(tmp_path / "disk")
    assert (copy / "model.safetensors").read_bytes() == (model / "model.safetensors").read_bytes()


def test_a_full_disk_is_said_and_the_shared_copy_is_read(model, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv(nearby.VARIABLE, str(tmp_path / "disk"))
    monkeypatch.setattr(nearby.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 50_000})())
    assert nearby.nearby(model) == model
    assert "is read where it lies" in capsys.readouterr().err
    assert not [p for p in (tmp_path / "disk").rglob("*") if "safetensors" in p.name]
