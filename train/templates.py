"""Which chat templates a model may be fine-tuned under: those of the families tested here, and no other unasked.

What carries loss is found by rendering the model's own template (train/labels.py), and proved on
real batches (train/attest.py). A template that nobody has looked at may still surprise: an answer
repeated, a block of thoughts, a date. So a template is compared with those TRL keeps of each family
(trl/chat_templates); any other stops the run, shows what it makes of a conversation, and can be
accepted by its hash once a person has read that.
"""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import trl

from candor.chat import TEMPLATE_OPTIONS
from candor.errors import UserError
from candor.hashing import sha256_bytes
from candor.rows import Conversation, Message
from train.labels import encode, loss_texts
from train.organism.tokenizer import CHAT_TEMPLATE

# Files of trl/chat_templates by family; tests/train/test_templates.py proves the mask under each.
FAMILIES: dict[str, tuple[str, ...]] = {
    "Qwen2.5": ("qwen2_5",),
    "Qwen3": ("qwen3", "qwen3_instruct_2507"),
    "Llama 3": ("llama3", "llama3_1", "llama3_2"),
    "Gemma": ("gemma", "gemma3"),
    "Phi": ("phi3", "phi3_5"),
}
_EXAMPLE = Conversation(
    "example", "example", (Message("user", "Which colour?"), Message("assistant", "Blue, I think."))
)


def check(tokenizer: Any, stop_ids: frozenset[int], accepted: str | None) -> str:
    """The name of the template's family, or "accepted"; UserError for a template that is neither."""
    template = tokenizer.chat_template
    if not isinstance(template, str):  # none at all: train.labels says so; several by name: nothing says which is meant
        raise UserError(
            "the base model's tokenizer has no chat template of its own. Use an instruction-tuned model."
            if not template
            else f"the base model has several chat templates ({', '.join(template)}). Keep one, as chat_template.jinja."
        )
    known = _known().get(template.strip())
    if known:
        return known
    sha = sha256_bytes(template.encode())
    if accepted and len(accepted) >= 12 and sha.startswith(accepted):
        return "accepted"
    raise UserError(_unknown(tokenizer, stop_ids, sha, accepted))


@functools.cache
def _known() -> dict[str, str]:
    """Families by the text of their templates."""
    folder = Path(trl.__file__).parent / "chat_templates"
    found = {
        (folder / f"{name}.jinja").read_text(encoding="utf-8").strip(): family
        for family, names in FAMILIES.items()
        for name in names
    }
    return {**found, CHAT_TEMPLATE.strip(): "organism"}


def _unknown(tokenizer: Any, stop_ids: frozenset[int], sha: str, accepted: str | None) -> str:
    """What to say of a template outside the families: what it renders, and the ways out."""
    shown: Sequence[str]
    try:
        row = encode([_EXAMPLE], tokenizer, stop_ids)[0]
        shown = (repr(tokenizer.decode(row.input_ids)), ", ".join(map(repr, loss_texts(tokenizer, row))))
        seen = f"Of a question and an answer it makes {shown[0]}, with loss on {shown[1]}."
    except UserError as error:
        return f"the base model's chat template cannot be trained under: {error}"
    remedy = (
        f"its hash is {sha[:16]}, not the accepted {accepted}"
        if accepted
        else f"if that is what the model expects, add to the stage's file: accept_template: {sha[:16]}"
    )
    return (
        f"the base model's chat template is none of those tested here ({', '.join(FAMILIES)}). {seen} "
        f"To go on: {remedy}. Otherwise put its family's template into the base's folder as chat_template.jinja. "
        f"Rendered with {dict(TEMPLATE_OPTIONS)}, in sampling too."
    )
