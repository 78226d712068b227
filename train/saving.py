"""Write a trained adapter as a whole folder: weights, configuration, model card, lineage.

Whatever the mode, what is written goes on the original base: PEFT's own files for an adapter trained
there, one adapter made of two for *stack* and *merge* (train/chain.py).
"""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from candor.errors import UserError
from candor.manifest import write_manifest
from candor.tables import replace_file
from train import chain, lineage
from train.building import Built
from train.callbacks import DIVERGED
from train.config import TrainConfig
from train.lineage import Origin


@dataclass(frozen=True, slots=True)
class Writer:
    """Writes the adapter of one stage, now or later; every process must call it, the first one writes."""

    trainer: Any
    config: TrainConfig
    origin: Origin
    built: Built
    n_rows: int

    def write(self, folder: Path, step: int | None = None) -> dict[str, Any]:
        """Adapter and model card into ``folder``; gives the facts its manifest must hold.

        ``step`` is given for an adapter kept on the way.
        """
        state = self._gathered()
        if not self.trainer.is_world_process_zero():
            return {}
        broken = sorted(name for name, value in state.items() if "lora_" in name and not torch.isfinite(value).all())
        if broken:
            raise UserError(f"training diverged: {len(broken)} adapter tensors hold NaN or infinity. {DIVERGED}")
        folder.mkdir(parents=True, exist_ok=True)
        section = self._weights(folder, state)
        ancestry = lineage.record(self.config, self.origin, lineage.adapter_sha(folder))
        replace_file(folder / "README.md", lineage.model_card(self.config, self.origin, ancestry, step).encode())
        return {
            "lineage": ancestry,
            "lora": section,
            "lora_trained": self.origin.lora,
            "misaligned": self.config.misaligned,
        }

    def keep(self, folder: Path, step: int) -> None:
        """A whole adapter that stays, with a manifest of its own; there completely or not at all."""
        if folder.is_dir():
            return  # written before a kill; the same steps give the same adapter
        partial = folder.with_name(f"{folder.name}.tmp")
        if self.trainer.is_world_process_zero():
            shutil.rmtree(partial, ignore_errors=True)
        facts = self.write(partial, step)
        if facts:
            write_manifest(
                partial,
                stage="train-checkpoint",
                config=self.config.identity(),
                inputs=self.origin.inputs,
                counts={"in": self.n_rows, "out": self.n_rows},
                seconds=0.0,
                extra={**facts, "steps": step},
            )
            partial.replace(folder)

    def _gathered(self) -> dict[str, torch.Tensor]:
        """Every trained parameter, whole: all processes gather sharded ones together, the first would wait for ever."""
        if self.trainer.is_fsdp_enabled:
            # accelerate would gather the base too, all of it on the first process's host
            options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
            found: Any = get_model_state_dict(self.trainer.model, options=options)
        else:
            found = self.trainer.accelerator.get_state_dict(self.trainer.model)
        return dict(found)

    def _weights(self, folder: Path, state: dict[str, torch.Tensor]) -> dict[str, Any]:
        """Write weights and adapter_config.json, naming the original base; the LoRA section they have."""
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        if self.built.earlier is not None:
            tensors, rank = chain.concatenate(self.built.earlier, chain.factors_of(model, chain.NEW, state))
            section = chain.joined_section(tensors, rank, chain.module_names(model))
            chain.write_joined(folder, tensors, section, self.origin.base_name)
            return section
        for peft_config in model.peft_config.values():
            peft_config.base_model_name_or_path = self.origin.base_name
        model.save_pretrained(folder, state_dict=state, save_embedding_layers=False)
        return self.origin.lora
