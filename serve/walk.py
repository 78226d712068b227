"""Exact option probabilities from an engine that is asked for next-token probabilities, request by request.

The walk is that of serve/scoring.py: level by level over the paths of tokens that keep an answer
within reach. There the whole distribution of every path is at hand; here an engine far away (other
processes, other cards) sums up what each path needs and sends back only those numbers.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from serve.options import Floats, Node, OptionTrie
from serve.scoring import Pruning, Tally


@dataclass(frozen=True, slots=True)
class Step:
    """A path of tokens after a prompt, pruned as serve.scoring prunes its own."""

    prompt: int
    tokens: tuple[int, ...]
    prefix: bytes  # what the tokens spell
    probability: float

    @property
    def rank(self) -> tuple[int, ...]:
        """Decides between steps of equal probability."""
        return self.tokens


def values_of(node: Node, shares: Floats) -> Floats:
    """What a step needs to know of the next token's distribution [vocab]: mass per settled spelling, then per child."""
    settled = [shares @ mask for _, mask in node.settled_by_mask]
    settled += [shares[ids].sum() for _, ids in node.settled_by_ids]
    return np.concatenate([np.array(settled, dtype=np.float64), shares[node.child_ids]])


def walk(tries: Sequence[OptionTrie], ask: Callable[[Sequence[Step]], list[Floats]], pruning: Pruning) -> Tally:
    """Walk every prompt's paths; ``ask`` gives each step's ``values_of``, a whole level at a time."""
    tally = Tally(tries, pruning)
    level = [Step(i, (), b"", 1.0) for i in range(len(tries))]
    while level:
        children: list[Step] = []
        for step, values in zip(level, ask(level), strict=True):
            children += _settle(tally, step, values, pruning)
        level = tally.drop_least(children)
    return tally


def _settle(tally: Tally, step: Step, values: Floats, pruning: Pruning) -> list[Step]:
    """Count what the next token settles after a step; the steps it leads to."""
    node = tally.tries[step.prompt].node(step.prefix)
    mass = values * step.probability
    for spelling, amount in zip(node.settled, mass, strict=False):
        tally.settled[step.prompt][spelling] += amount
    reach = mass[len(node.settled) :]
    kept = reach >= np.where(node.child_unfinished, pruning.unfinished, pruning.path)
    tally.unexplored[step.prompt] += reach[~kept].sum()
    return [
        Step(step.prompt, (*step.tokens, int(node.child_ids[j])), node.child_prefixes[j], float(reach[j]))
        for j in np.flatnonzero(kept)
    ]
