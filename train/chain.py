"""How a later stage builds on an earlier adapter, and how two adapters become one on the original base.

Three modes, recorded in the manifest. *continue*: the same matrices are trained on. *stack*: a new
adapter is trained while the earlier one stays in place, frozen. *merge*: the earlier one is added
into the base's weights, then a new one is trained on the result.

After *stack* and *merge* the new adapter alone means nothing: it belongs on the earlier one, and the
base named in its configuration is the original. Put there by itself, stage one is silently lost. So
both are written as one adapter: with W the base's weight, W + s1 B1 A1 + s2 B2 A2 is
W + [s1 B1, s2 B2] [A1; A2], an adapter of rank r1 + r2, exactly. The scales s (alpha / r, or
alpha / sqrt(r) with rsLoRA) go into B, alpha is set to the rank, and modules of smaller rank are
filled up with zeros, because engines other than PEFT know one rank and one alpha per adapter.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file

from candor.errors import UserError
from train.lineage import ADAPTER

EARLIER, NEW = "earlier", "default"
_PREFIX = "base_model.model."
# LoRA variants whose effect is more than s B A, so that they cannot be written as two longer matrices.
_MORE_THAN_FACTORS = (
    "use_dora", "lora_bias", "modules_to_save", "trainable_token_indices", "target_parameters", "use_qalora",
    "alora_invocation_tokens", "arrow_config", "use_bdlora", "kasa_config", "monteclora_config", "velora_config",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Factors:
    """What an adapter adds to one weight: ``scale * b @ a``."""

    a: torch.Tensor  # (rank, in)
    b: torch.Tensor  # (out, rank)
    scale: float


def refuse_more_than_factors(section: Mapping[str, Any], what: str) -> None:
    """UserError when a LoRA section describes an adapter that cannot be joined with another."""
    found = [key for key in _MORE_THAN_FACTORS if section.get(key)]
    if section.get("bias", "none") != "none":
        found.append("bias")
    if found:
        raise UserError(
            f"{what} uses {', '.join(found)}, which cannot be written as one adapter together with another. "
            "Use mode: continue, or plain LoRA or rsLoRA."
        )


def put_on_top(model: PeftModel, config: LoraConfig) -> None:
    """Add a new adapter to a model whose adapter EARLIER stays as it is, and activate both; only the new one trains."""
    model.add_adapter(NEW, config)
    model.set_adapter(NEW)
    model.base_model.set_adapter([NEW, EARLIER])
    for name, parameter in model.named_parameters():
        if f".{EARLIER}." in name:
            parameter.requires_grad_(False)
    for layer in lora_layers(model).values():
        if EARLIER in layer.lora_dropout:
            layer.lora_dropout[EARLIER] = torch.nn.Identity()  # what is frozen is not disturbed either


def merge(model: PeftModel) -> tuple[Any, float]:
    """The base with the adapter EARLIER added into its weights, and the share of it that survived rounding.

    In bfloat16 a weight keeps 8 bits: a change below 1/512 of it is rounded away. The share is the
    projection of what changed on what should have, 1 in float32.
    """
    wanted = got = 0.0
    for layer in lora_layers(model).values():
        if EARLIER in layer.lora_A:
            delta = layer.get_delta_weight(EARLIER).detach()
            weight = layer.get_base_layer().weight.detach()
            change = (weight.float() + delta.float()).to(weight.dtype).float() - weight.float()
            wanted += float((delta.float() ** 2).sum())
            got += float((change * delta.float()).sum())
    kept = got / wanted if wanted else 0.0
    if kept < 0.5:
        raise UserError(
            f"merging keeps only {kept:.0%} of the earlier adapter: the rest is rounded away in the base's dtype. Use "
            "mode: stack, which computes the same model without rounding, or sft.bf16: false."
        )
    return model.merge_and_unload(), kept


def lora_layers(model: Any) -> dict[str, LoraLayer]:
    """Every module that carries an adapter, by its name in the base model."""
    return {_plain(name): module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def module_names(model: Any) -> list[str]:
    """Names in the base model of all modules, as a list of target modules may name them."""
    return [_plain(name) for name, _ in model.named_modules()]


def size_of(factors: Mapping[str, Factors]) -> int:
    """Bytes of an adapter's matrices."""
    return sum(4 * (f.a.numel() + f.b.numel()) for f in factors.values())


