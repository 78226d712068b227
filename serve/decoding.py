"""Sample replies of many prompts, a token a step for every slot of a batch.

Each prompt is read once and its keys and values are forked for its draws. Replies wait in order until slots
are free; a slot whose reply has ended is carried along until enough have gathered to read the next prompts
for them, or, when no reply waits any more, to copy the others into a smaller batch.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from serve.ops.draw import draw
from serve.ops.philox import signed64, uniforms
from serve.ops.sketch import sketch_logits
from serve.prefill import Prefilled, usable_logits
from serve.slots import Slots

KEEP_SHARE = 0.8  # slots are filled anew, or the batch made smaller, when fewer than this share are still going
_KEEP_SHARE_GRAPHS = 0.5  # the batch is made smaller, where that means recording the step anew


@dataclass(frozen=True, slots=True)
class Row:
    """One reply to be made: which prompt, and what addresses its random numbers."""

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


class Waiting:
    """Rows that wait for a slot, and the prompts that have been read for them."""

    def __init__(self, rows: Sequence[Row], read: Callable[[list[int]], Prefilled]) -> None:
        """``read`` gives the prompts of these numbers, read, in that order."""
        self.rows = rows
        self.n_taken = 0
        self._read = read
        self._start: Prefilled | None = None
        self._places: dict[int, int] = {}  # by prompt: its row in ``_start``

    def __len__(self) -> int:
        return len(self.rows) - self.n_taken

    def take(self, n: int) -> Iterator[tuple[Prefilled, list[int], range]]:
        """The next ``n`` rows in pieces: read prompts, which of them each row continues, and the rows' numbers."""
        last = min(len(self.rows), self.n_taken + n)
        while self.n_taken < last:
            if self.rows[self.n_taken].prompt not in self._places:
                prompts = list(dict.fromkeys(r.prompt for r in self.rows[self.n_taken : last]))
                self._start, self._places = self._read(prompts), {p: i for i, p in enumerate(prompts)}
            first = self.n_taken
            while self.n_taken < last and self.rows[self.n_taken].prompt in self._places:
                self.n_taken += 1
            assert self._start is not None
            yield (
                self._start,
                [self._places[r.prompt] for r in self.rows[first : self.n_taken]],
                range(first, self.n_taken),
            )
        if self and self._start is not None and (prompt := self.rows[last].prompt) in self._places:
            self._start, self._places = self._start.only(self._places[prompt]), {prompt: 0}  # its other draws wait
        else:
            self._start, self._places = None, {}


def decode(
    model: Any,
    waiting: Waiting,
    *,
    n_slots: int,
    capacity: int,
    graphs: bool,
    key: int,
    temperature: float,
    max_tokens: int,
    end_ids: torch.Tensor,
    banned: torch.Tensor,
) -> Sequences:
    """Draw a reply per row: ``n_slots`` at a time, of ``capacity`` columns each, with or without CUDA graphs."""
    device = model.device
    n_rows = len(waiting.rows)
    tokens = torch.zeros(n_rows, max_tokens, dtype=torch.int64, device=device)
    lengths = torch.zeros(n_rows, dtype=torch.int64, device=device)
    logprobs = torch.zeros(n_rows, dtype=torch.float64, device=device)
    ended = torch.zeros(n_rows, dtype=torch.bool, device=device)

    slots = Slots(model, min(n_slots, n_rows), capacity, graphs=graphs)
    n = len(slots)
    reply = torch.zeros(n, dtype=torch.int64, device=device)  # the row each slot makes
    step = torch.zeros(n, dtype=torch.int64, device=device)  # tokens drawn of it
    going = torch.zeros(n, dtype=torch.bool, device=device)
    numbers = torch.zeros(n, max_tokens, dtype=torch.float64, device=device)
    logits = torch.zeros(n, len(banned), device=device)
    enough = _KEEP_SHARE_GRAPHS if graphs else KEEP_SHARE
    n_going = 0
    while n_going or waiting:
        if waiting and n_going < KEEP_SHARE * len(slots):
            free = (~going).nonzero().flatten()
            for start, prompts, rows in waiting.take(len(free)):
                where, free = free[: len(rows)], free[len(rows) :]
                place = torch.tensor(prompts, device=device)
                slots.place(where, start, place)
                logits = logits.to(start.logits.dtype)
                logits[where] = start.logits[place]
                numbers[where] = random_numbers([waiting.rows[i] for i in rows], key, max_tokens, device)
                reply[where] = torch.tensor(rows, device=device)
                step[where], going[where] = 0, True
            del start, place  # the prompts' keys and values are in the slots now
        position = step.clamp(max=max_tokens - 1)[:, None]
        drawn, logprob = _draw(logits, numbers.gather(1, position)[:, 0], temperature)
        ends = torch.isin(drawn, end_ids)
        alive = reply[going]
        tokens[alive, step[going]] = drawn[going]
        logprobs[alive] += logprob[going]
        ended[alive] = ends[going]
        step += going
        lengths[alive] = step[going]
        going &= ~ends & (step < max_tokens)
        n_going = int(going.sum())
        if n_going == 0:
            continue
        if not waiting and n_going < enough * len(slots):
            keep = slots.keep(going)
            reply, step, going, numbers, drawn = reply[keep], step[keep], going[keep], numbers[keep], drawn[keep]
        logits = usable_logits(slots.step(drawn), banned)
        slots.end += going
    return Sequences(tokens.cpu(), lengths.tolist(), ended.tolist(), logprobs.tolist())


def _draw(logits: torch.Tensor, numbers: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """One token per row of logits [rows, vocab], and its log-probability at temperature 1."""
    sketch = sketch_logits(logits, 1.0 / temperature if temperature else 0.0, raw=True)
    drawn = draw(sketch, numbers[:, None])
    assert drawn.raw_logprobs is not None
    return drawn.tokens[:, 0], drawn.raw_logprobs[:, 0]


def random_numbers(rows: Sequence[Row], key: int, n: int, device: torch.device) -> torch.Tensor:
    """The uniforms [rows, n] that decide each row's first ``n`` tokens."""
    stream = torch.tensor([signed64(r.stream) for r in rows], device=device)
    draws = torch.tensor([r.draw for r in rows], device=device)
    # the second uniform of each pair is left for engines that draw in two stages
    made, _ = uniforms(key, stream[:, None], draws[:, None], torch.arange(n, device=device)[None, :])
    return made
