"""Compile every kernel for an H100 or H200 on a machine without a GPU; a script of test_compile.py.

    TRITON_INTERPRET=0 python -m tests.serve.ops.compile_kernels

The kernels' own launchers are called on small CPU tensors, and a launch compiles for sm_90, down to the machine
code, instead of running: what is compiled is what would be launched, specialised as Triton does it. Results are
not computed, so what a launcher returns means nothing. Prints one line of JSON per kernel and specialisation.
"""

import json
from typing import Any
from unittest.mock import patch

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from serve.ops import triton_choices, triton_draw, triton_philox, triton_tiles, triton_truncate
from serve.ops.rules import NO_RULES, make_rules, pack_bits
from serve.ops.sketch import Sketch, lmhead_sketch, sketch_logits
from serve.ops.truncate import make_filters

TARGET = GPUTarget("cuda", 90, 32)
_TYPES = {
    torch.float32: "fp32", torch.float64: "fp64", torch.bfloat16: "bf16", torch.float16: "fp16",
    torch.int64: "i64", torch.int32: "i32", torch.int8: "i8",
}  # fmt: skip
ROWS, VOCAB, DEPTH = 3, 9000, 96  # more than is opened at first, so that rows are also read as a whole
_seen: set[str] = set()


def compile_instead(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
    """Stands in for a launch."""
    given = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
    signature, constants, attributes = {}, {}, {}
    for place, parameter in enumerate(kernel.params):
        value = given[parameter.name]
        fixed = parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1)
        if isinstance(value, torch.Tensor):
            signature[parameter.name] = f"*{_TYPES[value.dtype]}"
        elif fixed:
            signature[parameter.name] = "constexpr"
            constants[parameter.name] = value
        else:
            signature[parameter.name] = "i32"
        if isinstance(value, torch.Tensor) or (not fixed and value % 16 == 0):
            attributes[(place,)] = [["tt.divisibility", 16]]
    key = f"{kernel.__module__}.{kernel.__name__} {signature} {constants}"
    if key not in _seen:
        _seen.add(key)
        options = {name: value for name, value in kwargs.items() if name == "num_warps"}
        source = ASTSource(kernel, signature, constants, attributes)
        compiled = triton.compile(source, target=TARGET, options=options)
        told = {"kernel": f"{kernel.__module__}.{kernel.__name__}", "machine_code": len(compiled.asm["cubin"])}
        print(json.dumps(told | {"shared_memory": compiled.metadata.shared}), flush=True)  # noqa: T201


def sketches() -> list[Sketch]:
    """One from logits and one from each kind of head, with every rule and number, and with none."""
    generator = torch.Generator().manual_seed(0)
    mask = torch.ones(ROWS, VOCAB, dtype=torch.bool)
    rules = make_rules(
        ROWS, VOCAB, mask.device, seen=pack_bits(mask), repetition=1.1, allow=pack_bits(mask), n_valid=VOCAB - 5
    )
    logits = torch.randn(ROWS, VOCAB, generator=generator)
    hidden, weight = (torch.randn(n, DEPTH, generator=generator).bfloat16() for n in (ROWS, VOCAB))
    common: dict[str, Any] = {"backend": "triton", "tile": 128, "check": False}
    return [
        sketch_logits(logits, torch.tensor([1.0, 0.5, 0.0]), raw=True, entropy=True, rules=rules, **common),
        sketch_logits(logits.bfloat16(), rules=NO_RULES, **common),
        lmhead_sketch(hidden, weight, raw=True, entropy=True, rules=rules, **common),
        lmhead_sketch(hidden.float(), weight.float(), **common),
    ]


def main() -> None:
    """Launch everything."""
    assert not triton.knobs.runtime.interpret, "set TRITON_INTERPRET=0: the interpreter compiles nothing"
    JITFunction.run = compile_instead
    patch.object(torch, "empty", torch.zeros).start()  # launchers look up what no launch here has written
    counter = torch.zeros(4, dtype=torch.int64)
    triton_philox.uniforms(counter, counter, counter, counter)
    triton_philox.words(counter, counter, counter, counter)
    uniforms = torch.full((ROWS, 2), 0.5, dtype=torch.float64)
    triton_choices.choice_draw(torch.zeros(ROWS, 4, dtype=torch.float64), uniforms)
    for i, sketch in enumerate(sketches()):
        # what was not computed must still be places and numbers to look up
        for numbers in (sketch.maxima, sketch.edges):
            numbers.copy_(torch.arange(numbers.shape[1]).expand_as(numbers))
        triton_draw.draw(sketch, uniforms)
        triton_tiles.values_at(sketch.source, torch.zeros(ROWS, 4, dtype=torch.int64))
        for order in ("vllm", "hf") if i == 0 else ("vllm",):  # it is the same code on other sources
            triton_truncate.truncated_draw(sketch, uniforms, make_filters(sketch, top_k=5, top_p=0.9, order=order))


if __name__ == "__main__":
    main()
