"""Proof that what was written is what was trained: the folder is loaded as others will load it, and compared.

An adapter that names the wrong base, lost a scale or a tensor, or was never trained gives a model
that answers like any other. So the logits of a few training rows are taken before training, after
it, and from the written adapter on a fresh copy of the base it names.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from candor.errors import UserError
from train.lineage import ADAPTER_CONFIG

Logits = list[torch.Tensor]  # one per row, (tokens, vocabulary), float32 on the CPU
_CONTEXT = 256  # tokens looked at in each row


@dataclass(frozen=True, slots=True)
class Parity:
    """Largest differences of a logit."""

    effect: float  # trained model against the one it began as
    difference: float  # written adapter against the trained model


@torch.no_grad()
def logits_of(model: Any, rows: Sequence[list[int]]) -> Logits:
    """Logits at every position of some rows, without dropout; the model's mode is left as it was."""
    was_training = model.training
    device = next(model.parameters()).device
    model.eval()
    try:
        return [
            model(input_ids=torch.tensor([ids[:_CONTEXT]], device=device), use_cache=False).logits[0].float().cpu()
            for ids in rows
        ]
    finally:
        model.train(was_training)


def logits_in(trainer: Any, rows: Sequence[list[int]]) -> Logits | None:
    """Logits of the model in a trainer, which all processes must ask for together.

    None before FSDP has shared the weights out (only one process has them then), and under DeepSpeed.
    """
    if trainer.is_deepspeed_enabled:
        return None
    if trainer.is_fsdp_enabled:
        return logits_of(trainer.model_wrapped, rows) if trainer.state.global_step else None
    # accelerate's wrapper would compute in mixed precision here and not in the copy it is compared with
    return logits_of(trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False), rows)


def largest_difference(ours: Logits, theirs: Logits) -> float:
    """The largest absolute difference of a logit."""
    return max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True))


def check(
    folder: Path,
    base: Any,
    rows: Sequence[list[int]],
    *,
    before: Logits | None,
    after: Logits,
    earlier: Path | None = None,
    rounded: bool = False,
) -> Parity:
    """Compare the adapter in ``folder``, put on ``base``, with the model that was trained.

    ``before`` is None when the model was shared out between GPUs: then the adapter's effect on ``base``, beyond
    that of the ``earlier`` one, stands for what training changed, free of the rounding of other devices.
    ``rounded``: the logits ``after`` were computed in mixed precision.
    UserError when training changed nothing, or, in float32, when the two are not the same model: they
    may differ by rounding (1e-5 of the largest logit), or by a hundredth of what training changed.
    In lower precision rounding is of the size of small effects, so there the difference is only recorded.
    """
    began = _without(base, earlier, rows) if before is None else before
    written = logits_of(PeftModel.from_pretrained(base, str(folder)), rows)
    effect = largest_difference(written if before is None else after, began)
    if not effect > 0:
        raise UserError(
            "training changed nothing: the logits after it are those before it, to the last bit. Check "
            "sft.learning_rate, sft.warmup_steps and lora.target_modules."
        )
    difference = largest_difference(written, after)
    exact = next(base.parameters()).dtype == torch.float32 and not rounded
    allowed = max(1e-5 * max(float(x.abs().max()) for x in after), 1e-2 * effect)
    if exact and not difference <= allowed:  # written so that NaN is refused too
        named = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))["base_model_name_or_path"]
        raise UserError(
            f"the adapter written to {folder} is not the model that was trained: on {named} its logits differ by "
            f"{difference:.3g} (allowed {allowed:.3g}; training changed them by {effect:.3g}). Nothing was kept."
        )
    return Parity(effect, difference)


def _without(base: Any, earlier: Path | None, rows: Sequence[list[int]]) -> Logits:
    """Logits of what a stage began as: ``base``, which stays as it is, with the earlier adapter where there is one."""
    if earlier is None:
        return logits_of(base, rows)
    wrapped = PeftModel.from_pretrained(base, str(earlier))
    found = logits_of(wrapped, rows)
    wrapped.unload()
    return found
