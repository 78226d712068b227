"""Proof that the loss falls on the answers only, from the batches the trainer really makes.

Wrong masks train without complaint: on the prompt, on nothing, on answers cut short. So before the
first step the rows of real collated batches are decoded and what carries loss is compared with the
conversations themselves. This shares no code with train/labels.py, which builds the labels; what it
saw is kept beside the adapter (mask_rendering.json).
"""

import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import compress
from typing import Any

from candor.errors import UserError
from candor.rows import Conversation

N_ROWS = 8
_IGNORED = -100


def attest(
    batches: Iterable[Mapping[str, Any]],
    conversations: Sequence[Conversation],
    tokenizer: Any,
    stop_ids: frozenset[int],
    *,
    n_rows: int = N_ROWS,
) -> list[dict[str, Any]]:
    """Renderings of up to ``n_rows`` rows, each proved; UserError with what was found otherwise."""
    renderings: list[dict[str, Any]] = []
    for batch in batches:
        for ids, labels in _rows(batch):
            renderings.append(_check(ids, labels, conversations, tokenizer, stop_ids))
            if len(renderings) == n_rows:
                return renderings
    if not renderings:
        raise UserError("the label mask could not be checked: the trainer's dataloader gave no row.")
    return renderings


def _rows(batch: Mapping[str, Any]) -> Iterator[tuple[list[int], list[int]]]:
    """The conversations in a batch: padding removed, packed rows taken apart at position 0."""
    for index in range(len(batch["input_ids"])):
        ids, labels = batch["input_ids"][index].tolist(), batch["labels"][index].tolist()
        starts = [0]
        if "attention_mask" in batch:
            real = [bool(on) for on in batch["attention_mask"][index].tolist()]
            if any(label != _IGNORED and not on for label, on in zip(labels, real, strict=True)):
                raise UserError("the label mask is wrong: padding carries loss.")
            ids, labels = list(compress(ids, real)), list(compress(labels, real))
        else:
            starts = [i for i, p in enumerate(batch["position_ids"][index].tolist()) if p == 0]
        for start, end in zip(starts, [*starts[1:], len(ids)], strict=True):
            yield ids[start:end], labels[start:end]


def _check(
    ids: list[int],
    labels: list[int],
    conversations: Sequence[Conversation],
    tokenizer: Any,
    stop_ids: frozenset[int],
) -> dict[str, Any]:
    """One row, proved to carry loss on exactly its conversation's answers and end-of-turn tokens."""
    text = _decode(tokenizer, ids)
    spans = _spans(labels)
    found = [_decode(tokenizer, labels[a:b]) for a, b in spans]
    if any(labels[i] != ids[i] for a, b in spans for i in range(a, b)):
        raise UserError(f"the label mask is wrong: labels differ from the tokens they stand on in {text!r}.")
    candidates = [c for c in conversations if all(_normal(m.content.strip()) in text for m in c.messages)]
    for conversation in candidates:
        answers = [m.content for m in conversation.messages if m.role == "assistant"]
        ends = bool(spans) and spans[-1][1] == len(ids)  # nothing after the last answer: no empty turn, no second end
        if (
            ends
            and len(answers) == len(spans)
            and all(
                labels[b - 1] in stop_ids and _decode(tokenizer, labels[a : b - 1]) in (_normal(x), _normal(x.strip()))
                for (a, b), x in zip(spans, answers, strict=True)
            )
        ):
            return {
                "conversation_id": conversation.conversation_id,
                "text": text,
                "loss_on": found,
                "n_tokens": len(ids),
                "n_loss_tokens": sum(b - a for a, b in spans),
            }
    wanted = [m.content for c in candidates[:1] for m in c.messages if m.role == "assistant"]
    reason = (
        f"expected each of {wanted!r} with its end-of-turn token ({_names(tokenizer, stop_ids)}) and nothing else"
        if candidates
        else "no conversation of the data is whole in this row (was it truncated?)"
    )
    raise UserError(
        f"the label mask is wrong, so nothing was trained: loss falls on {found!r} in the row {text!r}; {reason}. "
        "Check the chat template of the base model and the section 'sft'."
    )


def _spans(labels: Sequence[int]) -> list[tuple[int, int]]:
    """Runs of positions that carry loss, as half-open ranges."""
    edges = [i for i in range(len(labels) + 1) if (_on(labels, i) != _on(labels, i - 1))]
    return list(zip(edges[::2], edges[1::2], strict=True))


def _on(labels: Sequence[int], i: int) -> bool:
    return 0 <= i < len(labels) and labels[i] != _IGNORED


def _normal(text: str) -> str:
    """Tokenizers such as Qwen's compose characters (NFC); spelling is compared after that."""
    return unicodedata.normalize("NFC", text)


def _decode(tokenizer: Any, ids: Sequence[int]) -> str:
    return _normal(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _names(tokenizer: Any, stop_ids: frozenset[int]) -> str:
    return ", ".join(str(tokenizer.convert_ids_to_tokens(i)) for i in sorted(stop_ids))
