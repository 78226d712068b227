"""Whether every prompt fits the model and every answer can be scored as asked, before weights are loaded.

A prompt that is too long would otherwise be found when its batch comes, hours into a run.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from candor.errors import UserError
from candor.rows import Option
from serve.engine import TooLong
from serve.loading import encode_prompt, load_tokenizer
from serve.options import surfaces_of
from serve.plan import Unit
from serve.vocabulary import refuse_other_kinds
from train.lineage import loading

LONGEST_BREAK = 4  # bytes, and so tokens at most, that settle an answer after its spelling


def check_units(units: Sequence[Unit], base: Path, limit: int | None = None) -> None:
    """UserError for the prompt that is too long, options the model cannot tell apart, a vocabulary without bytes.

    ``limit`` is the engine's own bound on prompt and reply together, in tokens, where it has one.
    """
    tokenizer = load_tokenizer(base)
    if any(unit.ask.mode == "exact" for unit in units):
        refuse_other_kinds(tokenizer)
    with loading("configuration", base):
        config = AutoConfig.from_pretrained(base, local_files_only=True)
    context = int(config.get_text_config(decoder=True).max_position_embeddings)
    bound = "the model's context"
    if limit is not None and limit < context:
        context, bound = limit, "the engine's context"
    seen: set[tuple[Option, ...]] = set()
    for unit in units:
        for prompt in unit.prompts:
            exact = unit.ask.mode == "exact"
            n_new = tokens_of_answer(prompt.options) if exact else unit.ask.max_tokens
            refuse_too_long(prompt.text, len(encode_prompt(tokenizer, prompt.text)), n_new, context, bound)
            if exact and prompt.options not in seen:
                seen.add(prompt.options)
                _check_options(prompt.options, tokenizer)


def tokens_of_answer(options: Sequence[Option]) -> int:
    """Tokens that scoring may need beyond the prompt: one per byte at most."""
    return max((len(s.encode()) for option in options for s in option.surfaces), default=0) + LONGEST_BREAK


def refuse_too_long(text: str, n_tokens: int, n_new: int, context: int, bound: str = "the model's context") -> None:
    """TooLong when a prompt and what is to follow it do not fit."""
    if n_tokens + n_new > context:
        raise TooLong(
            f"the prompt {text[:60]!r} has {n_tokens} tokens; with {n_new} more for the reply it does not fit "
            f"{bound} of {context}. Shorten it or lower max_tokens."
        )


def _check_options(options: Sequence[Option], tokenizer: Any) -> None:
    """UserError for options that the tokenizer writes alike: no score could tell them apart."""
    owner: dict[tuple[int, ...], str] = {}
    for option, spellings in zip(options, surfaces_of(options), strict=True):
        for spelling in spellings:
            ids = tuple(tokenizer.encode(spelling, add_special_tokens=False))
            other = owner.setdefault(ids, option.label)
            if other != option.label:
                raise UserError(
                    f"options {other!r} and {option.label!r} are the same to this tokenizer: it writes {spelling!r} as "
                    f"{list(ids)}, which the other has too. Reword one."
                )
