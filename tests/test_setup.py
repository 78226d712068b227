"""scripts/setup.sh takes the right build of torch; pip and the network, which move gigabytes, are played by scripts."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

# torch's build is the file .venv/build; the index, whichever it is, gives the default one for `torch` alone
PIP = """#!/usr/bin/env bash
echo "$*" >>pip.log
case $1 in
  show) [[ -e .venv/build ]] ;;
  uninstall) rm .venv/build ;;
  install) [[ $* != *torch || -e .venv/build ]] || echo "$INDEX_GIVES" >.venv/build ;;
esac
"""
PYTHON = """#!/usr/bin/env bash
[[ $1 != - && $(cat .venv/build) == cuda ]]
"""


def setup(folder: Path, device: str, *, installed: str | None, gives: str = "cuda") -> tuple[int, str, list[str]]:
    """Run a copy of the script; its status, what it said, and the calls of pip."""
    (folder / "scripts").mkdir()
    shutil.copy("scripts/setup.sh", folder / "scripts")
    (folder / ".venv/bin").mkdir(parents=True)
    for name, text in (("pip", PIP), ("python", PYTHON)):
        (folder / ".venv/bin" / name).write_text(text)
        (folder / ".venv/bin" / name).chmod(0o755)
    if installed:
        (folder / ".venv/build").write_text(installed + "\n")
    environment = {**os.environ, "INDEX_GIVES": gives}
    done = subprocess.run(
        ["bash", "scripts/setup.sh", device], cwd=folder, env=environment, capture_output=True, text=True, timeout=60
    )
    return done.returncode, done.stderr, (folder / "pip.log").read_text().splitlines()


@pytest.mark.parametrize(
    ("device", "installed", "after", "goes"),
    [
        ("cuda", "cpu", "cuda", True),
        ("cuda", "cuda", "cuda", False),
        ("cuda", None, "cuda", False),
        ("cpu", "cuda", "cuda", False),
    ],
)
def test_cuda_gets_a_torch_that_has_it(tmp_path, device, installed, after, goes):
    status, told, calls = setup(tmp_path, device, installed=installed)
    assert (status, (tmp_path / ".venv/build").read_text().strip()) == (0, after), told
    assert any(call.startswith("uninstall") for call in calls) == goes
    assert (tmp_path / f".venv/installed-{device}").exists()


def test_an_index_without_cuda_is_told(tmp_path):
    status, told, _ = setup(tmp_path, "cuda", installed=None, gives="cpu")
    assert status == 2 and "gave a torch without CUDA" in told
    assert not (tmp_path / ".venv/installed-cuda").exists()


def test_no_script_expands_an_array_that_may_be_empty():
    """Bash 3.2, which macOS has, takes an empty array for unset, an error under set -u."""
    for path in Path("scripts").rglob("*.sh"):
        text = path.read_text()
        for name in re.findall(r"^(\w+)=\(\)$", text, re.MULTILINE):
            bare = re.sub(rf"\$\{{{name}\[@\]\+\"\$\{{{name}\[@\]\}}\"\}}", "", text)
            assert f'"${{{name}[@]}}"' not in bare, f"{path}: {name}"


def test_make_sets_up_for_the_device_that_a_goal_needs(tmp_path):
    """On a fresh clone; the tests on a GPU need cuda, whatever DEVICE says."""
    for name in ("Makefile", "constraints.txt", "pyproject.toml", "scripts/setup.sh"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(name, tmp_path / name)

    def would(*words: str) -> str:
        command = ["make", "--dry-run", *words]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True, timeout=60).stdout

    assert 'setup.sh "cpu"' in would("nano") and "workers" not in would("nano")
    assert 'setup.sh "cuda"' in would("gpu-test")
    on_gpu = would("nano", "DEVICE=cuda")
    assert 'setup.sh "cuda"' in on_gpu and "device=cuda workers=4" in on_gpu
