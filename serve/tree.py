"""A tree of tokens behind a prompt, read by the model without copying the prompt.

All tokens of one prompt's tree lie side by side in one row of the batch; each sees the prompt, its own
ancestors and itself, and nothing else. So the prompt's keys and values are neither copied nor read once
per path, and a whole tree can be read in one forward pass.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from serve.prefill import Prefilled, as_mask, usable_logits

# Logits held at a time. Scoring makes about 28 bytes of each: 0.5 GB, and on a GPU 1.9 of the 2 that preflight counts.
_LOGITS = {"cpu": 1 << 24, "cuda": 1 << 26}


def rows_at_a_time(vocab: int, device: torch.device) -> int:
    """How many rows of logits are held at a time; at least one."""
    return max(1, _LOGITS.get(device.type, 1 << 24) // vocab)


@dataclass(frozen=True, slots=True)
class Branch:
    """A token to be read behind a prompt and its ancestors."""

    prompt: int  # row of the group
    token: int
    ancestors: tuple[int, ...]  # columns of the tokens before it, the first after the prompt first


@dataclass(frozen=True, slots=True)
class Grown:
    """Some of the branches that were asked for, read."""

    places: list[int]  # which of the branches
    columns: list[int]  # where each lies: what its children name as their last ancestor
    logits: torch.Tensor  # [branches, vocab] of what follows each


class TokenTree:
    """The trees of a group of prompts that have been read."""

    def __init__(self, model: Any, start: Prefilled, banned: torch.Tensor) -> None:
        self._model, self._start, self._banned = model, start, banned
        self.n_prompts = len(start.lengths)

    @property
    def n_columns(self) -> int:
        """Columns filled so far; the next tokens of each prompt lie from here on."""
        return int(self._start.cache.get_seq_length())

    def grow(self, branches: Sequence[Branch]) -> Iterator[Grown]:
        """Read the branches, a few columns at a time; each batch's logits before the next is run.

        A branch may have ancestors in the same batch: the i-th branch of a prompt lies i columns
        behind ``n_columns``.
        """
        rows: list[list[int]] = [[] for _ in range(self.n_prompts)]
        for place, branch in enumerate(branches):
            rows[branch.prompt].append(place)
        step = max(1, rows_at_a_time(len(self._banned), self._banned.device) // self.n_prompts)
        for first in range(0, max(map(len, rows), default=0), step):
            yield self._run(branches, [r[first : first + step] for r in rows])

    def _run(self, branches: Sequence[Branch], rows: list[list[int]]) -> Grown:
        width, before = max(map(len, rows)), self.n_columns
        device = self._start.attend.device
        # a filler is a token 0 that sees the prompt and itself, so that no row of the attention is empty
        ids = [[branches[i].token for i in r] + [0] * (width - len(r)) for r in rows]
        depths = [[len(branches[i].ancestors) for i in r] + [0] * (width - len(r)) for r in rows]
        output = self._model(
            input_ids=torch.tensor(ids, device=device),
            attention_mask=as_mask(self._see(branches, rows, width, before), self._model.dtype),
            position_ids=self._start.lengths[:, None] + torch.tensor(depths, device=device),
            past_key_values=self._start.cache,
            use_cache=True,
        )
        taken = [i * width + j for i, r in enumerate(rows) for j in range(len(r))]
        logits = output.logits.flatten(0, 1)[torch.tensor(taken, device=device)]
        return Grown(
            places=[place for r in rows for place in r],
            columns=[before + j for r in rows for j in range(len(r))],
            logits=usable_logits(logits, self._banned),
        )

    def _see(self, branches: Sequence[Branch], rows: list[list[int]], width: int, before: int) -> torch.Tensor:
        """What each new token sees [prompts, width, columns]."""
        longest = max(len(b.ancestors) for b in branches)
        seen = [[list(branches[r[j]].ancestors) if j < len(r) else [] for j in range(width)] for r in rows]
        padded = [
            [ancestors + [before + j] * (longest + 1 - len(ancestors)) for j, ancestors in enumerate(row)]
            for row in seen
        ]
        prompt = self._start.attend
        view = torch.zeros(self.n_prompts, width, before + width, dtype=torch.bool, device=prompt.device)
        view[:, :, : prompt.shape[1]] = prompt[:, None, :]
        return view.scatter_(2, torch.tensor(padded, device=prompt.device), True)


def window_of(config: Any) -> int | None:
    """How many columns every layer sees, when some layers see less than all.

    A mask of ours is used in every layer as it is, so a tree must stay within.
    """
    text = config.get_text_config(decoder=True)
    kinds = getattr(text, "layer_types", None)
    sizes = [
        getattr(text, name, None)
        for kind, name in (("sliding_attention", "sliding_window"), ("chunked_attention", "attention_chunk_size"))
        if kinds is None or kind in kinds
    ]
    return min((s for s in sizes if s), default=None)
