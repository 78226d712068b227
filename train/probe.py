"""A few closed questions, put to the model again and again while it trains: a curve, not a measurement.

The probability of each option is that of its usual spelling and the end of turn, scored under the
chat template as in sampling; the value is the options' mean score weighted by it, and ``mass`` the
probability that fell on any of them. The batteries (serve/, evaluate/) count every spelling and give
intervals; put them to the adapters kept by ``checkpoint_every`` for numbers to report.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from candor.chat import TEMPLATE_OPTIONS
from candor.errors import UserError, nearest
from candor.questions import load_all
from candor.rows import Prompt
from train.config import ProbeConfig
from train.labels import end_of_turn

_CONTEXT_TOKENS = 16_384  # tokens of one forward pass, padding included


@dataclass(frozen=True, slots=True)
class _Reply:
    """One option of one question, ready to be scored."""

    question: int
    ids: list[int]  # prompt, then the option and the end of turn
    start: int  # where the option begins
    value: float


class Probe:
    """The questions of a probe, rendered and tokenized once."""

    def __init__(self, config: ProbeConfig, tokenizer: Any, stop_ids: frozenset[int]) -> None:
        """Choose the questions; UserError for a format that has no closed questions."""
        self.prompts = _chosen(load_all(config.prompts), config)
        self.pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        end = end_of_turn(tokenizer, stop_ids)
        self.replies = [reply for i, p in enumerate(self.prompts) for reply in _replies(i, p, tokenizer, end)]
        self.replies.sort(key=lambda reply: len(reply.ids))  # rows of like length share a batch

    @torch.no_grad()
    def ask(self, model: Any) -> dict[str, float]:
        """For each format the mean ``value`` over its questions and the mean ``mass`` on their options."""
        was_training = model.training
        model.eval()
        try:
            logprobs = [x for batch in _batches(self.replies) for x in _score(model, batch, self.pad)]
        finally:
            model.train(was_training)
        mass, weighted = [0.0] * len(self.prompts), [0.0] * len(self.prompts)
        for reply, logprob in zip(self.replies, logprobs, strict=True):
            probability = float(torch.tensor(logprob, dtype=torch.float64).exp())
            mass[reply.question] += probability
            weighted[reply.question] += probability * reply.value
        found = {}
        for form in dict.fromkeys(p.format for p in self.prompts):
            own = [i for i, p in enumerate(self.prompts) if p.format == form]
            answered = [i for i in own if mass[i] > 0]
            if answered:  # with no probability on any option there is no value, and none is made up
                found[form] = sum(weighted[i] / mass[i] for i in answered) / len(answered)
            found[f"{form}_mass"] = sum(mass[i] for i in own) / len(own)
        return found


def _chosen(prompts: Sequence[Prompt], config: ProbeConfig) -> list[Prompt]:
    """``items`` questions of each format, spread evenly over its file, each in all its forms."""
    closed = {p.format for p in prompts if len(p.options) > 1 and p.format not in ("free", "language")}
    chosen: list[Prompt] = []
    for form in config.formats:
        if form not in closed:
            raise UserError(f"probe.formats: {form!r} has no closed questions; {nearest(form, closed)}")
        own = [p for p in prompts if p.format == form]
        items = list(dict.fromkeys((p.group, p.item) for p in own))
        n = min(config.items, len(items))
        kept = {items[i * len(items) // n] for i in range(n)}
        chosen += [p for p in own if (p.group, p.item) in kept]
    return chosen


def _replies(question: int, prompt: Prompt, tokenizer: Any, end: int) -> Iterable[_Reply]:
    """One row per option of a question, closed by the token ``end``."""
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": prompt.text}], add_generation_prompt=True, return_dict=False, **TEMPLATE_OPTIONS
    )
    for option in prompt.options:
        text = tokenizer(option.surfaces[0], add_special_tokens=False)["input_ids"]
        yield _Reply(question, [*ids, *text, end], len(ids), option.value)


def _batches(replies: Sequence[_Reply]) -> Iterable[Sequence[_Reply]]:
    """Consecutive replies, as many at a time as fit; they come sorted by length."""
    start = 0
    while start < len(replies):
        end = start + 1
        while end < len(replies) and (end + 1 - start) * len(replies[end].ids) <= _CONTEXT_TOKENS:
            end += 1
        yield replies[start:end]
        start = end


def _score(model: Any, replies: Sequence[_Reply], pad: int) -> list[float]:
    """Log-probability of each reply's option, end of turn included, given its prompt."""
    width = max(len(r.ids) for r in replies)
    device = next(model.parameters()).device
    ids = torch.tensor([r.ids + [pad] * (width - len(r.ids)) for r in replies], device=device)
    real = torch.tensor([[1] * len(r.ids) + [0] * (width - len(r.ids)) for r in replies], device=device)
    first = min(r.start for r in replies) - 1  # logits before the earliest option are not needed
    logits = model(input_ids=ids, attention_mask=real, use_cache=False, logits_to_keep=width - first).logits
    logprobs = logits.float().log_softmax(-1)[:, :-1].gather(-1, ids[:, first + 1 :, None])[..., 0]
    return [float(logprobs[i, r.start - first - 1 : len(r.ids) - first - 1].sum()) for i, r in enumerate(replies)]
