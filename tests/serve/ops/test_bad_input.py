"""What a caller can get wrong: each error names the argument, the value and the rule."""

import pytest
import torch

from serve.ops.backends import choose
from serve.ops.choices import choice_draw, choice_score
from serve.ops.draw import draw
from serve.ops.philox import signed64, uniforms
from serve.ops.rules import make_rules, pack_bits
from serve.ops.sketch import lmhead_sketch, sketch_logits
from serve.ops.truncate import truncated_draw

LOGITS = torch.randn(2, 40, generator=torch.Generator().manual_seed(0))
HALF = torch.full((2, 1), 0.5, dtype=torch.float64)
SKETCH = sketch_logits(LOGITS)
CPU = torch.device("cpu")


ONE = torch.ones(1, dtype=torch.int64)


def cut(**filters):
    return truncated_draw(SKETCH, HALF, **filters)


def cut_at(numbers):
    return truncated_draw(SKETCH, numbers, top_k=3)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        pytest.param(lambda: sketch_logits(LOGITS.int()), "logits has dtype int32; it must be float32", id="dtype"),
        pytest.param(lambda: sketch_logits(LOGITS[0]), r"logits has shape \[40\]; it must be \[any, any\]", id="shape"),
        pytest.param(lambda: sketch_logits(LOGITS[:0]), r"logits has shape \[0, 40\]", id="no-rows"),
        pytest.param(lambda: sketch_logits(LOGITS.T.contiguous().T), "logits has stride 2 in its last", id="stride"),
        pytest.param(lambda: sketch_logits([1.0]), "logits is a list; it must be a torch tensor", id="no-tensor"),
        pytest.param(lambda: sketch_logits(LOGITS, -1.0), "inv_temp is -1.0; it must be 0", id="temperature"),
        pytest.param(lambda: sketch_logits(LOGITS, float("nan")), "inv_temp is nan", id="temperature-nan"),
        pytest.param(
            lambda: sketch_logits(LOGITS, torch.tensor([1.0, -2.0])), "inv_temp of row 1 is -2.0", id="of-a-row"
        ),
        pytest.param(
            lambda: sketch_logits(LOGITS, torch.ones(3)), r"inv_temp has shape \[3\]; it must be \[2\]", id="rows"
        ),
        pytest.param(
            lambda: sketch_logits(LOGITS, tile=0), "tile is 0; it must be an integer of at least 1", id="tile"
        ),
        pytest.param(
            lambda: sketch_logits(LOGITS, backend="cuda"), "backend is 'cuda'; for sketch_logits", id="backend"
        ),
        pytest.param(
            lambda: lmhead_sketch(LOGITS, torch.ones(9, 41)),
            r"weight has shape \[9, 41\]; it must be \[any, 40\]",
            id="d",
        ),
        pytest.param(
            lambda: lmhead_sketch(LOGITS, torch.ones(9, 40).half()),
            "weight has dtype float16; .* float32",
            id="two-dtypes",
        ),
        pytest.param(
            lambda: lmhead_sketch(LOGITS, torch.ones(9, 40, device="meta")),
            "weight is on meta; it must be on cpu",
            id="device",
        ),
        pytest.param(
            lambda: draw(SKETCH, HALF.float()), "uniforms has dtype float32; it must be float64", id="uniforms"
        ),
        pytest.param(
            lambda: draw(SKETCH, HALF[:1]), r"uniforms has shape \[1, 1\]; it must be \[2, any\]", id="uniform-rows"
        ),
        pytest.param(lambda: cut(top_k=0), "top_k is 0; it must be at least 1, or None", id="k-0"),
        pytest.param(lambda: cut(top_k=1.5), "top_k is 1.5; it must be an integer", id="k-fraction"),
        pytest.param(lambda: cut(top_k=True), "top_k is True; it must be an integer", id="k-bool"),
        pytest.param(lambda: cut(top_k=float("inf")), "top_k is inf; it must be an integer", id="k-inf"),
        pytest.param(lambda: cut(top_k=float("nan")), "top_k is nan; it must be an integer", id="k-nan"),
        pytest.param(
            lambda: cut(top_k=torch.tensor([1.9, 2.0])),
            "top_k has dtype float32; it must be int32 or int64",
            id="k-of-floats",
        ),
        pytest.param(lambda: cut(top_p=None), "top_p is None; it must be a number, and above 0", id="p-none"),
        pytest.param(lambda: cut(min_p="0.5"), "min_p is '0.5'; it must be a number", id="min-p-text"),
        pytest.param(
            lambda: sketch_logits(LOGITS, None), "inv_temp is None; it must be a number", id="temperature-none"
        ),
        pytest.param(
            lambda: draw(SKETCH, HALF * 4),
            "uniforms of row 0 hold 2.0; each must be above 0 and below 1",
            id="uniform-2",
        ),
        pytest.param(lambda: cut_at(HALF * float("nan")), "uniforms of row 0 hold nan", id="uniform-nan"),
        pytest.param(lambda: choice_draw(HALF.log(), HALF - 0.5), "uniforms of row 0 hold 0.0", id="uniform-0"),
        pytest.param(lambda: uniforms(1, ONE, -ONE, ONE), r"draw is -1; it must be from 0 to 2\^32 - 1", id="draw"),
        pytest.param(lambda: uniforms(1, ONE, ONE, ONE << 32), r"position is 4294967296; it must be", id="position"),
        pytest.param(lambda: uniforms(2**64, ONE, ONE, ONE), r"key .*is 18446744073709551616; .* 2\^64 - 1", id="key"),
        pytest.param(lambda: signed64(-1), r"is -1; it must be from 0 to 2\^64 - 1", id="stream"),
        pytest.param(
            lambda: make_rules(2, 40, CPU, n_valid=3.5), "n_valid is 3.5; it must be an integer", id="n-valid-fraction"
        ),
        pytest.param(
            lambda: make_rules(2, 40, CPU, repetition=1.3), "repetition is 1.3 but seen is None", id="penalty-of-none"
        ),
        pytest.param(
            lambda: make_rules(2, 40, CPU, presence=torch.ones(2)),
            "presence is .* but seen is None",
            id="presence-of-none",
        ),
        pytest.param(
            lambda: make_rules(2, 40, CPU, seen=torch.zeros(2, 2).int(), repetition=float("inf")),
            "repetition is inf; it must be above 0, and finite",
            id="penalty-inf",
        ),
        pytest.param(
            lambda: draw(sketch_logits(LOGITS.double()), HALF, backend="triton"),
            "backend is 'triton'; for float64 it must be 'torch'",
            id="float64-draw",
        ),
        pytest.param(
            lambda: truncated_draw(sketch_logits(LOGITS.double()), HALF, top_k=3, backend="triton"),
            "backend is 'triton'; for float64",
            id="float64-cut",
        ),
        pytest.param(
            lambda: choice_score(sketch_logits(LOGITS.double()), torch.tensor([[1], [2]]), backend="triton"),
            "backend is 'triton'; for float64",
            id="float64-choices",
        ),
        pytest.param(lambda: cut(top_k=torch.tensor([3, 0])), "top_k of row 1 is 0", id="k-0-of-a-row"),
        pytest.param(lambda: cut(top_p=0.0), "top_p is 0.0; it must be above 0 and at most 1", id="p-0"),
        pytest.param(lambda: cut(top_p=1.1), "top_p is 1.1", id="p-above-1"),
        pytest.param(lambda: cut(top_p=torch.tensor([0.5, float("nan")])), "top_p of row 1 is nan", id="p-nan"),
        pytest.param(lambda: cut(min_p=-0.1), "min_p is -0.1; it must be from 0 to 1", id="min-p"),
        pytest.param(lambda: cut(order="openai"), "order is 'openai'; it must be one of vllm, hf", id="order"),
        pytest.param(
            lambda: choice_score(SKETCH, torch.tensor([[1], [40]])), "ids holds 40; each must be from 0 to 39", id="id"
        ),
        pytest.param(lambda: choice_score(SKETCH, torch.tensor([[1], [-2]])), "ids holds -2", id="id-below"),
        pytest.param(
            lambda: choice_score(SKETCH, torch.tensor([[1, 2], [7, 7]])), "ids of row 1 hold 7 twice", id="id-twice"
        ),
        pytest.param(
            lambda: choice_draw(torch.zeros(1, 2).double(), HALF[:1]), "logprobs of row 0 .* more than 1", id="mass"
        ),
        pytest.param(
            lambda: choice_draw(torch.full((2, 65), -9.0).double(), HALF),
            "logprobs has 65 options; .* at most 64",
            id="options",
        ),
        pytest.param(
            lambda: make_rules(2, 40, CPU, n_valid=41), "n_valid is 41; it must be from 1 to .* 40", id="n-valid"
        ),
        pytest.param(
            lambda: make_rules(2, 40, CPU, seen=torch.zeros(2, 1).int()),
            r"seen has shape \[2, 1\]; it must be \[2, 2\]",
            id="bits",
        ),
        pytest.param(
            lambda: make_rules(2, 40, CPU, repetition=0.0), "repetition is 0.0; it must be above 0", id="penalty"
        ),
        pytest.param(lambda: pack_bits(LOGITS), "mask has dtype float32; it must be bool", id="mask"),
        pytest.param(
            lambda: sketch_logits(LOGITS, rules=make_rules(2, 40, CPU, allow=pack_bits(LOGITS > 99))),
            r"logits of rows \[0, 1\] .* are not a distribution",
            id="all-masked",
        ),
        pytest.param(
            lambda: sketch_logits(LOGITS, rules=make_rules(3, 40, CPU, allow=pack_bits(torch.ones(3, 40).bool()))),
            r"rules.allow has shape \[3, 2\]; it must be \[2, 2\]",
            id="rules-of-others",
        ),
        pytest.param(lambda: SKETCH.raw_log_z, "raw is False in this sketch", id="raw"),
        pytest.param(
            lambda: choose("finish", device=CPU, rows=1, backend="whole"), "for finish it must be one of", id="op"
        ),
    ],
)
def test_errors_name_argument_value_and_rule(call, says):
    with pytest.raises((ValueError, TypeError), match=says):
        call()


def test_the_kernels_say_what_they_cannot_take():
    pytest.importorskip("triton")
    with pytest.raises(ValueError, match="tile is 24; for the Triton kernels it must be a power of two"):
        sketch_logits(LOGITS, tile=24, backend="triton")
    with pytest.raises(ValueError, match="backend is 'triton'; for float64 it must be 'torch'"):
        sketch_logits(LOGITS.double(), backend="triton")
