"""How fast the sampling core is, beside its peers and the measured floors of the machine, all in one run.

    python -m benchmarks.sampling_core [device=cpu|cuda] [parts=draw,engine] [n=20] [threads=1] [note=...] [out=...]
    python -m benchmarks.sampling_core --table device=cuda      # also write serve/ops/backends.csv
    python -m benchmarks.sampling_core --table device=cuda rows=64,512,3200 widths=896,3584 minutes=5   # a short call

On a CPU: parts ``draw`` (one and 500 draws a row, 64 rows of 151,936 float32 logits) and ``engine`` (what the torch
engine does at every step, and the engine itself on a nano model, with its sampler and with torch.multinomial). On a
GPU, in this order: ``ceilings`` (copy, matrix products, one pass over logits), ``sketch`` (K2, pass one, and draws),
``choices`` (K3), ``head`` (K1), ``filters`` (K2). Without ``parts`` all are run. On a GPU ``rows`` and ``widths`` make
the grid smaller, what has not begun after ``minutes`` is left out, and so is a call that fails; both are said.

Rows go to benchmarks/results/sampling_core.csv as they are found. ``floor_us`` is the least the machine needs, measured
in the same run: on a CPU one reading of the logits, on a GPU the larger of that part's matrix product in bfloat16 and
its reading of memory. ``of_floor`` is floor over median. The inputs are random; logits come in three families, since
truncation depends on their shape. `faster` is the ratio to the row's ``against``, by CPU time on a CPU.
"""

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import sampling_peers as peers
from benchmarks.timing import Call, append, machine, measure
from candor.errors import UserError, nearest, run_script
from serve import decoding
from serve.ops import backends
from serve.ops.choices import choice_score
from serve.ops.draw import draw
from serve.ops.philox import uniforms
from serve.ops.sketch import lmhead_sketch, sketch_logits
from serve.ops.truncate import truncated_draw

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks/results/sampling_core.csv"
NANO = ROOT / "train/organism/weights/nano"
VOCABULARY = 151_936  # Qwen2.5
WIDTHS, ROWS = (896, 1536, 2048, 3584, 5120), (1, 16, 64, 128, 256, 320, 512, 1024, 3200)
FAMILIES = ("peaked", "heavy head", "flat")
COMPILED = (64, 512, 3200)  # rows for which torch compiles its peers: it compiles anew for each shape
TURN_SECONDS = 0.7  # that calls take turns for, on a GPU


@dataclass(frozen=True, slots=True)
class Shape:
    """What one row of results is about."""

    op: str
    rows: int
    draws: int = 1
    width: int = 0
    family: str = ""
    vocab: int = VOCABULARY


class Book:
    """Rows of this run."""

    def __init__(self, device: str, n: int, note: str, out: Path = RESULTS) -> None:
        self.device, self.n, self.note, self.out = device, n, note, out
        self.rows: list[dict[str, Any]] = []
        self.rows_of: tuple[int, ...] = ROWS  # of the grid on a GPU
        self.widths: tuple[int, ...] = WIDTHS
        self.until = math.inf  # by time.monotonic(): what is not begun by then is left out

    def take(self, shape: Shape, calls: Mapping[str, Call], *, floor: str = "", against: str = "") -> None:
        """Measure calls in turn and write them down; the floor is one of them."""
        if time.monotonic() > self.until:
            print(f"left out, no time left: {shape}", flush=True)
            return
        limit = math.inf if self.device == "cpu" else TURN_SECONDS
        found = measure(calls, device=self.device, n=self.n, seconds=limit)
        least = None
        if floor in found:
            least = found[floor].median if found[floor].cpu is None else found[floor].cpu
        taken = []
        for name, times in found.items():
            value = times.median if times.cpu is None else times.cpu
            base = found.get(against)
            row = {
                "benchmark": "sampling_core", "op": shape.op, "provider": name, "rows": shape.rows,
                "draws": shape.draws, "width": shape.width, "vocab": shape.vocab, "family": shape.family,
                "median_us": round(times.median, 1), "low_us": round(times.low, 1), "high_us": round(times.high, 1),
                "cpu_us": "" if times.cpu is None else round(times.cpu, 1),
                "floor_us": "" if least is None else round(least, 1),
                "of_floor": "" if least is None else round(least / value, 3),
                "against": against,
                "faster": "" if base is None else round((base.cpu or base.median) / value, 2),
                "n": times.n, "how": times.how, **machine(self.device), "note": self.note,
            }  # fmt: skip
            taken.append(row)
            print(
                f"{shape.op:<16}{name:<26}{shape.rows:>5} x {shape.draws:<5}{shape.width:>5}{value:>12.1f} us", end=""
            )
            print(f"  of floor {row['of_floor']}  faster {row['faster']}", flush=True)
        self.rows += taken
        append(self.out, taken)


