"""A peer: tokens by Gumbel-max inside the matrix product of the head, written from the published method's mathematics.

Every program owns a tile of the vocabulary for a block of rows, adds noise to the logits while they are on chip and
keeps the largest; a second step takes the largest of the tiles. With ``four``, all four words of a Philox call become
noise, which saves three calls of four and costs a rearrangement. The uniforms have 32 bits, as those of the samplers in
use, so the noise is capped: this is here for its time, not for its law.
"""

import torch
import triton
import triton.language as tl


@triton.jit
def _kernel(
    hidden_ptr, weight_ptr, best_ptr, ids_ptr, n_rows, d, vocab, n_tiles, seed,
    WIDEN: tl.constexpr, FOUR: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    n_blocks = tl.cdiv(n_rows, ROWS)
    for block in range(tl.program_id(0), n_blocks * n_tiles, tl.num_programs(0)):
        rows = (block % n_blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)
        tile = block // n_blocks
        ids = tile.to(tl.int64) * TILE + tl.arange(0, TILE)
        total = tl.zeros((ROWS, TILE), dtype=tl.float32)
        for start in range(0, d, DEPTH):
            inner = start + tl.arange(0, DEPTH)
            h_mask = (rows < n_rows)[:, None] & (inner < d)[None, :]
            w_mask = (ids < vocab)[None, :] & (inner < d)[:, None]
            h = tl.load(hidden_ptr + rows[:, None] * d + inner[None, :], mask=h_mask, other=0.0)
            w = tl.load(weight_ptr + ids[None, :] * d + inner[:, None], mask=w_mask, other=0.0)
            if WIDEN:  # the interpreter gets products of bfloat16 wrong
                h, w = h.to(tl.float32), w.to(tl.float32)
            total = tl.dot(h, w, total, input_precision="ieee")
        if FOUR:
            fours = tile * (TILE // 4) + tl.arange(0, TILE // 4)
            a, b, c, e = tl.randint4x(seed, rows.to(tl.int32)[:, None] * (n_tiles * (TILE // 4)) + fours[None, :])
            words = tl.reshape(tl.join(tl.join(a, b), tl.join(c, e)), (ROWS, TILE))
        else:
            words = tl.randint(seed, rows.to(tl.int32)[:, None] * vocab + ids.to(tl.int32)[None, :])
        uniform = tl.maximum(tl.uint_to_uniform_float(words), 1e-9)
        noise = -tl.log(-tl.log(tl.minimum(uniform, 1.0 - 6e-8)))
        scored = tl.where((ids < vocab)[None, :], total + noise, float("-inf"))
        place = rows * n_tiles + tile
        tl.store(best_ptr + place, tl.max(scored, axis=1), mask=rows < n_rows)
        tl.store(ids_ptr + place, tile * TILE + tl.argmax(scored, axis=1), mask=rows < n_rows)


def sample(
    hidden: torch.Tensor, weight: torch.Tensor, *, block_rows: int, tile: int, four: bool, seed: int = 0
) -> torch.Tensor:
    """One token per row of hidden [rows, d] for a head weight [vocab, d]; both contiguous."""
    (rows, d), vocab = hidden.shape, weight.shape[0]
    n_tiles = triton.cdiv(vocab, tile)
    best = torch.empty(rows, n_tiles, dtype=torch.float32, device=hidden.device)
    ids = torch.empty(rows, n_tiles, dtype=torch.int64, device=hidden.device)
    programs = torch.cuda.get_device_properties(hidden.device).multi_processor_count if hidden.is_cuda else 8
    _kernel[(min(triton.cdiv(rows, block_rows) * n_tiles, programs),)](
        hidden, weight, best, ids, rows, d, vocab, n_tiles, seed,
        WIDEN=triton.knobs.runtime.interpret, FOUR=four, ROWS=block_rows, TILE=tile, DEPTH=64,
    )  # fmt: skip
    return ids.gather(1, best.argmax(dim=1, keepdim=True))[:, 0]