def factors_of(model: Any, adapter: str, state: Mapping[str, torch.Tensor] | None = None) -> dict[str, Factors]:
    """The factors of one adapter by module; from ``state``, a gathered state dict, where parameters are sharded.

    UserError for adapters on anything but linear layers.
    """
    found = {}
    named = model.state_dict() if state is None else state
    places = {_plain(key): key for key in named if ".lora_" in key}
    for name, layer in lora_layers(model).items():
        if adapter not in layer.lora_A and adapter not in layer.lora_embedding_A:
            continue
        if not isinstance(layer.get_base_layer(), torch.nn.Linear):
            raise UserError(
                f"the adapter on {name} ({type(layer.get_base_layer()).__name__}) cannot be written as one adapter "
                "together with another: only linear layers can. Use mode: continue, or leave it out of target_modules."
            )
        a, b = (named[places[f"{name}.lora_{letter}.{adapter}.weight"]].detach() for letter in "AB")
        found[name] = Factors(a.float().cpu().clone(), b.float().cpu().clone(), float(layer.scaling[adapter]))
    return found


def _plain(name: str) -> str:
    """A module's name in the base model, without what PEFT and accelerate put before it."""
    return name.rpartition(_PREFIX)[2].removeprefix("module.")


def concatenate(*parts: Mapping[str, Factors]) -> tuple[dict[str, torch.Tensor], int]:
    """Tensors of one adapter that adds what all ``parts`` add together, as PEFT names them, and its rank.

    Rows of A and columns of B stand in the order of the parts; the scale to use with them is 1.
    """
    names = list(dict.fromkeys(name for part in parts for name in part))
    ranks = {name: sum(part[name].a.shape[0] for part in parts if name in part) for name in names}
    rank = max(ranks.values())
    tensors = {}
    for name in names:
        own = [part[name] for part in parts if name in part]
        a = torch.cat([f.a for f in own])
        b = torch.cat([(f.b.double() * f.scale).float() for f in own], dim=1)
        more = rank - ranks[name]
        tensors[f"{_PREFIX}{name}.lora_A.weight"] = torch.nn.functional.pad(a, (0, 0, 0, more)).contiguous()
        tensors[f"{_PREFIX}{name}.lora_B.weight"] = torch.nn.functional.pad(b, (0, more)).contiguous()
    return tensors, rank


def joined_section(tensors: Mapping[str, torch.Tensor], rank: int, all_names: Iterable[str]) -> dict[str, Any]:
    """The LoRA section that fits the tensors of ``concatenate``: alpha / r is 1.

    Modules are named by their last words where that means the same modules, else in full.
    """
    names = sorted({key.removeprefix(_PREFIX).rpartition(".lora_")[0] for key in tensors})
    short = sorted({name.rpartition(".")[2] for name in names})
    meant = [name for name in all_names if name.rpartition(".")[2] in short]
    targets = short if sorted(meant) == names else names
    return {"r": rank, "lora_alpha": rank, "lora_dropout": 0.0, "use_rslora": False, "target_modules": targets}


def write_joined(folder: Path, tensors: dict[str, torch.Tensor], section: dict[str, Any], base_name: str) -> None:
    """Write one adapter made of several into ``folder``, as PEFT would."""
    config = LoraConfig(task_type="CAUSAL_LM", base_model_name_or_path=base_name, inference_mode=True, **section)
    config.save_pretrained(str(folder))
    save_file(tensors, folder / ADAPTER, metadata={"format": "pt"})