def logits_of(rows: int, family: str, device: str) -> torch.Tensor:
    """Float32 logits: a few tokens hold nearly all, a heavy head over a Gaussian body, or nearly flat."""
    generator = torch.Generator(device).manual_seed(rows)
    logits = torch.randn(rows, VOCABULARY, generator=generator, device=device) * (1.0 if family == "flat" else 2.0)
    if family != "flat":
        head = torch.randint(VOCABULARY, (rows, 200), generator=generator, device=device)
        lift = torch.linspace(14, 6, 200, device=device) if family == "heavy head" else torch.linspace(26, 0, 200)
        logits.scatter_add_(1, head, lift.to(device).expand(rows, -1))
    return logits


def numbers(rows: int, n: int, device: str) -> torch.Tensor:
    """Uniforms [rows, n], made as the engines make them."""
    stream, place = torch.arange(rows, device=device)[:, None], torch.arange(n, device=device)[None, :]
    return uniforms(7, stream, place, torch.zeros(1, 1, dtype=torch.int64, device=device))[0]


# --- on a CPU --------------------------------------------------------------------------------------------------------


def cpu_draw(book: Book) -> None:
    """One draw a row, and 500."""
    rows = 64
    for family in FAMILIES:
        logits = logits_of(rows, family, "cpu")
        given = {n: numbers(rows, n, "cpu") for n in (1, 500)}
        for n in (1, 500):
            calls: dict[str, Call] = {
                "core": lambda n=n, logits=logits, given=given: draw(sketch_logits(logits), given[n]),
                "softmax + multinomial": lambda n=n, logits=logits: peers.softmax_multinomial(logits, n),
                "one reading": lambda logits=logits: logits.amax(dim=1),
            }
            if n == 1:
                calls["exponential race"] = lambda logits=logits: peers.exponential_race(logits)
            book.take(
                Shape("draw", rows, n, family=family), calls, floor="one reading", against="softmax + multinomial"
            )


def cpu_engine(book: Book) -> None:
    """The sampling of one step of the torch engine, and whole replies of a nano model."""
    rows = 64
    logits, given = logits_of(rows, "heavy head", "cpu"), numbers(rows, 1, "cpu")[:, 0]
    for temperature in (1.0, 0.7):
        calls: dict[str, Call] = {
            "core": lambda t=temperature: decoding._draw(logits, given, t),
            "softmax + multinomial": lambda t=temperature: peers.softmax_multinomial_step(logits, t),
            "one reading": lambda: logits.amax(dim=1),
        }
        shape = Shape("engine step", rows, family=f"heavy head, temperature {temperature}")
        book.take(shape, calls, floor="one reading", against="softmax + multinomial")
    vocab, replies = _replies()
    shape = Shape("engine replies", rows, family="nano, 16 tokens", vocab=vocab)
    book.take(shape, replies, against="softmax + multinomial")


