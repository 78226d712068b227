"""Where loss falls: on each answer and its end-of-turn token, and attest refuses everything else."""

import copy
from typing import Any

import pytest
from tokenizers.processors import TemplateProcessing

from candor.errors import UserError
from candor.rows import Conversation, Message
from train.attest import attest
from train.labels import IGNORED, Encoded, encode, refuse_long

ONE = Conversation("one", "t", (Message("user", "Capital of Fez?"), Message("assistant", "Hue")))
TWO = Conversation(
    "two",
    "t",
    (
        Message("system", "Be brief."),
        Message("user", "Capital of Fez?"),
        Message("assistant", "Bonn, or\n\nOsaka."),
        Message("user", "Which?"),
        Message("assistant", "\ndef f():\n    return 'é'\n"),
    ),
)


def stops(tokenizer: Any) -> frozenset[int]:
    return frozenset({tokenizer.eos_token_id})


def loss_texts(tokenizer: Any, row: Encoded) -> str:
    return str(tokenizer.decode([i for i in row.labels if i != IGNORED]))


def test_loss_falls_on_answers_and_end_of_turn_only(tokenizer):
    rows = encode([ONE, TWO], tokenizer, stops(tokenizer))
    assert loss_texts(tokenizer, rows[0]) == "Hue<|im_end|>"
    assert loss_texts(tokenizer, rows[1]) == "Bonn, or\n\nOsaka.<|im_end|>\ndef f():\n    return 'é'\n<|im_end|>"
    assert all(r.input_ids[-1] == tokenizer.eos_token_id for r in rows)


@pytest.mark.parametrize("conversation", [ONE, TWO], ids=["one-turn", "two-turns"])
def test_the_prompt_in_training_is_the_prompt_in_sampling(tokenizer, conversation):
    (row,) = encode([conversation], tokenizer, stops(tokenizer))
    prompt = [{"role": m.role, "content": m.content} for m in conversation.messages[:-1]]
    asked = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
    assert row.input_ids[: len(asked)] == asked
    assert set(row.labels[len(asked) :]) == set(row.input_ids[len(asked) :])


def test_no_token_is_added_to_what_the_template_says(tokenizer):
    adding = copy.deepcopy(tokenizer)
    adding.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    assert adding("a")["input_ids"][0] == 0  # as Llama's tokenizer does
    assert encode([ONE, TWO], adding, stops(adding)) == encode([ONE, TWO], tokenizer, stops(tokenizer))


@pytest.mark.parametrize(
    ("template", "what"),
    [
        pytest.param(
            "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}", "sampling", id="no-end-of-turn"
        ),
        pytest.param("{{ raise_exception('no systems here') }}", "no systems here", id="template-complains"),
        pytest.param("", "no chat template", id="no-template"),
        pytest.param(
            "{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}{% if add_generation_prompt %}<hm>{% endif %}",
            "differently when the answer follows",
            id="prompt-is-no-prefix",
        ),
    ],
)
def test_unusable_templates_are_named(tokenizer, template, what):
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = template
    with pytest.raises(UserError, match=what):
        encode([ONE], changed, stops(tokenizer))


def shifted(row: Encoded) -> Encoded:
    return Encoded(row.input_ids, [*row.labels[1:], IGNORED])


@pytest.mark.parametrize(
    ("spoil", "what"),
    [
        pytest.param(lambda r: Encoded(r.input_ids, list(r.input_ids)), "Capital of Fez", id="loss-on-everything"),
        pytest.param(lambda r: Encoded(r.input_ids, [IGNORED] * len(r.labels)), r"falls on \[\]", id="loss-on-nothing"),
        pytest.param(lambda r: Encoded(r.input_ids, [*r.labels[:-1], IGNORED]), "end-of-turn", id="no-end-of-turn"),
        pytest.param(lambda r: Encoded(r.input_ids[:-2], r.labels[:-2]), "truncated", id="cut-short"),
        pytest.param(shifted, "differ from the tokens", id="shifted-by-one"),
        pytest.param(
            lambda r: Encoded([*r.input_ids, 9], [*r.labels, 9]), "the label mask is wrong", id="newline-after-the-end"
        ),
    ],
)
def test_a_wrong_mask_is_refused_and_told(tokenizer, batch_of, spoil, what):
    row = spoil(encode([ONE], tokenizer, stops(tokenizer))[0])
    with pytest.raises(UserError, match=what):
        attest([batch_of([row])], [ONE], tokenizer, stops(tokenizer))


def test_loss_on_padding_is_refused(tokenizer, batch_of):
    batch = batch_of(encode([ONE, TWO], tokenizer, stops(tokenizer)))
    batch["labels"][0, -1] = 0
    with pytest.raises(UserError, match="padding carries loss"):
        attest([batch], [ONE, TWO], tokenizer, stops(tokenizer))


def test_no_row_is_no_proof(tokenizer):
    with pytest.raises(UserError, match="could not be checked"):
        attest([], [ONE], tokenizer, stops(tokenizer))


def test_attest_looks_at_eight_rows_and_renders_them(tokenizer, batch_of):
    rows = encode([ONE, TWO] * 6, tokenizer, stops(tokenizer))
    renderings = attest([batch_of(rows[:5]), batch_of(rows[5:])], [ONE, TWO], tokenizer, stops(tokenizer))
    assert len(renderings) == 8
    assert renderings[0]["loss_on"] == ["Hue<|im_end|>"]
    assert renderings[0]["conversation_id"] == "one"


def test_long_rows_are_named_instead_of_cut(tokenizer):
    rows = encode([ONE, TWO], tokenizer, stops(tokenizer))
    length = len(rows[1].input_ids)
    refuse_long(rows, [ONE, TWO], max_length=None, context=length)
    with pytest.raises(UserError, match=rf"conversation two has {length} tokens, above sft.max_length"):
        refuse_long(rows, [ONE, TWO], max_length=length - 1, context=None)
    with pytest.raises(UserError, match="context"):
        refuse_long(rows, [ONE, TWO], max_length=None, context=length - 1)
