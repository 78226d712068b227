"""What a model answers, exactly: probabilities of listed token sequences, and of every reply down to a bound.

``trie_score`` reads listed answers in one forward pass. ``enumerate_answers`` lists replies best first until
what it has not looked at weighs less than ``eps``: then any class of replies has a probability between
what was found and that plus the rest, with no sampling error, and one looks at far fewer tokens than 500 draws.

Answers here are sequences of tokens. For closed questions, whose answers count in every spelling and
tokenisation, see serve/scoring.py.
"""

import heapq
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from serve.ops.choices import choice_score, probabilities
from serve.ops.sketch import sketch_logits
from serve.prefill import prefill
from serve.tree import Branch, TokenTree

_TOGETHER = 16  # prefixes read in one forward pass


@dataclass(frozen=True, slots=True)
class TrieScores:
    """Natural-log probabilities of listed answers."""

    logprobs: list[float]  # in the order asked
    residual: float  # probability of everything else


@dataclass(frozen=True, slots=True)
class Answers:
    """Replies and their probabilities; every class of replies weighs what is listed and at most residual more."""

    probabilities: dict[str, float]  # most probable first
    residual: float
    certified: bool  # residual is at most the eps asked for


@torch.inference_mode()
def trie_score(
    model: Any, prompt: Sequence[int], options: Sequence[Sequence[int]], *, banned: torch.Tensor
) -> TrieScores:
    """Probabilities of token sequences after a prompt, all read in one forward pass behind it.

    No option may be listed twice or begin with another one: end both with the end-of-turn token, or the
    shorter would count the longer. ``banned`` [vocab] is True for ids that can never be drawn.
    """
    paths = [tuple(o) for o in options]
    if not paths or not all(paths):
        raise ValueError(f"options is {[list(p) for p in paths]}; each must hold at least one token.")
    for i, longer in enumerate(paths):
        for j, shorter in enumerate(paths):
            if i != j and longer[: len(shorter)] == shorter:
                raise ValueError(
                    f"options hold {list(shorter)} and {list(longer)}; none may begin with another. "
                    "End both with the end-of-turn token."
                )
    inner = sorted({path[:n] for path in paths for n in range(1, len(path))}, key=lambda p: (len(p), p))
    start = prefill(model, [list(prompt)], capacity=len(prompt) + len(inner), banned=banned)
    tree = TokenTree(model, start, banned)
    column = {prefix: tree.n_columns + i for i, prefix in enumerate(inner)}
    branches = [Branch(0, prefix[-1], tuple(column[prefix[:n]] for n in range(1, len(prefix)))) for prefix in inner]
    logits = [start.logits]
    for grown in tree.grow(branches):
        assert grown.columns == [column[inner[i]] for i in grown.places], "the tree was read in another order"
        logits.append(grown.logits)
    rows = {(): 0} | {prefix: i + 1 for i, prefix in enumerate(inner)}
    table = torch.cat(logits)
    following = [sorted({p[len(prefix)] for p in paths if p[: len(prefix)] == prefix}) for prefix in rows]
    widest = max(map(len, following))
    ids = torch.tensor([f + [-1] * (widest - len(f)) for f in following], device=table.device)
    scores = choice_score(sketch_logits(table), ids).logprobs.tolist()
    steps = {
        (prefix, token): scores[row][place]
        for prefix, row in rows.items()
        for place, token in enumerate(following[row])
    }
    logprobs = [sum(steps[path[:n], path[n]] for n in range(len(path))) for path in paths]
    return TrieScores(logprobs, 1.0 - float(torch.tensor(logprobs, dtype=torch.float64).exp().sum()))


@torch.inference_mode()
def enumerate_answers(
    model: Any,
    prompt: Sequence[int],
    *,
    eps: float,
    end_ids: Collection[int],
    decode: Callable[[list[int]], str],
    banned: torch.Tensor,
    max_tokens: int = 64,
    max_reads: int = 10_000,
) -> Answers:
    """Replies to one prompt and their probabilities, until less than ``eps`` is left.

    Replies of the same text add up. A reply is listed when it has ended; prefixes of ``max_tokens`` tokens,
    and what ``max_reads`` tokens read did not reach, stay in the residual, which may then be above ``eps``.
    """
    if not 0 < eps < 1:
        raise ValueError(f"eps is {eps}; it must be above 0 and below 1.")
    start = prefill(model, [list(prompt)], capacity=len(prompt) + 64, banned=banned)
    tree = TokenTree(model, start, banned)
    search = _Search(frozenset(end_ids), eps, max_tokens)
    search.expand((), (), 1.0, probabilities(sketch_logits(start.logits))[0])
    n_read = 0
    while search.left > eps and search.frontier and n_read < max_reads:
        best = [heapq.heappop(search.frontier) for _ in range(min(_TOGETHER, len(search.frontier)))]
        n_read += len(best)
        for grown in tree.grow([Branch(0, tokens[-1], columns) for _, tokens, columns in best]):
            shares = probabilities(sketch_logits(grown.logits))
            for i, place in enumerate(grown.places):
                weight, tokens, columns = best[place]
                search.expand(tokens, (*columns, grown.columns[i]), -weight, shares[i])
    found: dict[str, float] = {}
    for tokens, probability in search.ended:
        text = decode(list(tokens))
        found[text] = found.get(text, 0.0) + probability
    ranked = dict(sorted(found.items(), key=lambda item: (-item[1], item[0])))
    residual = search.left
    return Answers(ranked, residual, residual <= eps)


class _Search:
    """Ended replies, open prefixes by probability, and the mass that was let go."""

    def __init__(self, ends: frozenset[int], eps: float, max_tokens: int) -> None:
        self.ended: list[tuple[tuple[int, ...], float]] = []
        self.frontier: list[tuple[float, tuple[int, ...], tuple[int, ...]]] = []  # (-probability, tokens, columns)
        self._ends, self._max_tokens = ends, max_tokens
        # Prefixes at one depth weigh at most 1 together, so letting go this share of each loses at most eps / 4.
        self._spare = eps / (4 * max_tokens)
        self.left = 1.0  # what has not been settled: all but the ended replies

    def expand(self, tokens: tuple[int, ...], columns: tuple[int, ...], weight: float, shares: torch.Tensor) -> None:
        """Put a prefix's continuations where they belong; ``shares`` [vocab] are the next token's probabilities."""
        best = shares.sort(descending=True)
        n = int((best.values.cumsum(0) < 1 - self._spare).sum()) + 1
        for share, token in zip(best.values[:n].tolist(), best.indices[:n].tolist(), strict=True):
            if token in self._ends:
                self.ended.append((tokens, weight * share))
                self.left -= weight * share
            elif len(tokens) + 1 < self._max_tokens:
                heapq.heappush(self.frontier, (-weight * share, (*tokens, token), columns))
