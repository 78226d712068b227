"""Exact probabilities of a closed question's options, over every way to write them.

The answer's probability is a sum over paths of tokens: the probability of the path times the mass
of the next tokens that settle the answer (serve/options.py says which those are). Paths are walked
level by level, all paths of a prompt behind the same keys and values (serve/tree.py).

Paths too improbable to matter are dropped and their probability is reported as ``unexplored``.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import numpy as np
import torch

from serve.ops.choices import probabilities
from serve.ops.sketch import sketch_logits
from serve.options import Floats, Node, OptionTrie
from serve.prefill import Prefilled
from serve.tree import Branch, TokenTree
from serve.vocabulary import Ids


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

    branch: Branch  # its last token, and where the ones before lie
    prefix: bytes  # what it has spelt
    probability: float

    @property
    def prompt(self) -> int:
        """Row of the group."""
        return self.branch.prompt

    @property
    def rank(self) -> tuple[int, ...]:
        """Decides between paths of equal probability."""
        return (*self.branch.ancestors, self.branch.token)


class _Reachable(Protocol):
    """What pruning needs to know of a path."""

    @property
    def prompt(self) -> int: ...
    @property
    def probability(self) -> float: ...
    @property
    def rank(self) -> tuple[int, ...]: ...


Reached = TypeVar("Reached", bound=_Reachable)


class Tally:
    """What has been settled and what was dropped, per prompt of a group."""

    def __init__(self, tries: Sequence[OptionTrie], pruning: Pruning) -> None:
        self.tries = tries
        self.settled = [np.zeros(len(t.spellings)) for t in tries]
        self.unexplored = np.zeros(len(tries))
        self._pruning = pruning
        self._masks: dict[int, torch.Tensor] = {}  # of the tries' nodes, where the probabilities lie

    def settle(self, paths: Sequence[_Path], lines: Sequence[tuple[int, ...]], logits: torch.Tensor) -> list[_Path]:
        """Count what the next token settles after these paths and return the paths it leads to.

        logits [paths, vocab]; ``lines`` are the columns of each path's tokens.
        """
        shares = probabilities(sketch_logits(logits))
        alike: dict[tuple[int, bytes], list[int]] = defaultdict(list)
        for row, path in enumerate(paths):
            alike[id(self.tries[path.prompt]), path.prefix].append(row)
        children: list[_Path] = []
        for (_, prefix), rows in alike.items():
            node = self.tries[paths[rows[0]].prompt].node(prefix)
            mass = self._values(node, shares, rows) * np.array([[paths[r].probability] for r in rows])
            for place, spelling in enumerate(node.settled):
                for row, amount in zip(rows, mass[:, place], strict=True):
                    self.settled[paths[row].prompt][spelling] += amount
            reach = mass[:, len(node.settled) :]
            kept = reach >= np.where(node.child_unfinished, self._pruning.unfinished, self._pruning.path)
            lost = np.where(kept, 0.0, reach).sum(axis=1)
            for i, row in enumerate(rows):
                self.unexplored[paths[row].prompt] += lost[i]
            children += [
                _Path(
                    Branch(paths[rows[i]].prompt, int(node.child_ids[j]), lines[rows[i]]),
                    node.child_prefixes[j],
                    float(reach[i, j]),
                )
                for i, j in np.argwhere(kept)
            ]
        return children

    def _values(self, node: Node, shares: torch.Tensor, rows: Sequence[int]) -> Floats:
        """What serve.walk.values_of gives for rows of probabilities [paths, vocab], worked out where these lie.

        They are as many as a vocabulary has tokens; what a node asks of them is a few numbers.
        """
        at = torch.tensor(rows, device=shares.device)
        found = [shares[at] @ self._mask(mask, shares.device) for _, mask in node.settled_by_mask]
        found += [_columns(shares, at, ids).sum(dim=1) for _, ids in node.settled_by_ids]
        values = torch.cat([f[:, None] for f in found] + [_columns(shares, at, node.child_ids)], dim=1)
        return values.cpu().numpy()

    def _mask(self, mask: Floats, device: torch.device) -> torch.Tensor:
        if id(mask) not in self._masks:
            self._masks[id(mask)] = torch.from_numpy(mask).to(device)
        return self._masks[id(mask)]

    def drop_least(self, paths: list[Reached]) -> list[Reached]:
        """The paths of a level without the least probable ones that the prompts can spare, prompt by prompt."""
        order = sorted(paths, key=lambda p: (p.prompt, p.probability, p.rank))
        kept = []
        for path in order:
            if self.unexplored[path.prompt] + path.probability <= self._pruning.total:
                self.unexplored[path.prompt] += path.probability
            else:
                kept.append(path)
        return kept


def _columns(shares: torch.Tensor, rows: torch.Tensor, ids: Ids) -> torch.Tensor:
    """Some columns of some rows [rows, ids]."""
    return shares[rows[:, None], torch.from_numpy(ids).to(shares.device)]


@torch.inference_mode()
def score_group(
    model: Any, start: Prefilled, tries: Sequence[OptionTrie], *, banned: torch.Tensor, pruning: Pruning
) -> Tally:
    """Walk every prompt's paths from prompts that have been read; ``tries`` holds one trie per prompt."""
    tally = Tally(tries, pruning)
    tree = TokenTree(model, start, banned)
    roots = [_Path(Branch(i, -1, ()), b"", 1.0) for i in range(len(tries))]
    level = tally.drop_least(tally.settle(roots, [()] * len(roots), start.logits))
    while level:
        children: list[_Path] = []
        for grown in tree.grow([p.branch for p in level]):
            paths = [level[i] for i in grown.places]
            lines = [(*p.branch.ancestors, column) for p, column in zip(paths, grown.columns, strict=True)]
            children += tally.settle(paths, lines, grown.logits)
        level = tally.drop_least(children)
    return tally
