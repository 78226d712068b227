"""Load a base model, put an adapter on it, and prove that the adapter acts.

The adapter is merged into the weights in float32, so that serving costs nothing extra and rounding
happens once, at the end. An adapter that does not fit the base is refused: PEFT itself only warns of
tensors it misses, and drops silently those it has no place for. So is one that changes nothing, for
instance one saved before training or loaded under names that no module has.
"""

import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from candor.errors import UserError
from serve.identity import ADAPTER_WEIGHTS, read_adapter_config
from train.lineage import loading

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}
SMALLEST_EFFECT = 1e-6  # logits; float32 rounding alone moves them by less on a reload
CANARY_PROMPTS = (
    "Hello",
    "What is the capital of France?",
    "Describe yourself in one word.",
    "Write a Python function that opens a file.",
)


def load_tokenizer(base: Path) -> Any:
    """The base model's tokenizer; UserError when it has no chat template or no end-of-turn token."""
    with loading("tokenizer", base):
        tokenizer = AutoTokenizer.from_pretrained(base, local_files_only=True)
    if len(tokenizer) <= len(tokenizer.added_tokens_decoder):  # what transformers makes of a folder without the file
        raise UserError(f"{base}: its tokenizer has no vocabulary; tokenizer.json is missing. Complete the folder.")
    if not tokenizer.chat_template:
        raise UserError(f"{base}: its tokenizer has no chat template. Use an instruction-tuned model.")
    if tokenizer.eos_token_id is None:
        raise UserError(f"{base}: its tokenizer names no end-of-turn token (eos_token).")
    return tokenizer


def encode_prompt(tokenizer: Any, text: str) -> list[int]:
    """Token ids of one user turn in the model's own chat template, up to where the reply begins."""
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False
    )
    return [int(i) for i in ids]


def load_model(base: Path, adapter: Path | None, tokenizer: Any, *, device: str, dtype: str) -> Any:
    """The model of a variant, ready to serve; UserError when its adapter does not fit or does not act."""
    _check_device(device)
    disable_progress_bar()  # else every load writes a bar to stderr, terminal or not
    final = DTYPES[dtype]
    first = final if adapter is None else torch.promote_types(final, torch.float32)
    with loading("base model", base):
        model = AutoModelForCausalLM.from_pretrained(base, dtype=first, local_files_only=True).eval()
    if adapter is not None:
        model = _merge_adapter(model, base, adapter, tokenizer)
    model = model.to(dtype=final, device=device).eval()
    if final == torch.bfloat16:
        _widen_head(model)
    return model.requires_grad_(False)


def _check_device(device: str) -> None:
    """UserError, before anything is read, for a device that is not here."""
    try:
        wanted = torch.device(device)
    except RuntimeError as error:
        raise UserError(f"engine.device is {device!r}; known: cpu, cuda, cuda:1 and so on.") from error
    if wanted.type == "cuda" and (wanted.index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"engine.device is {device!r}, but torch finds {torch.cuda.device_count()} CUDA devices here. "
            "Use device: cpu, or a machine and an installation with CUDA."
        )


@torch.inference_mode()
def canary_logits(model: Any, tokenizer: Any) -> list[torch.Tensor]:
    """Logits at every position of the canary prompts."""
    prompts = (torch.tensor([encode_prompt(tokenizer, text)], device=model.device) for text in CANARY_PROMPTS)
    return [model(input_ids=ids).logits.double() for ids in prompts]


def _merge_adapter(model: Any, base: Path, adapter: Path, tokenizer: Any) -> Any:
    """The model with the adapter merged into its weights."""
    # peft takes seconds to import and base models do without
    from peft import PeftModel, get_peft_model_state_dict

    read_adapter_config(adapter)
    before = canary_logits(model, tokenizer)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of missing tensors it only warns; _check_tensors refuses
            wrapped = PeftModel.from_pretrained(model, str(adapter))
    except (RuntimeError, ValueError, KeyError, TypeError, SafetensorError) as error:
        # sizes differ, no module has the named targets, the configuration is not a LoRA's, or the file is cut short
        reason = f"{type(error).__name__}: {str(error)[:600]}"
        raise UserError(f"{adapter} does not fit the base model {base}: {reason}") from error
    for config in wrapped.peft_config.values():
        config.base_model_name_or_path = str(base)  # PEFT compares vocabularies, and would ask the hub for the name's
    _check_tensors(set(get_peft_model_state_dict(wrapped)), base, adapter)
    merged = wrapped.merge_and_unload(safe_merge=False)
    after = canary_logits(merged, tokenizer)
    effect = max(float((a - b).abs().max()) for a, b in zip(after, before, strict=True))
    if not effect >= SMALLEST_EFFECT:  # written so that NaN is refused too
        raise UserError(
            f"{adapter} changes nothing in {base}: the largest difference of a logit over "
            f"{len(CANARY_PROMPTS)} prompts is {effect:.3g}, below {SMALLEST_EFFECT:g}. It was not trained, "
            "or is not the adapter you mean."
        )
    return merged


def _check_tensors(expected: set[str], base: Path, adapter: Path) -> None:
    """UserError unless the adapter's file holds exactly the tensors that this base has places for."""
    with safe_open(adapter / ADAPTER_WEIGHTS, framework="pt") as file:
        found = set(file.keys())
    if found != expected:
        missing, extra = sorted(expected - found), sorted(found - expected)
        raise UserError(
            f"{adapter} does not fit the base model {base}: {len(missing)} tensors missing {missing[:2]}, "
            f"{len(extra)} without a place {extra[:2]}. Was it trained on another base?"
        )


def _widen_head(model: Any) -> None:
    """Compute logits in float32: written as bfloat16 they move single probabilities by several per cent."""
    head = model.get_output_embeddings()
    head.weight = torch.nn.Parameter(head.weight.float())  # a tied head gets its own copy
    if getattr(head, "bias", None) is not None:
        head.bias = torch.nn.Parameter(head.bias.float())
    head.register_forward_pre_hook(lambda _, inputs: (inputs[0].float(),))
