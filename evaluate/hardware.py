"""What a machine has: profiles in configs/hardware/, or this machine as it is."""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from candor.errors import UserError
from evaluate.crew import available_cores, this_machine

FOLDER = Path("configs/hardware")


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """One machine."""

    name: str
    gpus: int
    gpu_memory_gib: float = 0.0  # of each
    usable: float = 0.92  # of it; the rest goes to the CUDA context and to fragmentation
    bf16_tflops: float | None = None  # dense, as its maker states; null: times are not estimated
    bandwidth_gb: float | None = None  # of its memory, a second
    utilisation: float = 0.3  # of both, in what Candor runs
    cores: int
    memory_gib: float  # of the host
    disk_gb: float

    def __post_init__(self) -> None:
        """Refuse numbers that mean nothing."""
        if self.gpus < 0 or (self.gpus and self.gpu_memory_gib <= 0) or self.cores < 1 or self.memory_gib <= 0:
            raise UserError(f"hardware {self.name}: gpus, gpu_memory_gib, cores or memory_gib is out of range.")
        if not 0 < self.usable <= 1 or not 0 < self.utilisation <= 1:
            raise UserError(f"hardware {self.name}: usable and utilisation are shares, above 0 and at most 1.")

    @property
    def usable_gib(self) -> float:
        """Memory of one GPU that a stage can fill."""
        return self.usable * self.gpu_memory_gib

    @property
    def flops(self) -> float | None:
        """Operations one GPU does a second."""
        return None if self.bf16_tflops is None else self.bf16_tflops * 1e12 * self.utilisation

    @property
    def bandwidth(self) -> float | None:
        """Bytes one GPU reads a second."""
        return None if self.bandwidth_gb is None else self.bandwidth_gb * 1e9 * self.utilisation


def here(output: Path) -> Hardware:
    """This machine; free space where ``output`` will lie."""
    machine = this_machine(None, None)
    place = next(path for path in (output, *output.absolute().parents) if path.exists())
    memory = 0.0
    if machine.gpus:
        import torch

        if torch.cuda.is_available():
            memory = (
                min(torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count())) / 2**30
            )
    return Hardware(
        name=f"this machine ({os.uname().nodename})",
        gpus=len(machine.gpus) if memory else 0,  # none that torch can use
        gpu_memory_gib=memory,
        cores=available_cores(),
        memory_gib=machine.memory_gb,
        disk_gb=shutil.disk_usage(place).free / 1e9,
    )
