"""Draw one token per row of logits: exact inverse CDF with one uniform per row.

Why not ``torch.multinomial``: its random numbers come from a global stream, so a reply would depend
on the batch it was made in, and float32 noise cannot reach the tail. Here one 53-bit uniform per row
is compared with a cumulative sum in float64, in two levels (blocks, then inside the chosen block),
which is as exact as one long sum and reads the row once.
"""

import torch

BLOCK = 64  # columns summed at the first level
_ELEMENTS = 1 << 25  # logits handled at a time, so that a batch of a large vocabulary needs no second batch of memory


def draw(logits: torch.Tensor, uniforms: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids [rows] and their log-probabilities at temperature 1 [rows], float64, from logits [rows, vocab].

    Temperature 0 takes the largest logit, the lowest id on ties. Each row's answer depends on that
    row and its uniform alone. A row that is not a distribution (NaN, +inf, all -inf) is an error.
    """
    if temperature < 0:
        raise ValueError(f"temperature is {temperature}; it must be 0 or above.")
    step = max(1, _ELEMENTS // logits.shape[1])
    pieces = [_draw(logits[i : i + step], uniforms[i : i + step], temperature) for i in range(0, logits.shape[0], step)]
    return torch.cat([p[0] for p in pieces]), torch.cat([p[1] for p in pieces])


def _draw(logits: torch.Tensor, uniforms: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    scores = logits if logits.dtype == torch.float64 else logits.float()
    peak = scores.amax(dim=1, keepdim=True)
    scores = scores - peak
    weights = scores.exp()
    blocks = _block_sums(weights)
    total = blocks.sum(dim=1)
    broken = ~torch.isfinite(total)
    if bool(broken.any()):
        rows = broken.nonzero().flatten().tolist()
        raise ValueError(f"logits of rows {rows[:8]} are not a distribution (NaN, +inf, or all -inf).")
    if temperature == 0:
        tokens = scores.argmax(dim=1)
    else:
        if temperature != 1:
            weights = (scores / temperature).exp_()
            blocks = _block_sums(weights)
        tokens = _invert(weights, blocks, uniforms)
    chosen = scores.gather(1, tokens[:, None]).squeeze(1).double()
    return tokens, chosen - total.log()


def _block_sums(weights: torch.Tensor) -> torch.Tensor:
    """Sums over blocks of columns in float64 [rows, blocks]; the last block may be short."""
    whole = weights.shape[1] // BLOCK * BLOCK
    sums = [weights[:, :whole].view(weights.shape[0], -1, BLOCK).sum(dim=2, dtype=torch.float64)]
    if whole < weights.shape[1]:
        sums.append(weights[:, whole:].sum(dim=1, keepdim=True, dtype=torch.float64))
    return torch.cat(sums, dim=1)


def _invert(weights: torch.Tensor, blocks: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
    """The token whose slice of the cumulative sum holds uniform * total."""
    edges = blocks.cumsum(dim=1)
    target = uniforms.to(edges)[:, None] * edges[:, -1:]
    block = _first_above(edges, blocks, target)
    columns = block * BLOCK + torch.arange(BLOCK, device=weights.device)
    inside = weights.gather(1, columns.clamp(max=weights.shape[1] - 1)).double()
    inside = inside.masked_fill(columns >= weights.shape[1], 0.0)
    start = edges.gather(1, block) - blocks.gather(1, block)
    return (block * BLOCK + _first_above(inside.cumsum(dim=1), inside, target - start)).squeeze(1)


def _first_above(edges: torch.Tensor, sizes: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Index [rows, 1] of the first edge above the target.

    Sums of different order may leave the target a rounding step beyond the last edge; then the last
    entry that has any weight is meant, so that a token of probability zero is never drawn.
    """
    found = (edges <= target).sum(dim=1, keepdim=True)
    positions = torch.arange(sizes.shape[1], device=sizes.device)
    last = torch.where(sizes > 0, positions, 0).amax(dim=1, keepdim=True)
    return torch.minimum(found, last)