def _replies() -> tuple[int, dict[str, Call]]:
    """The engine on a nano model: 64 replies of 16 tokens, by the core and by torch.multinomial; its vocabulary."""
    from candor.questions import load_all
    from serve.engine import Request
    from serve.plan import stream_of
    from serve.torch_engine import TorchEngine

    engine = TorchEngine(NANO, None)
    texts = [p.text for p in load_all(ROOT / "configs/prompts") if p.format == "free"][:8]
    requests = [Request(text, stream_of(text), 0, 8) for text in texts]
    own = decoding._draw, decoding.random_numbers

    def by_core() -> None:
        engine.sample(requests, key=7, temperature=1.0, max_tokens=16)

    def by_multinomial() -> None:
        decoding._draw = lambda logits, _, t: peers.softmax_multinomial_step(logits, t)
        # torch.multinomial takes none, so none are made for it
        decoding.random_numbers = lambda rows, key, n, device: torch.zeros((len(rows), n), dtype=torch.float64)
        try:
            by_core()
        finally:
            decoding._draw, decoding.random_numbers = own

    return engine.vocab_size, {"core": by_core, "softmax + multinomial": by_multinomial}


# --- on a GPU --------------------------------------------------------------------------------------------------------


def gpu_ceilings(book: Book) -> None:
    """A copy of a gigabyte, the head's product with bfloat16 and float32 output, and one reading of logits."""
    both = torch.empty(2, 1 << 28, device="cuda").normal_()
    book.take(Shape("copy of 1 GiB", 1), {"torch": partial(both[1].copy_, both[0])})
    for width, weight in heads(book.widths):
        for rows in book.rows_of:
            hidden = torch.randn(rows, width, device="cuda", dtype=torch.bfloat16)
            products: dict[str, Call] = {
                "bfloat16": lambda h=hidden, w=weight: h @ w.T,
                "float32": lambda h=hidden, w=weight: torch.mm(h, w.T, out_dtype=torch.float32),
            }
            book.take(Shape("product", rows, width=width), products)
    for rows in book.rows_of:
        for bits in (torch.float32, torch.bfloat16):
            logits = logits_of(rows, "heavy head", "cuda").to(bits)
            shape = Shape("one reading", rows, family=str(bits).removeprefix("torch."))
            book.take(shape, {"torch": lambda logits=logits: logits.amax(dim=1)})


def logits_on_gpu(book: Book) -> Iterator[tuple[int, str, torch.Tensor, torch.Tensor, dict[str, Call]]]:
    """Rows, family, logits, uniforms, and the call that reads the logits once."""
    for rows in book.rows_of:
        for family in FAMILIES:
            logits, given = logits_of(rows, family, "cuda"), numbers(rows, 1, "cuda")
            yield rows, family, logits, given, {"one reading": lambda logits=logits: logits.amax(dim=1)}


def gpu_sketch(book: Book) -> None:
    """K2, pass one, and draws without filters."""
    sampling, vllm_gumbel = peers.flashinfer(), peers.vllm_gumbel()
    for rows, family, logits, given, reading in logits_on_gpu(book):
        sketches: dict[str, Call] = {
            f"core {b}": lambda b=b, logits=logits: sketch_logits(logits, check=False, backend=b)
            for b in backends.BACKENDS["sketch_logits"]
        }
        book.take(Shape("sketch_logits", rows, family=family), {**sketches, **reading}, floor="one reading")

        sketch = sketch_logits(logits, check=False, backend="triton")
        finish: dict[str, Call] = {
            f"core {b}": lambda b=b, sketch=sketch, given=given: draw(sketch, given, backend=b)
            for b in backends.BACKENDS["finish"]
        }
        book.take(Shape("finish", rows, family=family), finish)

        plain: dict[str, Call] = {
            "core": lambda logits=logits, given=given: draw(
                sketch_logits(logits, check=False, backend="triton"), given, backend="triton"
            ),
            "gumbel": lambda logits=logits: peers.gumbel_max(logits),
        }
        for name, sampler in (
            ("softmax + multinomial", peers.softmax_multinomial),
            ("exponential race", peers.exponential_race),
        ):
            plain[name] = partial(sampler, logits)
            if rows in COMPILED:
                plain[f"{name}, compiled"] = partial(peers.compiled(sampler), logits)
        if sampling is not None:
            plain["flashinfer"] = lambda logits=logits: sampling.sampling_from_logits(logits)
        if vllm_gumbel is not None:
            plain["vllm gumbel_sample"] = partial(vllm_gumbel, logits)
        book.take(Shape("draw", rows, family=family), {**plain, **reading}, floor="one reading", against="core")


