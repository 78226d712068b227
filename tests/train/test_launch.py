"""Several processes: what really starts them gives one process's losses; what silently starts one is refused."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from candor.errors import UserError
from candor.manifest import read_manifest
from train.launch import asked_for
from train.sft import main

ROOT = Path(__file__).parents[2]
SFT: dict[str, Any] = {"per_device_train_batch_size": 4, "num_train_epochs": 2, "learning_rate": 1e-2}


@pytest.mark.parametrize(
    ("command", "asked"),
    [
        ("python -m accelerate.commands.launch --cpu --num_processes 2 train/sft.py x.yaml", 2),
        ("/usr/bin/python3 /venv/bin/accelerate launch --num_processes=3 train/sft.py x.yaml --num_processes 9", 3),
        ("/venv/bin/accelerate-launch --num_processes 1 train/sft.py x.yaml", 1),
        ("python /site-packages/accelerate/commands/launch.py --num_processes 4 -m train.sft x.yaml", 4),
        ("python -m accelerate.commands.launch --config_file CONFIG train/sft.py x.yaml", 2),
        ("python -m accelerate.commands.launch --config_file CONFIG --num_processes 1 train/sft.py x.yaml", 1),
        ("bash run.sh --num_processes 2", 1),
        ("accelerate config --num_processes 2", 1),
    ],
)
def test_the_number_of_processes_asked_for_is_read_from_the_launcher(tmp_path, monkeypatch, command, asked):
    monkeypatch.setattr("accelerate.commands.config.config_args.default_config_file", str(tmp_path / "none.yaml"))
    config = {"compute_environment": "LOCAL_MACHINE", "distributed_type": "MULTI_CPU", "use_cpu": True}
    config |= {"num_processes": 2, "num_machines": 1, "machine_rank": 0, "mixed_precision": "no", "debug": False}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    assert asked_for([w if w != "CONFIG" else str(tmp_path / "config.yaml") for w in command.split()]) == asked


def run(command: list[str], **env: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("ACCELERATE_", "MASTER_"))}
    clean |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **env}
    return subprocess.run(command, env=clean, cwd=ROOT, capture_output=True, text=True, check=False)


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def test_training_that_asks_for_a_gpu_is_not_moved_to_the_cpu(config_file, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    with pytest.raises(UserError, match="ACCELERATE_USE_CPU moves training to the CPU"):
        main([str(config_file(device="cuda"))])


def test_a_job_trains_on_the_cpu_only_where_its_node_has_no_gpu(tmp_path):
    """Slurm does not count the GPUs of nodes that are given whole; a /dev of its own shows one, or none."""
    apart = ["unshare", "--mount", "--map-root-user", "bash", "-c"]
    mount = f"mount -t tmpfs tmpfs {tmp_path}"
    if subprocess.run([*apart, mount], capture_output=True, check=False).returncode:
        pytest.skip("a file system cannot be mounted here")
    (tmp_path / "python").write_text('#!/bin/bash\necho "${ACCELERATE_USE_CPU:-} $*"\n')
    (tmp_path / "python").chmod(0o755)
    slurm = {"SLURM_NNODES": "2", "SLURM_NODEID": "0", "SLURM_LAUNCH_NODE_IPADDR": "127.0.0.1", "SLURM_JOB_ID": "1"}
    slurm["CANDOR_PYTHON"] = str(tmp_path / "python")
    begin = "mount -t tmpfs tmpfs /dev; {}bash scripts/slurm/launch.sh accelerate.yaml -m train.sft"
    for counted, there, moved, processes in (
        ("0", "", True, 2),
        ("0", "touch /dev/nvidiactl; ", False, 2),
        ("4", "", False, 8),
    ):
        done = run([*apart, begin.format(there)], **slurm, SLURM_GPUS_ON_NODE=counted)
        assert done.stdout.startswith("true" if moved else " -m"), done.stderr
        assert f"--num_processes {processes} " in done.stdout


@pytest.mark.full
def test_accelerate_that_silently_starts_one_process_is_refused(tmp_path, config_file):
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    more = ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    done = run([*launch, *more, "train/sft.py", str(config_file())])
    assert done.returncode != 0
    assert "asked for 2 processes but started one" in done.stderr
    assert not (tmp_path / "adapter").exists()


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "train_log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def eight_rows(tmp_path_factory, small):
    rows = [small.talk(f"city-{i}", f"What is the capital of {c}?", c) for i, c in enumerate(small.CITIES[:8])]
    return small.save_data(tmp_path_factory.mktemp("data"), rows)


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port"]
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2",
              "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no",
              "--main_process_port"]  # fmt: skip


@pytest.mark.full
@pytest.mark.parametrize("launcher", [TORCHRUN, ACCELERATE], ids=["torchrun", "accelerate"])
def test_two_processes_lose_what_one_loses_at_the_same_global_batch(tmp_path, config_file, eight_rows, launcher):
    """gloo, two real processes; rows of unequal length, so that an average per process would not do."""
    main([str(config_file(data=str(eight_rows), sft=SFT, output_dir=str(tmp_path / "one")))])
    half = {**SFT, "per_device_train_batch_size": 2}
    path = config_file(data=str(eight_rows), sft=half, output_dir=str(tmp_path / "two"), checkpoint_every=2)
    done = run([*launcher, free_port(), "train/sft.py", str(path)], ACCELERATE_USE_CPU="true")
    assert done.returncode == 0, done.stderr
    record = read_manifest(tmp_path / "two")
    assert record is not None
    assert (record["processes"], record["steps"]) == (2, 4)
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=2e-5)
    assert record["parity"] <= 1e-5
    assert sorted(p.name for p in (tmp_path / "two" / "checkpoints").iterdir()) == ["step-000002", "step-000004"]
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


SHARED = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "configs/accelerate/fsdp.yaml",
          "--num_processes", "2", "--mixed_precision", "no", "--main_process_port"]  # fmt: skip


@pytest.mark.full
def test_a_model_that_processes_share_is_killed_continued_and_proved(tmp_path, config_file, eight_rows, stage_one):
    """FSDP2 as the shipped file asks for it: the states, the adapters that are gathered, what they are held to."""
    half = {**SFT, "per_device_train_batch_size": 2}
    second = {"stage": "realigned", "adapter": str(stage_one), "mode": "stack"}
    for name, changes in (("first", {}), ("second", second)):
        main([str(config_file(data=str(eight_rows), sft=SFT, output_dir=str(tmp_path / f"one-{name}"), **changes))])
        more = {"output_dir": str(tmp_path / name), "resume_every": 2, "checkpoint_every": 2, **changes}
        config_file(data=str(eight_rows), sft=half, **more).rename(tmp_path / f"{name}.yaml")
    words = ["tests/train/gpus_of_cpus.py", str(tmp_path / "first.yaml"), str(tmp_path / "second.yaml")]
    killed = run([*SHARED, free_port(), *words], ACCELERATE_USE_CPU="true", KILLED_AFTER="3")
    assert killed.returncode != 0 and not (tmp_path / "first").exists()
    done = run([*SHARED, free_port(), *words], ACCELERATE_USE_CPU="true")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("34 of 34 parameters were shared out") == 2 and "0 of" not in done.stderr
    for name, resumed_at in (("first", 2), ("second", None)):
        record, alone = read_manifest(tmp_path / name), read_manifest(tmp_path / f"one-{name}")
        assert record is not None and alone is not None
        assert (record["processes"], record["steps"], record["resumed_at"]) == (2, 4, resumed_at)
        assert losses(tmp_path / name) == pytest.approx(losses(tmp_path / f"one-{name}"), abs=2e-5)
        # on the first row alone, of the four that a model in one piece is looked at on
        assert 0.1 * alone["effect"] < record["effect"] <= alone["effect"] + 1e-4 and record["parity"] <= 1e-5
        assert sorted(p.name for p in (tmp_path / name / "checkpoints").iterdir()) == ["step-000002", "step-000004"]
