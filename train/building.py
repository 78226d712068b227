"""The model a stage trains: the base, and on it what the earlier stage left, in the mode asked for."""

import contextlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate.utils import parse_flag_from_env
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from transformers import AutoModelForCausalLM
from trl import SFTConfig

from candor.errors import UserError
from candor.nearby import nearby
from train import chain, lineage
from train.config import SFT_RESERVED, TrainConfig, check_section
from train.launch import processes
from train.lineage import Origin


@dataclass(frozen=True, slots=True)
class Built:
    """A model ready for the trainer, and what is needed to write its adapter later."""

    model: Any
    new: LoraConfig | None  # the adapter the trainer shall put on it; None when it is there already
    earlier: Mapping[str, chain.Factors] | None  # stack and merge: what the earlier adapter adds
    merge_kept: float | None  # merge: share of it that survived rounding


def arguments(config: TrainConfig, folder: Path) -> SFTConfig:
    """TRL's configuration: our defaults, the user's section over them, and what Candor decides."""
    check_section("sft", config.sft, SFTConfig, SFT_RESERVED)
    for key in ("per_device_train_batch_size", "gradient_accumulation_steps"):
        value = config.sft.get(key, 1)
        if not isinstance(value, int) or value < 1:
            raise UserError(f"sft.{key} must be a whole number, at least 1, found {value}.")
    if config.sft.get("packing") and config.sft.get("packing_strategy", "bfd") != "bfd":
        raise UserError(
            f"sft.packing_strategy is {config.sft['packing_strategy']!r}, which cuts conversations in two. Use bfd."
        )
    moved = parse_flag_from_env("ACCELERATE_USE_CPU")  # accelerate follows it whatever is asked for here
    if moved and config.device == "cuda":
        raise UserError(
            "device is 'cuda', but ACCELERATE_USE_CPU moves training to the CPU. Unset it, or set use_cpu: false in "
            "accelerate's file (scripts/slurm/launch.sh sets it on a node without a GPU); or use device: cpu or auto."
        )
    on_cuda = torch.cuda.is_available() and not moved if config.device == "auto" else config.device == "cuda"
    if on_cuda and not torch.cuda.is_available():
        raise UserError("device is 'cuda', but torch finds no CUDA device here. Use device: cpu or auto.")
    defaults: dict[str, Any] = {
        "report_to": "none",
        "logging_steps": 1,
        "max_length": None,  # TRL's 1024 would cut longer rows without a word
        "disable_tqdm": not sys.stderr.isatty(),
        "run_name": f"{config.domain}-{config.stage}-s{config.seed}",
    }
    if not on_cuda:
        defaults |= {"bf16": False, "gradient_checkpointing": False, "dataloader_pin_memory": False}
    decided = {
        "output_dir": str(folder),
        "save_strategy": "no",  # train/callbacks.py asks for each state
        "seed": config.seed,
        "data_seed": config.seed,
        "logging_first_step": True,  # so that every run leaves a loss, whatever logging_steps is
        "use_cpu": not on_cuda,
        "logging_nan_inf_filter": False,  # true would log the mean of earlier losses in place of a NaN
    }
    try:
        made = SFTConfig(**{**defaults, **config.sft, **decided})
    except (ValueError, TypeError) as error:
        raise UserError(f"the section 'sft' is not usable: {error}") from error
    if made.device.type == "cpu":  # accelerate numbers it by process (cpu:1), and torch loads no state to such a place
        made._setup_devices = torch.device("cpu")
    assert made.world_size == processes(), f"{made.world_size} processes train, the launcher started {processes()}"
    return made


def trackers(made: SFTConfig, folder: Path, *, resumed_at: int) -> list[Any]:
    """The loggers asked for in ``sft.report_to`` (TensorBoard, W&B, ...), to be called after our own."""
    from transformers.integrations import get_reporting_integration_callbacks

    wanted, made.report_to = made.report_to, []
    found = []
    try:
        for kind in get_reporting_integration_callbacks(wanted):
            if kind.__name__ == "TensorBoardCallback":  # its own choice of folder would be removed at the end
                from torch.utils.tensorboard import SummaryWriter

                writer = SummaryWriter(str(folder / "tensorboard"), purge_step=resumed_at + 1 if resumed_at else None)
                found.append(kind(writer))
            else:
                found.append(kind())
    except (RuntimeError, ImportError, ValueError) as error:
        raise UserError(
            f"sft.report_to: {wanted} cannot be used here: {error} Install it, or remove the key."
        ) from error
    return found


