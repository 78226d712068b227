"""Exact probabilities of a closed question's options, over every way to write them.

The answer's probability is a sum over paths of tokens: the probability of the path times the mass
of the next tokens that settle the answer (serve/options.py says which those are). Paths are walked
level by level. All paths of one prompt lie side by side in one row of the batch, each seeing the
prompt and its own ancestors only, so that the prompt's keys and values are neither copied nor read
once per path.

Paths too improbable to matter are dropped and their probability is reported as ``unexplored``.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from serve.options import Floats, Node, OptionTrie
from serve.prefill import Prefilled, usable_logits

_LOGITS = 1 << 24  # logits held at a time


@dataclass(frozen=True, slots=True)
class Pruning:
    """Which paths are dropped."""

    path: float = 1e-9  # every path less probable than this
    # A path that ends inside a character after a finished answer ("1" and the first byte of "é") has
    # thousands of continuations and, in a trained model, next to no probability.
    unfinished: float = 1e-6
    total: float = 1e-6  # and the least probable ones, as long as a prompt loses no more than this in all


@dataclass(frozen=True, slots=True)
class _Path:
    """A path of tokens that keeps an option within reach."""

    prompt: int  # row of the group
    prefix: bytes  # what it has spelt
    probability: float
    token: int  # its last token
    parent: int  # slot of its parent in the level above, -1 for the prompt itself


class Tally:
    """What has been settled and what was dropped, per prompt of a group."""

    def __init__(self, tries: Sequence[OptionTrie], pruning: Pruning) -> None:
        self.tries = tries
        self.settled = [np.zeros(len(t.spellings)) for t in tries]
        self.unexplored = np.zeros(len(tries))
        self._pruning = pruning

    def settle(self, paths: Sequence[_Path], slots: Sequence[int], logits: torch.Tensor) -> list[_Path]:
        """Count what the next token settles after these paths and return the paths it leads to.

        logits [paths, vocab]; ``slots`` are the paths' places in their level.
        """
        shares = torch.softmax(logits.double(), dim=1).cpu().numpy()
        alike: dict[tuple[int, bytes], list[int]] = defaultdict(list)
        for row, path in enumerate(paths):
            alike[id(self.tries[path.prompt]), path.prefix].append(row)
        children: list[_Path] = []
        for (_, prefix), rows in alike.items():
            node = self.tries[paths[rows[0]].prompt].node(prefix)
            mass = shares[rows] * np.array([[paths[r].probability] for r in rows])
            self._count(node, [paths[r].prompt for r in rows], mass)
            reach = mass[:, node.child_ids]
            kept = reach >= np.where(node.child_unfinished, self._pruning.unfinished, self._pruning.path)
            lost = np.where(kept, 0.0, reach).sum(axis=1)
            for i, row in enumerate(rows):
                self.unexplored[paths[row].prompt] += lost[i]
            children += [
                _Path(
                    paths[rows[i]].prompt, node.child_prefixes[j], reach[i, j], int(node.child_ids[j]), slots[rows[i]]
                )
                for i, j in np.argwhere(kept)
            ]
        return children

    def _count(self, node: Node, prompts: Sequence[int], mass: Floats) -> None:
        found = [(spelling, mass @ mask) for spelling, mask in node.settled_by_mask]
        found += [(spelling, mass[:, ids].sum(axis=1)) for spelling, ids in node.settled_by_ids]
        for spelling, amounts in found:
            for prompt, amount in zip(prompts, amounts, strict=True):
                self.settled[prompt][spelling] += amount

    def drop_least(self, paths: list[_Path]) -> list[_Path]:
        """The paths of a level without the least probable ones that the prompts can spare, prompt by prompt."""
        order = sorted(paths, key=lambda p: (p.prompt, p.probability, p.parent, p.token))
        kept = []
        for path in order:
            if self.unexplored[path.prompt] + path.probability <= self._pruning.total:
                self.unexplored[path.prompt] += path.probability
            else:
                kept.append(path)
        return kept


@torch.inference_mode()
def score_group(
    model: Any, start: Prefilled, tries: Sequence[OptionTrie], *, banned: torch.Tensor, pruning: Pruning
) -> Tally:
    """Walk every prompt's paths from prompts that have been read; ``tries`` holds one trie per prompt."""
    tally = Tally(tries, pruning)
    roots = [_Path(i, b"", 1.0, -1, -1) for i in range(len(tries))]
    level = tally.drop_least(tally.settle(roots, [-1] * len(roots), start.logits))
    seen = start.attend[:, None, :]  # [prompts, slots of the level above, columns]; slot -1 is the prompt itself
    depth = 0
    while level:
        level, seen = _forward_level(model, start, level, seen, depth, tally, banned)
        depth += 1
    return tally