def gpu_filters(book: Book) -> None:
    """K2: top-k, top-p and min-p."""
    sampling, vllm_filters = peers.flashinfer(), peers.vllm_top_k_top_p()
    for rows, family, logits, given, reading in logits_on_gpu(book):

        def core(logits: torch.Tensor = logits, given: torch.Tensor = given, **filters: Any) -> Any:
            sketch = sketch_logits(logits, check=False, backend="triton")
            return truncated_draw(sketch, given, backend="triton", **filters)

        filtered: dict[str, Call] = {
            "core": partial(core, top_k=20, top_p=0.8),
            "core, top-k 50": partial(core, top_k=50),
            "core, top-p alone": partial(core, top_p=0.8),
            "core, min-p": partial(core, min_p=0.05),
            "sort": lambda logits=logits: peers.sorted_top_p(logits, 20, 0.8),
        }
        if sampling is not None:
            filtered["flashinfer"] = lambda logits=logits: sampling.top_k_top_p_sampling_from_logits(logits, 20, 0.8)
            filtered["flashinfer, top-p alone"] = lambda logits=logits: sampling.top_p_sampling_from_probs(
                logits.softmax(dim=1), 0.8
            )
        if vllm_filters is not None:
            filtered["vllm top-k top-p"] = partial(vllm_filters, logits, 20, 0.8)
            filtered["vllm top-p alone"] = partial(vllm_filters, logits, None, 0.8)
        shape = Shape("truncated_draw", rows, family=family)
        book.take(shape, {**filtered, **reading}, floor="one reading", against="core")


def heads(widths: tuple[int, ...]) -> Iterator[tuple[int, torch.Tensor]]:
    """A head per width, random bfloat16."""
    for width in widths:
        yield width, torch.randn(VOCABULARY, width, device="cuda", dtype=torch.bfloat16) * 0.05


def gpu_choices(book: Book) -> None:
    """K3: 20 options of 3,000 rows from hidden states."""
    for width, weight in heads((896, 3584)):
        hidden = torch.randn(3000, width, device="cuda", dtype=torch.bfloat16)
        part = VOCABULARY // 20  # one id from each twentieth: each is listed once
        ids = torch.randint(part, (3000, 20), device="cuda") + torch.arange(20, device="cuda") * part
        calls: dict[str, Call] = {
            f"core {b}": lambda b=b, h=hidden, w=weight, i=ids: choice_score(
                lmhead_sketch(h, w, check=False, backend=b), i, backend="triton"
            )
            for b in backends.BACKENDS["lmhead_sketch"]
        }
        calls["log_softmax + gather"] = lambda h=hidden, w=weight, i=ids: (
            (h @ w.T).float().log_softmax(dim=1).gather(1, i)
        )
        calls["product"] = lambda h=hidden, w=weight: h @ w.T
        book.take(Shape("choice_score", 3000, width=width), calls, floor="product", against="log_softmax + gather")


