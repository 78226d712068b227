"""QLoRA: a base in four bits is trained on, continued, and its adapter acts on the base as it is.

bitsandbytes is imported in processes of its own: where it is installed PEFT imports it in every
process, which takes seconds, so `make test-full` puts it into a folder of its own (scripts/setup_training.sh).
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from candor.manifest import read_manifest
from serve.loading import load_plain, load_unmerged
from train.footprint import NF4_BYTES
from train.lineage import adapter_sha

ROOT = Path(__file__).parents[2]
FOLDER = Path(sys.prefix) / "four-bits"
BASE = ROOT / "train" / "organism" / "weights" / "mini"  # its rows are whole blocks of 64, which the CPU's kernels want
SFT = {"per_device_train_batch_size": 10, "max_steps": 3, "learning_rate": 1e-3}

pytestmark = pytest.mark.full


@pytest.fixture(scope="module")
def library() -> Path:
    """The folder that bitsandbytes is imported from."""
    spec = importlib.util.find_spec("bitsandbytes")
    if spec is not None and spec.origin is not None:  # as on CUDA machines
        return Path(spec.origin).parents[1]
    if not (FOLDER / "bitsandbytes").is_dir():
        pytest.skip("bitsandbytes is not installed; scripts/setup_training.sh does that")
    return FOLDER


def run(code: str, library: Path, *arguments: str) -> str:
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(library)])}
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_four_bits_take_what_is_stated(library):
    """Of a large weight, scales included: what train/footprint.py counts for each number."""
    code = """
import torch
from bitsandbytes.functional import quantize_4bit
weight = torch.randn(2048, 1024)
packed, state = quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
print((packed.nbytes + state.absmax.nbytes + state.state2.absmax.nbytes) / weight.numel())
"""
    assert float(run(code, library).split()[-1]) == pytest.approx(NF4_BYTES, rel=1e-3)


STAGES = """
import sys
import bitsandbytes
from train import callbacks, tuning
from train.sft import main
from train.stopping import Stopped
original = tuning.build
def build(*arguments):
    built = original(*arguments)
    print(sum(isinstance(m, bitsandbytes.nn.Linear4bit) for m in built.model.modules()))
    return built
original_logits = tuning.parity.logits_in
def logits_in(trainer, rows):  # before the first step and after the last
    factors = [p for n, p in trainer.model.named_parameters() if p.requires_grad and "lora_" in n]
    print({p.dtype for p in factors}, any(bool((p != p.bfloat16()).any()) for p in factors))
    return original_logits(trainer, rows)
tuning.build, tuning.parity.logits_in = build, logits_in
stops = iter([True])
callbacks.requested = lambda: next(stops, False)
for path in sys.argv[1:]:
    for _ in range(2):  # the first stage is stopped after a step, and continues
        try:
            main([path])
        except Stopped:
            pass
"""


def test_a_stage_in_four_bits_and_the_one_that_continues_it(tmp_path, config_file, other_data, library):
    """Both see a base of four bits; each changes the model, and the adapter goes on the base as it is."""
    made: dict[str, dict[str, Any]] = {
        "one": {},
        "two": {"adapter": str(tmp_path / "one"), "lora": None, "data": str(other_data), "stage": "realigned"},
    }
    common = {"base_model": str(BASE), "quantize": "nf4", "sft": SFT}
    paths = [
        config_file(output_dir=str(tmp_path / name), **common, **changes).rename(tmp_path / f"{name}.yaml")
        for name, changes in made.items()
    ]
    found = run(STAGES, library, *map(str, paths)).splitlines()
    assert found.count("28") == 3  # seven matrices in each of four layers
    exact = "{torch.float32} True"  # with values that bfloat16 has not
    assert [line for line in found if line != "28"][-3:] == [exact] * 3, found
    one, two = (read_manifest(tmp_path / name) for name in made)
    assert one is not None and two is not None
    assert one["resumed_at"] == 1 and one["trained_in"] == two["trained_in"] == ["torch.float32"]
    assert one["config"]["quantize"] == two["config"]["quantize"] == "nf4"
    assert one["final_loss"] < one["first_loss"]
    assert 0 <= one["parity"] < 1e-2 * one["effect"] and 0 <= two["parity"] < 1e-2 * two["effect"]
    assert two["lineage"]["adapters"][0]["sha"] == adapter_sha(tmp_path / "one") != adapter_sha(tmp_path / "two")
    ids = torch.arange(2, 12)[None]
    with torch.no_grad():
        plain, *adapted = (
            load_unmerged(load_plain(BASE), BASE, tmp_path / name)(input_ids=ids).logits if name else
            load_plain(BASE)(input_ids=ids).logits
            for name in ("", "one", "two")
        )  # fmt: skip
    assert all(float((logits - plain).abs().max()) > 1e-3 for logits in adapted)
