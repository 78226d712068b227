"""Score and draw single tokens out of a fixed list: exact probabilities instead of counting samples.

A closed question has few answers. Their probabilities, what they sum to, and what went elsewhere are
read off one sketch; drawing an answer n times is then a multinomial over a handful of numbers, and
costs the model nothing. Answers of several tokens are sums over a tree (serve/answers.py).
"""

from dataclasses import dataclass

import torch

from serve.ops.backends import choose
from serve.ops.checks import check_tensor, check_uniforms
from serve.ops.sketch import Sketch
from serve.ops.sources import LogitsSource

MOST_OPTIONS = 64  # what choice_draw takes; it compares every draw with every option


@dataclass(frozen=True, slots=True)
class ChoiceScores:
    """Of each row, at the sketch's temperature; float64, natural logs. -inf stands at padding."""

    logprobs: torch.Tensor  # [rows, k] among all tokens
    restricted: torch.Tensor  # [rows, k] among the tokens listed
    mass: torch.Tensor  # [rows] probability of all tokens listed; 1 - mass went elsewhere
    log_z: torch.Tensor  # [rows]
    entropy: torch.Tensor | None  # [rows], of the whole row, when the sketch has it


def choice_score(sketch: Sketch, ids: torch.Tensor, *, backend: str | None = None) -> ChoiceScores:
    """Log-probabilities of the tokens ``ids`` [rows, k] (int32 or int64, -1 pads), for each row of a sketch."""
    device, vocab = sketch.source.device, sketch.source.vocab
    check_tensor("ids", ids, shape=(sketch.n_rows, None), dtypes=(torch.int32, torch.int64), device=device)
    ids = ids.long()
    if device.type == "cpu":
        _check_ids(ids, vocab)
    listed = ids >= 0
    if choose("finish", device=device, rows=sketch.n_rows, backend=backend, dtype=sketch.source.dtype) == "triton":
        from serve.ops import triton_choices

        values = triton_choices.values_at(sketch.source, ids)
    else:
        values = sketch.source.at(ids.clamp(min=0))
    below = values.double() - sketch.row_max[:, None]
    logprobs = below * sketch.inv_temp[:, None] - sketch.total.log()[:, None]
    logprobs = logprobs.masked_fill(~listed, float("-inf"))
    log_mass = logprobs.logsumexp(dim=1)
    return ChoiceScores(logprobs, logprobs - log_mass[:, None], log_mass.exp(), sketch.log_z, sketch.entropy)


def probabilities(sketch: Sketch) -> torch.Tensor:
    """Every token's probability [rows, vocab] float64 for a sketch of logits in memory.

    One float32 exponential a token (float64 for float64 logits) over a float64 normaliser: each is
    right to a few parts in ten million, at a third of the cost of a softmax in float64.
    """
    if not isinstance(sketch.source, LogitsSource):
        raise ValueError("sketch was made from hidden states; probabilities needs one made by sketch_logits.")
    columns = slice(0, sketch.source.vocab)
    values = sketch.source.columns(columns).to(sketch.source.dtype)
    values = sketch.source.rules.on_columns(values, slice(None), columns)
    below = (values - sketch.row_max[:, None].to(values.dtype)) * sketch.inv_temp[:, None].to(values.dtype)
    return below.exp_().double().div_(sketch.total[:, None])


def choice_draw(logprobs: torch.Tensor, uniforms: torch.Tensor, *, backend: str | None = None) -> torch.Tensor:
    """How many of the n draws fall to each option and to none of them: counts [rows, k + 1] int64.

    ``logprobs`` [rows, k] float64, -inf for padding, are shares of everything; what they leave is the
    last count. ``uniforms`` [rows, n] float64: draw by draw the same as one at a time.
    """
    check_tensor("logprobs", logprobs, shape=(None, None), dtypes=(torch.float64,))
    rows, k = logprobs.shape
    check_uniforms(uniforms, rows, logprobs.device)
    if k > MOST_OPTIONS:
        raise ValueError(
            f"logprobs has {k} options; it must be at most {MOST_OPTIONS} (draw tokens with serve.ops.draw)."
        )
    if logprobs.device.type == "cpu":
        wrong = torch.isnan(logprobs).any(dim=1) | (logprobs.logsumexp(dim=1) > 1e-6)
        if bool(wrong.any()):
            raise ValueError(f"logprobs of row {int(wrong.nonzero()[0])} are NaN or sum to more than 1.")
    if choose("finish", device=logprobs.device, rows=rows, backend=backend) == "triton":
        from serve.ops import triton_choices

        return triton_choices.choice_draw(logprobs, uniforms)
    edges = logprobs.exp().cumsum(dim=1)
    places = torch.searchsorted(edges, uniforms, right=True)
    counts = torch.zeros(rows, k + 1, dtype=torch.int64, device=logprobs.device)
    return counts.scatter_add_(1, places, torch.ones_like(places))


def _check_ids(ids: torch.Tensor, vocab: int) -> None:
    """ValueError for ids outside the vocabulary, or listed twice in a row: their mass would count twice."""
    if bool(((ids < -1) | (ids >= vocab)).any()):
        worst = int(ids.max()) if int(ids.max()) >= vocab else int(ids.min())
        raise ValueError(f"ids holds {worst}; each must be from 0 to {vocab - 1}, or -1 for padding.")
    ordered = ids.sort(dim=1).values
    twice = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0)
    if bool(twice.any()):
        row, place = (int(i) for i in twice.nonzero()[0])
        raise ValueError(f"ids of row {row} hold {int(ordered[row, place + 1])} twice; each must be listed once.")