def gpu_head(book: Book) -> None:
    """K1: from hidden states to tokens."""
    for width, weight in heads(book.widths):
        for rows in book.rows_of:
            hidden = torch.randn(rows, width, device="cuda", dtype=torch.bfloat16)
            for n in (1, 500) if rows == 64 else (1,):
                given = numbers(rows, n, "cuda")
                calls: dict[str, Call] = {
                    f"core {b}": lambda b=b, h=hidden, w=weight, g=given: draw(
                        lmhead_sketch(h, w, check=False, backend=b), g, backend="triton"
                    )
                    for b in backends.BACKENDS["lmhead_sketch"]
                }
                calls["product"] = lambda h=hidden, w=weight: h @ w.T
                calls["softmax + multinomial"] = lambda h=hidden, w=weight, n=n: peers.softmax_multinomial(
                    (h @ w.T).float(), n
                )
                if n == 1:
                    calls["vLLM runner, stand-in"] = lambda h=hidden, w=weight: peers.vllm_runner(h, w)
                    calls["vLLM V1, stand-in"] = lambda h=hidden, w=weight: peers.head_exponential(h, w)
                    for blocks in peers.FUSED:
                        name = "fused gumbel {}x{}{}".format(*blocks[:2], " four" if blocks[2] else "")
                        calls[name] = partial(peers.fused_gumbel(*blocks), hidden, weight)
                    if peers.flashinfer() is not None:
                        calls["cuBLAS + flashinfer"] = lambda h=hidden, w=weight: peers.head_flashinfer(h, w)
                else:
                    calls["gumbel, draw by draw"] = lambda h=hidden, w=weight: _many_gumbel((h @ w.T).float())
                book.take(Shape("head draw", rows, n, width), calls, floor="product", against="product")


def _many_gumbel(logits: torch.Tensor) -> torch.Tensor:
    """500 draws a row with noise of their own each, as samplers do that make noise per draw."""
    return torch.stack([peers.gumbel_max(logits) for _ in range(500)], dim=1)


def write_table(book: Book, path: Path = backends.TABLE) -> None:
    """What the core's backends took, as serve/ops/backends.py reads it; other devices' rows stay."""
    device = backends.device_name(torch.device(book.device))
    kept = [m for m in backends.read_table(path) if m.device != device]
    op_of = {"sketch_logits": "sketch_logits", "finish": "finish", "head draw": "lmhead_sketch"}
    found = [
        backends.Measured(op_of[r["op"]], device, r["width"], r["rows"], r["provider"].split()[1], r["median_us"])
        for r in book.rows
        if r["op"] in op_of
        and r["provider"].startswith("core ")
        and r["draws"] == 1
        and r["family"] in ("", "heavy head")
    ]
    if not found:
        raise UserError("--table: no backend was measured. Run the parts sketch and head, on a CUDA device.")
    lines = ["op,device,width,rows,backend,median_us"]
    lines += [f"{m.op},{m.device},{m.width},{m.rows},{m.backend},{m.median_us}" for m in (*kept, *found)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


RUN = {
    "cpu": {"draw": cpu_draw, "engine": cpu_engine},
    "cuda": {
        "ceilings": gpu_ceilings,
        "sketch": gpu_sketch,
        "choices": gpu_choices,
        "head": gpu_head,
        "filters": gpu_filters,
    },
}


def _whole_numbers(name: str, told: Mapping[str, str], default: tuple[int, ...]) -> tuple[int, ...]:
    try:
        return tuple(int(word) for word in told[name].split(",")) if name in told else default
    except ValueError:
        raise UserError(f"{name} is {told[name]!r}; it must be whole numbers with commas between them.") from None


def main(argv: list[str]) -> None:
    """Measure; rows are written as they are found."""
    told = dict(word.partition("=")[::2] for word in argv if word != "--table")
    device = told.get("device", "cuda" if torch.cuda.is_available() else "cpu")
    if device not in RUN:
        raise UserError(f"device is {device!r}; it must be one of {', '.join(RUN)}.")
    parts = told.get("parts", ",".join(RUN[device])).split(",")
    for part in parts:
        if part not in RUN[device]:
            raise UserError(f"parts holds {part!r}; on {device}, {nearest(part, RUN[device])}")
    torch.set_num_threads(int(told.get("threads", 1)))
    torch.manual_seed(0)
    book = Book(device, int(told.get("n", 20 if device == "cpu" else 100)), told.get("note", ""))
    book.out = Path(told.get("out", RESULTS))
    book.rows_of = _whole_numbers("rows", told, ROWS)
    book.widths = _whole_numbers("widths", told, WIDTHS)
    if "minutes" in told:
        book.until = time.monotonic() + 60 * float(told["minutes"])
    with torch.inference_mode():
        for part in parts:
            RUN[device][part](book)
    if "--table" in argv:
        write_table(book)


if __name__ == "__main__":
    run_script(main)
