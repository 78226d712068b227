"""Sample replies of a group of prompts together, one token a step.

Each prompt is read once and its keys and values are forked for its draws. Rows that have ended are
carried along until enough have gathered that copying the others into a smaller batch costs less
than the steps they waste.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from serve.ops.draw import draw
from serve.ops.philox import signed64, uniforms
from serve.ops.sketch import sketch_logits
from serve.prefill import Prefilled, usable_logits

KEEP_SHARE = 0.8  # the batch is made smaller when fewer of its rows than this are still going
_POSITIONS = 32  # random numbers are made for so many steps at a time: one by one the call costs more than the numbers


@dataclass(frozen=True, slots=True)
class Row:
    """One reply to be made: which prompt of the group, and what addresses its random numbers."""

    prompt: int
    stream: int
    draw: int


@dataclass(frozen=True, slots=True)
class Sequences:
    """What was drawn, on the CPU."""

    tokens: torch.Tensor  # [rows, max_tokens] int64; what lies beyond a row's length means nothing
    lengths: list[int]  # tokens drawn, the end-of-turn token included
    ended: list[bool]  # False when cut by max_tokens
    logprobs: list[float]  # sum over the tokens drawn, at temperature 1


def decode(
    model: Any,
    start: Prefilled,
    rows: Sequence[Row],
    *,
    key: int,
    temperature: float,
    max_tokens: int,
    end_ids: torch.Tensor,
    banned: torch.Tensor,
) -> Sequences:
    """Draw a reply per row, continuing from prompts that have been read."""
    device = start.logits.device
    prompt = torch.tensor([r.prompt for r in rows], device=device)
    tokens = torch.zeros(len(rows), max_tokens, dtype=torch.int64, device=device)
    lengths = torch.zeros(len(rows), dtype=torch.int64, device=device)
    logprobs = torch.zeros(len(rows), dtype=torch.float64, device=device)
    ended = torch.zeros(len(rows), dtype=torch.bool, device=device)
    numbers = _Numbers(rows, key, device)

    cache, width = start.cache, start.attend.shape[1]
    cache.batch_select_indices(prompt)
    attend = torch.ones(len(rows), width + max_tokens, dtype=torch.int64, device=device)
    attend[:, :width] = start.attend[prompt]
    position, logits = start.lengths[prompt], start.logits[prompt]
    batch = torch.arange(len(rows), device=device)  # the reply each row of the batch belongs to
    for step in range(max_tokens):
        drawn, logprob = _draw(logits, numbers.at(step)[batch], temperature)
        going = ~ended[batch]
        alive = batch[going]
        tokens[alive, step] = drawn[going]
        logprobs[alive] += logprob[going]
        lengths[alive] = step + 1
        ended[alive] = torch.isin(drawn[going], end_ids)
        keep = (~ended[batch]).nonzero().flatten()
        if len(keep) == 0 or step + 1 == max_tokens:
            break
        if len(keep) < KEEP_SHARE * len(batch):
            cache.batch_select_indices(keep)
            batch, drawn, attend, position = batch[keep], drawn[keep], attend[keep], position[keep]
        output = model(
            input_ids=drawn[:, None],
            attention_mask=attend[:, : width + step + 1],
            position_ids=(position + step)[:, None],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits = usable_logits(output.logits[:, -1], banned)
    return Sequences(tokens.cpu(), lengths.tolist(), ended.tolist(), logprobs.tolist())


def _draw(logits: torch.Tensor, numbers: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """One token per row of logits [rows, vocab], and its log-probability at temperature 1."""
    sketch = sketch_logits(logits, 1.0 / temperature if temperature else 0.0, raw=True)
    drawn = draw(sketch, numbers[:, None])
    assert drawn.raw_logprobs is not None
    return drawn.tokens[:, 0], drawn.raw_logprobs[:, 0]


class _Numbers:
    """The uniforms of every row, made a few positions at a time."""

    def __init__(self, rows: Sequence[Row], key: int, device: torch.device) -> None:
        self._key = key
        self._stream = torch.tensor([signed64(r.stream) for r in rows], device=device)
        self._draw = torch.tensor([r.draw for r in rows], device=device)
        self._made = torch.empty(len(rows), 0, dtype=torch.float64, device=device)
        self._first = 0

    def at(self, position: int) -> torch.Tensor:
        """The uniform [rows] that decides the token at this position."""
        if not self._first <= position < self._first + self._made.shape[1]:
            self._first = position
            positions = torch.arange(position, position + _POSITIONS, device=self._stream.device)
            # the second uniform of each pair is left for engines that draw in two stages
            self._made, _ = uniforms(self._key, self._stream[:, None], self._draw[:, None], positions[None, :])
        return self._made[:, position - self._first]
