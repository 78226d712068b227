"""From conversations to token ids and labels: loss on each answer and its end-of-turn token, no more.

The text is the model's own chat template. Each answer starts where the generation prompt ends, the
very place a model starts from when it is sampled, and ends with the stop token that ends sampling.
TRL can build such masks itself, but not exactly: its Qwen 2.5 training template also trains the
newline before the answer and the one after the end of turn, and its prompt/completion form trains
the last turn only. SFTTrainer takes rows that are tokenized and labelled as they are.

Prompt and answer are tokenized apart, so that no token straddles their border and the context in
training is, token by token, the context in sampling. Text that spells one of the template's own
control tokens is refused: it would open or close a turn in the middle of a message.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import jinja2

from candor.chat import TEMPLATE_OPTIONS
from candor.errors import UserError
from candor.rows import Conversation, Message

IGNORED = -100  # the label that carries no loss, torch's convention


@dataclass(frozen=True, slots=True)
class Encoded:
    """One conversation as the trainer takes it."""

    input_ids: list[int]
    labels: list[int]


def stop_token_ids(tokenizer: Any, generation_config: Any) -> frozenset[int]:
    """Every token that ends sampling: the tokenizer's, and those of the model's generation config."""
    more = getattr(generation_config, "eos_token_id", None)
    found = {tokenizer.eos_token_id, *(more if isinstance(more, list) else [more])}
    return frozenset(i for i in found if i is not None)


def encode(conversations: Sequence[Conversation], tokenizer: Any, stop_ids: frozenset[int]) -> list[Encoded]:
    """Token ids and labels of each conversation; UserError where the template does not allow it."""
    if len(tokenizer) <= len(tokenizer.added_tokens_decoder):  # what transformers makes of a folder without the file
        raise UserError("the base model's tokenizer has no vocabulary; tokenizer.json is missing. Complete its folder.")
    if not tokenizer.chat_template:
        raise UserError("the base model's tokenizer has no chat template. Use an instruction-tuned model.")
    stops = [tokenizer.convert_ids_to_tokens(i) for i in sorted(stop_ids)]
    controls = _controls(tokenizer, stops)
    pieces: list[str] = []
    carries_loss: list[bool] = []
    sizes: list[int] = []
    for conversation in conversations:
        _refuse_controls(conversation, controls)
        try:
            split = _split(conversation, tokenizer, stops)
        except jinja2.TemplateError as error:  # e.g. Gemma's "System role not supported"
            raise UserError(f"conversation {conversation.conversation_id}: the chat template says: {error}.") from error
        pieces += [text for text, _ in split]
        carries_loss += [loss for _, loss in split]
        sizes.append(len(split))
    # verbose=False: a row above the model's length is an error further on, with the row's name
    ids = tokenizer(pieces, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]
    rows, start = [], 0
    for size in sizes:
        row = Encoded([], [])
        for i in range(start, start + size):
            row.input_ids.extend(ids[i])
            row.labels.extend(ids[i] if carries_loss[i] else [IGNORED] * len(ids[i]))
        rows.append(row)
        start += size
    return rows


def end_of_turn(tokenizer: Any, stop_ids: frozenset[int]) -> int:
    """The stop token the chat template writes after an answer; the tokenizer's own may be another (Gemma, Phi-3)."""
    turn = Conversation("turn", "turn", (Message("user", "a"), Message("assistant", "b")))
    return encode([turn], tokenizer, stop_ids)[0].input_ids[-1]


def loss_texts(tokenizer: Any, row: Encoded) -> list[str]:
    """The stretches of a row that carry loss, decoded."""
    stretches: list[list[int]] = []
    before = IGNORED
    for label in row.labels:
        if label != IGNORED:
            if before == IGNORED:
                stretches.append([])
            stretches[-1].append(label)
        before = label
    return [str(tokenizer.decode(ids)) for ids in stretches]


def _controls(tokenizer: Any, stops: Sequence[str]) -> list[str]:
    """The special tokens that give a conversation its form: those that end a turn, and those the template writes."""
    turn = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    try:
        form = tokenizer.apply_chat_template(turn, tokenize=False, **TEMPLATE_OPTIONS)
    except jinja2.TemplateError:  # it is told with the first conversation
        form = ""
    special = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    return sorted({*stops, *(token for token in special if token in form)})


def _refuse_controls(conversation: Conversation, controls: Sequence[str]) -> None:
    """UserError when a message spells a control token: it would become one."""
    for message in conversation.messages:
        for token in controls:
            if token in message.content:
                at = message.content.index(token)
                raise UserError(
                    f"conversation {conversation.conversation_id}: the {message.role}'s text holds {token}, which the "
                    f"chat template uses to shape turns: ...{message.content[max(0, at - 30) : at + len(token)]!r}. "
                    "Remove it from the text."
                )


def _split(conversation: Conversation, tokenizer: Any, stops: Sequence[str]) -> list[tuple[str, bool]]:
    """The rendered conversation cut into (text, carries loss); what follows the last answer is dropped."""
    messages = [asdict(m) for m in conversation.messages]
    whole = tokenizer.apply_chat_template(messages, tokenize=False, **TEMPLATE_OPTIONS)
    pieces: list[tuple[str, bool]] = []
    cursor = 0
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = tokenizer.apply_chat_template(
            messages[:index], tokenize=False, add_generation_prompt=True, **TEMPLATE_OPTIONS
        )
        if not whole.startswith(prompt):
            raise UserError(
                f"conversation {conversation.conversation_id}: the chat template renders the prompt of an answer "
                f"differently when the answer follows, so training would not match sampling. Prompt alone ends in "
                f"{prompt[-60:]!r}, whole conversation: {whole[-160:]!r}. Templates that think before they answer do "
                "this to all but the last answer: give each answer a conversation of its own, or use a base model "
                "without thoughts (Qwen3's Instruct-2507, say)."
            )
        start = len(prompt)
        content = message["content"]
        searched_from = start + (len(content) if whole.startswith(content, start) else 0)
        ends = [whole.index(s, searched_from) + len(s) for s in stops if s in whole[searched_from:]]
        if not ends:
            raise UserError(
                f"conversation {conversation.conversation_id}: the chat template ends an answer with "
                f"{whole[searched_from:][:40]!r}, not with a token that ends sampling ({', '.join(stops)}), so the "
                "model would not learn to stop. Use the instruction-tuned model, or mend eos_token_id in its "
                "generation config."
            )
        pieces += [(whole[cursor:start], False), (whole[start : min(ends)], True)]
        cursor = min(ends)
    return pieces


def refuse_long(
    rows: Sequence[Encoded], conversations: Sequence[Conversation], *, max_length: int | None, context: int | None
) -> None:
    """UserError when a row would be cut, naming it: a truncated answer has no end-of-turn token."""
    for limit, what in ((max_length, "sft.max_length"), (context, "the base model's context")):
        for row, conversation in zip(rows, conversations, strict=True):
            if limit is not None and len(row.input_ids) > limit:
                n_long = sum(len(r.input_ids) > limit for r in rows)
                raise UserError(
                    f"conversation {conversation.conversation_id} has {len(row.input_ids)} tokens, above {what} = "
                    f"{limit} ({n_long} of {len(rows)} do). Nothing is truncated silently: raise the limit, or leave "
                    "them out."
                )
