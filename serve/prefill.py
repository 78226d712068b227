"""Read a group of prompts once: left-padded into one batch, keys and values kept for what follows."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from serve.cache import new_cache


@dataclass(slots=True)
class Prefilled:
    """Prompts that have been read: what follows them continues from here."""

    cache: Any  # one row per prompt
    logits: torch.Tensor  # [prompts, vocab] after the last token, float32 or wider
    attend: torch.Tensor  # [prompts, columns] bool, False on padding
    lengths: torch.Tensor  # [prompts] tokens without padding: the position of the next token

    def only(self, prompt: int) -> "Prefilled":
        """One of the prompts; the others' keys and values are given up."""
        some = torch.tensor([prompt], device=self.lengths.device)
        self.cache.batch_select_indices(some)
        return Prefilled(self.cache, self.logits[some], self.attend[some], self.lengths[some])


def prefill(model: Any, prompts: Sequence[list[int]], *, capacity: int, banned: torch.Tensor) -> Prefilled:
    """Run the prompts through the model; ``capacity`` is the number of columns to make room for.

    ``banned`` [vocab] is True for ids that have no text and can never be drawn.
    """
    longest = max(map(len, prompts))
    device = model.device
    # the id under the padding is never attended to; any will do
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts], device=device)
    attend = torch.tensor([[False] * (longest - len(p)) + [True] * len(p) for p in prompts], device=device)
    cache = new_cache(model.config, capacity)
    output = model(
        input_ids=ids,
        attention_mask=attend.long(),
        position_ids=(attend.long().cumsum(dim=1) - 1).clamp(min=0),
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    return Prefilled(cache, usable_logits(output.logits[:, -1], banned), attend, attend.sum(dim=1))


def usable_logits(logits: torch.Tensor, banned: torch.Tensor) -> torch.Tensor:
    """Logits in float32 or wider, with the ids that have no text ruled out; writes into fresh logits."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    if banned.device.type == "cpu" and not banned.any():  # a GPU is not asked: the host would wait for it
        return wide
    return wide.masked_fill_(banned, float("-inf"))


def as_mask(view: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What is seen [rows, new, columns], as what is added to the attention's scores: eager attention would add True."""
    hidden = torch.zeros(view.shape, dtype=dtype, device=view.device)
    return hidden.masked_fill_(~view, torch.finfo(dtype).min)[:, None]
