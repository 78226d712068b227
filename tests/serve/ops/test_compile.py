"""Every kernel compiles for sm_90 (H100, H200) without a GPU: what the interpreter takes, the compiler may refuse."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
SHARED_MEMORY = 227 << 10  # bytes that a program can have on sm_90


@pytest.mark.full
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_every_kernel_compiles_for_sm_90(tmp_path):
    """In a process of its own, since this one runs the interpreter; the compiler's cache is left out."""
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "tests.serve.ops.compile_kernels"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    made = [json.loads(line) for line in done.stdout.splitlines()]
    assert all(m["machine_code"] > 0 and m["shared_memory"] <= SHARED_MEMORY for m in made)
    written = {
        f"serve.ops.{path.stem}.{name}"
        for path in (ROOT / "serve/ops").glob("triton_*.py")
        for name in re.findall(r"^def (_\w+_kernel)\(", path.read_text(), re.MULTILINE)
    }
    assert {m["kernel"] for m in made} == written
