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

    def settle(self, paths: Sequence[_Path], lines: Sequence[tuple[int, ...]], logits: torch.Tensor) -> list[_Path]:
        """Count what the next token settles after these paths and return the paths it leads to.

        logits [paths, vocab]; ``lines`` are the columns of each path's tokens.
        """
        shares = probabilities(sketch_logits(logits)).cpu().numpy()
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
                    Branch(paths[rows[i]].prompt, int(node.child_ids[j]), lines[rows[i]]),
                    node.child_prefixes[j],
                    float(reach[i, j]),
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