def _forward_level(
    model: Any,
    start: Prefilled,
    level: list[_Path],
    seen: torch.Tensor,
    depth: int,
    tally: Tally,
    banned: torch.Tensor,
) -> tuple[list[_Path], torch.Tensor]:
    """Run one level's paths, a few columns at a time; the next level, and what this level's paths see."""
    n_prompts = len(tally.tries)
    rows: list[list[_Path]] = [[] for _ in range(n_prompts)]
    for path in level:
        rows[path.prompt].append(path)
    widest = max(map(len, rows))
    step = max(1, _LOGITS // (n_prompts * len(banned)))
    children: list[_Path] = []
    views = []
    for first in range(0, widest, step):
        batch = [r[first : first + step] for r in rows]
        width = max(map(len, batch))
        view = _see(batch, width, seen, start.cache.get_seq_length())
        ids = [[p.token for p in b] + [0] * (width - len(b)) for b in batch]
        output = model(
            input_ids=torch.tensor(ids, device=view.device),
            attention_mask=_as_mask(view, model.dtype),
            position_ids=(start.lengths[:, None] + depth).expand(n_prompts, width),
            past_key_values=start.cache,
            use_cache=True,
        )
        paths = [p for b in batch for p in b]
        place = torch.tensor([i * width + j for i, b in enumerate(batch) for j in range(len(b))], device=view.device)
        slots = [first + j for b in batch for j in range(len(b))]
        logits = usable_logits(output.logits.flatten(0, 1)[place], banned)
        children += tally.settle(paths, slots, logits)
        views.append(view)
    columns = start.cache.get_seq_length()
    padded = [torch.nn.functional.pad(v, (0, columns - v.shape[2])) for v in views]
    return tally.drop_least(children), torch.cat(padded, dim=1)


def window_of(config: Any) -> int | None:
    """How many columns every layer sees, when some layers see less than all.

    A mask of ours is used in every layer as it is, so exact scoring must stay within.
    """
    text = config.get_text_config(decoder=True)
    kinds = getattr(text, "layer_types", None)
    sizes = [
        getattr(text, name, None)
        for kind, name in (("sliding_attention", "sliding_window"), ("chunked_attention", "attention_chunk_size"))
        if kinds is None or kind in kinds
    ]
    return min((s for s in sizes if s), default=None)


def _as_mask(view: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What is seen, as what is added to the attention's scores: eager attention would add True as 1."""
    hidden = torch.zeros(view.shape, dtype=dtype, device=view.device)
    return hidden.masked_fill_(~view, torch.finfo(dtype).min)[:, None]


def _see(batch: list[list[_Path]], width: int, seen: torch.Tensor, columns: int) -> torch.Tensor:
    """What each path sees [prompts, width, columns + width]: all its parent saw, its parent, and itself.

    Fillers see slot 0 of the level above, so that no row of the attention is empty.
    """
    parents = torch.tensor([[max(p.parent, 0) for p in b] + [0] * (width - len(b)) for b in batch], device=seen.device)
    view = seen.gather(1, parents[:, :, None].expand(-1, -1, seen.shape[2]))
    view = torch.nn.functional.pad(view, (0, columns - seen.shape[2]))
    itself = torch.eye(width, dtype=torch.bool, device=seen.device).expand(len(batch), -1, -1)
    return torch.cat([view, itself], dim=2)
