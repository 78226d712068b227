"""Runs train/sft.py with accelerate taking CPU processes for GPUs, so that FSDP really shares a model out.

    torchrun ... tests/train/gpus_of_cpus.py CONFIG.yaml [CONFIG.yaml ...]

accelerate makes plain data parallelism of an FSDP configuration on CPUs. torch's FSDP2 itself works there (gloo);
what is changed here only decides which kind of process accelerate believes it runs in. At the end of training
each process says how many of the model's parameters were shared out; after step KILLED_AFTER each is killed.
"""

import os
import signal
import sys
from typing import Any

import torch
import transformers.trainer
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from torch.distributed.tensor import DTensor

from candor.errors import run_script
from train.sft import main


def gpus(self: PartialState, *_: Any, **__: Any) -> tuple[str, DistributedType]:
    return "gloo", DistributedType.MULTI_GPU


def on_cpu(self: PartialState) -> None:
    self.device = torch.device("cpu")


class Watch(transformers.TrainerCallback):  # type: ignore[misc]  # transformers is untyped here
    def on_step_end(self, _: Any, state: Any, *__: Any, **___: Any) -> None:
        if str(state.global_step) == os.environ.get("KILLED_AFTER"):
            os.kill(os.getpid(), signal.SIGKILL)

    def on_train_end(self, *_: Any, model: Any = None, **__: Any) -> None:
        shared = [isinstance(p, DTensor) for p in model.parameters()]
        sys.stderr.write(f"{sum(shared)} of {len(shared)} parameters were shared out\n")


def train(files: list[str]) -> None:
    for file in files:
        main([file])


if __name__ == "__main__":
    torch.distributed.init_process_group("gloo")
    PartialState._prepare_backend, PartialState.set_device = gpus, on_cpu
    transformers.trainer.DEFAULT_CALLBACKS.append(Watch)
    run_script(train)