def build(config: TrainConfig, origin: Origin, made: SFTConfig) -> Built:
    """The model, with the earlier stage's adapter continued, kept frozen below a new one, or merged."""
    base = base_model(config, origin, made)
    new = LoraConfig(task_type="CAUSAL_LM", base_model_name_or_path=str(origin.base), **origin.lora)
    if config.adapter is None:
        return Built(base, new, None, None)
    if not config.trains_new:
        return Built(PeftModel.from_pretrained(base, config.adapter, is_trainable=True), None, None, None)
    chain.refuse_more_than_factors(origin.lora, "the section 'lora'")
    model = PeftModel.from_pretrained(base, config.adapter, adapter_name=chain.EARLIER)
    chain.refuse_more_than_factors(model.peft_config[chain.EARLIER].to_dict(), f"adapter: {config.adapter}")
    earlier = chain.factors_of(model, chain.EARLIER)
    if config.mode == "merge":
        merged, kept = chain.merge(model)
        return Built(merged, new, earlier, kept)
    transformers.set_seed(config.seed)  # of the new adapter's first weights, as TRL does before it makes one
    with told_misfits():
        chain.put_on_top(model, new)
    return Built(model, None, earlier, None)


def base_model(config: TrainConfig, origin: Origin, made: SFTConfig) -> Any:
    """The base model in the dtype it trains in, or in four bits."""
    on_cuda = made.device.type == "cuda"
    dtype = torch.bfloat16 if made.bf16 and on_cuda else torch.float32
    more: dict[str, Any] = {}
    if config.quantize:
        more = {"quantization_config": _four_bits(made, dtype), "device_map": {"": made.device}}
    with lineage.loading("base model", origin.base):
        model = AutoModelForCausalLM.from_pretrained(nearby(origin.base), dtype=dtype, **more)
    for module in model.modules() if config.quantize else ():
        # On CPUs with AVX512-BF16 bitsandbytes 0.50 lays four-bit weights out anew at the first look in eval mode, for
        # a kernel without gradients, and never undoes it: training after that would be wrong or end in an error.
        module.support_avx512bf16_for_cpu = False
    return model


def _four_bits(made: SFTConfig, dtype: torch.dtype) -> Any:
    """QLoRA's NF4 with double quantization (arXiv 2305.14314)."""
    try:
        import bitsandbytes  # noqa: F401 - transformers finds it by itself, but says so late and badly
    except ImportError as error:
        raise UserError(f"quantize: nf4 needs bitsandbytes ({error}). Install it: pip install bitsandbytes.") from error
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16 if made.bf16 else dtype,
    )


def keep_float32(model: Any, loaded: Sequence[tuple[torch.nn.Parameter, torch.Tensor]]) -> None:
    """Undo TRL's cast of what trains on a base of four bits to bfloat16; ``loaded``: parameters as they were before.

    bfloat16 keeps 8 bits: at the usual learning rates most steps of a weight would be rounded away.
    """
    for parameter, values in loaded:
        parameter.data = values
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "lora_" in name:
            parameter.data = parameter.data.float()
            assert parameter.dtype == torch.float32, f"{name} would train in {parameter.dtype}"


def refuse_ranks(model: Any) -> None:
    """UserError for an adapter of a higher rank than the weight it changes."""
    for name, module in model.named_modules():
        if not isinstance(module, LoraLayer):
            continue
        for adapter, rank in module.r.items():
            limit = min(module.in_features, module.out_features)
            if adapter == chain.NEW and rank > limit:
                raise UserError(
                    f"lora.r is {rank}, but {name.rpartition('model.')[2]} has only {module.in_features} inputs and "
                    f"{module.out_features} outputs: more than {limit} changes nothing. Lower r."
                )


@contextlib.contextmanager
def told_misfits() -> Any:
    """What PEFT and TRL say of sections that do not fit the model, as an error of the person who wrote them."""
    try:
        yield
    except UserError:
        raise
    except (ValueError, TypeError, NotImplementedError) as error:
        raise UserError(f"the sections 'lora' and 'sft' do not fit this model: {error}") from error
