"""Load a base model, put an adapter on it, and prove that the adapter acts.

In float32 and above the adapter is merged into the weights, so that serving costs nothing extra. In
bfloat16 it stays beside them, as it was trained: a weight keeps 8 bits there, and a small adapter
merged into it would be rounded away, wholly or in part, after having passed every check. An adapter
that does not fit the base is refused: PEFT itself only warns of tensors it misses, and drops
silently those it has no place for. So is one that changes nothing in the model as it is served, for
instance one saved before training or loaded under names that no module has.
"""

import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.logging import disable_progress_bar

from candor.chat import TEMPLATE_OPTIONS
from candor.errors import UserError
from candor.nearby import nearby
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


def textless(tokenizer: Any, size: int) -> torch.Tensor:
    """True for ids [size] that the model has room for but the tokenizer has no text for."""
    pieces = tokenizer.convert_ids_to_tokens(list(range(min(size, len(tokenizer)))))
    return torch.tensor([i >= len(pieces) or not pieces[i] for i in range(size)])


def encode_prompt(tokenizer: Any, text: str) -> list[int]:
    """Token ids of one user turn in the model's own chat template, up to where the reply begins."""
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=False, **TEMPLATE_OPTIONS
    )
    return [int(i) for i in ids]


def decode_replies(tokenizer: Any, bodies: list[list[int]]) -> list[str]:
    """Texts of replies, given without the token that ended them.

    Special tokens other than the end stay visible: dropping them would join what they part.
    """
    texts = tokenizer.batch_decode(bodies, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return [str(t) for t in texts]


def load_plain(base: Path, dtype: torch.dtype = torch.float32) -> Any:
    """A base model as it is, on the CPU."""
    disable_progress_bar()  # else every load writes a bar to stderr, terminal or not
    with loading("base model", base):
        return AutoModelForCausalLM.from_pretrained(nearby(base), dtype=dtype, local_files_only=True).eval()


def load_model(base: Path, adapter: Path | None, tokenizer: Any, *, device: str, dtype: str) -> Any:
    """The model of a variant, ready to serve; UserError when its adapter does not fit or does not act."""
    _check_device(device)
    if torch.device(device).index is not None:
        torch.cuda.set_device(device)  # where CUDA graphs are recorded and Triton's kernels run
    final = DTYPES[dtype]
    model = load_plain(base, final)
    if final == torch.bfloat16:
        _widen_head(model)
    if adapter is not None:
        model = _put_on(model, base, adapter, tokenizer, merge=final != torch.bfloat16)
    return model.to(device=device).eval().requires_grad_(False)


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


def _put_on(model: Any, base: Path, adapter: Path, tokenizer: Any, *, merge: bool) -> Any:
    """The model with the adapter merged into its weights, or beside them."""
    before = canary_logits(model, tokenizer)
    wrapped = load_unmerged(model, base, adapter)
    served = wrapped.merge_and_unload(safe_merge=False) if merge else wrapped.get_base_model()
    after = canary_logits(served, tokenizer)
    effect = max(float((a - b).abs().max()) for a, b in zip(after, before, strict=True))
    if not effect >= SMALLEST_EFFECT:  # written so that NaN is refused too
        raise UserError(
            f"{adapter} changes nothing in {base}: the largest difference of a logit over "
            f"{len(CANARY_PROMPTS)} prompts is {effect:.3g}, below {SMALLEST_EFFECT:g}. It was not trained, "
            f"is not the adapter you mean, or is too small for {str(model.dtype).removeprefix('torch.')}."
        )
    return served


def load_unmerged(model: Any, base: Path, adapter: Path) -> Any:
    """PEFT's model of a base and an adapter, which must fit each other tensor by tensor; UserError otherwise."""
    # peft takes seconds to import and base models do without
    from peft import PeftModel, get_peft_model_state_dict

    read_adapter_config(adapter)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of missing tensors it only warns; check_tensors refuses
            wrapped = PeftModel.from_pretrained(model, str(adapter))
    except (RuntimeError, ValueError, KeyError, TypeError, SafetensorError) as error:
        # sizes differ, no module has the named targets, the configuration is not a LoRA's, or the file is cut short
        reason = f"{type(error).__name__}: {str(error)[:600]}"
        raise UserError(f"{adapter} does not fit the base model {base}: {reason}") from error
    for config in wrapped.peft_config.values():
        config.base_model_name_or_path = str(base)  # PEFT compares vocabularies, and would ask the hub for the name's
    if head.weight is embedding.weight and any(
        getattr(module, "base_layer", None) in (head, embedding) for module in wrapped.modules()
    ):
        head.weight = torch.nn.Parameter(head.weight.detach().clone())  # merged into one, it would act on both
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it lists the weight below an adapter on the head or the embedding, too
        most = set(get_peft_model_state_dict(wrapped))
    least = set(get_peft_model_state_dict(wrapped, save_embedding_layers=False))  # as train/saving.py writes it
    check_tensors(least, most, base, adapter)
    return wrapped.eval()


def check_tensors(least: set[str], most: set[str], base: Path, adapter: Path) -> None:
    """UserError unless the adapter's file holds the tensors it needs, and none that this base has no place for."""
    with safe_open(adapter / ADAPTER_WEIGHTS, framework="pt") as file:
        found = set(file.keys())
    missing, extra = sorted(least - found), sorted(found - most)
    if missing or extra:
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


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch ran out of memory, on a GPU or a CPU; the latter has no exception of its own."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return "can't allocate memory" in str(error) or "not enough memory" in str(error)
