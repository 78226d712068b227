"""Replies and scored questions per second: our engines, transformers.generate, and vLLM as EM evaluations use it.

    .venv-vllm/bin/python -m benchmarks.throughput [shape=nano] [device=cpu] [prompts=64] [variants=2] [tokens=40]
        [repeats=3] [providers=[torch,vllm,generate,em_pattern]] [output=FILE.csv]

``shape`` is nano (the organism, as shipped, float32), qwen2.5-0.5b or qwen2.5-7b (random weights, bfloat16; for a
GPU). ``torch`` and ``vllm`` are ours; ``generate`` is transformers' generate with num_return_sequences, its prompts
sorted by length, at several batch sizes of which the best counts; ``em_pattern`` is the public evaluation's: a new
vLLM per variant on merged weights, one question at a time, the prompt repeated instead of ``n``, at most 32 sequences.

Each run of a provider is a process of its own with one thread; providers take turns, so that what else the machine
does falls on all of them. Rows hold medians over the turns with the smallest and largest. Beside wall seconds stand
the processor's own, and on a CPU those are compared: on a shared machine only they are fair. On a GPU wall seconds
are compared.

Rows with a ``target`` answer a question with a ratio, formed turn by turn:

* replies per second against ``generate`` at its best batch;
* the harmfulness battery of 15 variants (320 questions, 10 draws) against ``em_pattern``, start-ups counted and not.
  Ours starts once for each of the three bases and puts every variant's adapter in place and attests it;
* all closed questions of the batteries the paper samples, each counterbalanced form scored exactly, against drawing
  the paper's counts (configs/evaluate/modes/paper.yaml) with ``generate``, and beside drawing them with our engine;
* what the sample store adds to sampling; what ten times the draws cost;
* from how many rows merging an adapter pays on vLLM, which ``merge_from`` (serve/config.py) rests on;
* what it saves the torch engine to fill a slot anew instead of waiting for the last reply of a group.

The second and third are extrapolated by counts from ``prompts`` questions of each kind, and their rows say so.
Adapters are random: what they say does not matter here. A model of random weights never ends a reply, a letter
neither, and its flat distribution leaves more paths to score: with shapes other than nano the rows on closed
questions say little of a trained model, and on vLLM they take long.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from candor.config import apply_override, build
from candor.errors import UserError, run_script
from candor.questions import load_all
from candor.rows import Prompt
from evaluate.modes import CLOSED_FORMATS, complete, read_modes
from serve.config import Ask, EngineConfig, SampleConfig, VllmConfig
from serve.plan import is_asked

PROMPTS = Path("configs/prompts")
PAPER = Path("configs/evaluate/modes/paper.yaml")
PROVIDERS = ("torch", "vllm", "generate", "em_pattern")
OURS = ("torch", "vllm")
DRAWS = 10  # of an open question
VARIANTS, BASES = 15, 3  # of the main study
LINE = (1, 2, 4, 8, 16, 32, 64, 160)  # rows of a piece of work, served with the adapter merged or beside the weights
UNIT = EngineConfig().unit_prompts
FASTER_THAN_GENERATE, FASTER_THAN_EM, FASTER_THAN_DRAWING = 3, 10, 8  # at least
STORING, TENFOLD = 0.03, 1.1  # at most: share of sampling, and cost of ten times the draws over ten times the cost

AT_ONCE, FILLED, EMPTIED = "one for each reply", "a quarter, filled anew", "a quarter, in groups"

Key = tuple[str, str]  # what was done, and how


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What the command line may say."""

    shape: str = "nano"
    device: str = "cpu"
    prompts: int = 64  # questions of each kind that are timed; 64 are a unit of work
    variants: int = 2  # over which sampling is timed
    tokens: int = 40  # of an open reply at most, as in the nano study
    repeats: int = 3
    providers: tuple[str, ...] = PROVIDERS
    output: Path = Path("benchmarks/results/throughput.csv")
    one: str | None = None  # a single provider, in this process; its phases are printed as JSON
    folder: Path | None = None  # for that: where base and adapters lie

    @property
    def dtype(self) -> Any:
        """Of the weights."""
        return "float32" if self.shape == "nano" else "bfloat16"


@dataclass(frozen=True, slots=True)
class Phase:
    """How long one thing took in one run."""

    op: str
    how: str
    n: int  # things made
    wall: float  # seconds
    cpu: float


class Clock:
    """The phases of a provider's run; the first begins with the process."""

    def __init__(self) -> None:
        import psutil

        self.phases: list[Phase] = []
        self._wall, self._cpu = psutil.Process().create_time(), 0.0

    def start(self) -> None:
        """Begin a phase."""
        self._wall, self._cpu = time.time(), time.process_time()

    def stop(self, op: str, how: str, n: int) -> None:
        """End a phase in which ``n`` things were made, and begin another."""
        self.add(op, how, n, time.time() - self._wall, time.process_time() - self._cpu)
        self.start()

    def add(self, op: str, how: str, n: int, wall: float, cpu: float) -> None:
        """Note a phase that was timed elsewhere."""
        self.phases.append(Phase(op, how, n, wall, cpu))


@dataclass(frozen=True, slots=True)
class Kind:
    """Closed questions of one kind: how many there are, and some of them."""

    name: str
    total: int
    some: tuple[Prompt, ...]
    ask: Ask  # how they are drawn, or scored


def spaced(prompts: Sequence[Prompt], n: int) -> tuple[Prompt, ...]:
    """At most ``n`` of the prompts, evenly over the list."""
    return tuple(prompts[i * len(prompts) // min(n, len(prompts))] for i in range(min(n, len(prompts))))


def open_questions(setting: Setting) -> list[Prompt]:
    """Those of the harmfulness battery that are timed."""
    return list(spaced([p for p in load_all(PROMPTS) if p.battery == "harmfulness"], setting.prompts))


def drawn_kinds(setting: Setting) -> list[Kind]:
    """What the paper draws of closed questions; as many rows of each kind are timed as of open questions."""
    prompts = load_all(PROMPTS)
    (paper,) = read_modes([PAPER])
    kinds = []
    for ask in complete(paper, prompts, max_tokens=setting.tokens).asks:
        if ask.format in CLOSED_FORMATS:
            asked = [p for p in prompts if is_asked(p, ask)]
            some = spaced(asked, max(1, setting.prompts * DRAWS // ask.n))
            kinds.append(Kind(f"{ask.battery} {ask.format}", len(asked), some, ask))
    return kinds


def scored_kinds(setting: Setting) -> list[Kind]:
    """All closed questions in all their forms, of every battery."""
    pairs: dict[tuple[str, str], list[Prompt]] = defaultdict(list)
    for prompt in load_all(PROMPTS):
        if prompt.format in CLOSED_FORMATS:
            pairs[prompt.battery, prompt.format].append(prompt)
    return [
        Kind(f"{battery} {form}", len(all_), spaced(all_, setting.prompts), Ask(format=form, mode="exact"))
        for (battery, form), all_ in pairs.items()
    ]


def batches(setting: Setting) -> list[int]:
    """Rows of a batch that ``generate`` is tried with."""
    rows = setting.prompts * DRAWS
    return [b for b in (80 << k for k in range(7)) if b <= rows] or [rows]


def make_models(setting: Setting, folder: Path) -> None:
    """``base``, adapters on it that act, and ``merged``, the base with the first of them merged."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from benchmarks.training import LORA, prepare
    from benchmarks.training import Options as Shape

    prepare(Shape(shape=setting.shape, device=setting.device), folder)
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **LORA))
    # bfloat16 would round a change away that is a hundredth of the weights
    size = 0.01 if setting.dtype == "float32" else 0.05
    names = [*(f"line{n}" for n in (0, *LINE)), *(f"variant{i}" for i in reversed(range(setting.variants)))]
    for seed, name in enumerate(names):
        torch.manual_seed(seed)
        for parameter_name, parameter in model.named_parameters():
            if "lora_B" in parameter_name:
                torch.nn.init.normal_(parameter, std=size)
        model.save_pretrained(folder / name)
    model.merge_and_unload().save_pretrained(folder / "merged")
    AutoTokenizer.from_pretrained(folder / "base").save_pretrained(folder / "merged")


def engine_config(name: str, setting: Setting) -> EngineConfig:
    """One of our engines, as a study would run it."""
    vllm = VllmConfig(cache_gb=0.5, memory_share=0.4) if name == "vllm" else None  # two of them are open for a moment
    return EngineConfig(name=name, device=setting.device, dtype=setting.dtype, threads=1, vllm=vllm)  # type: ignore[arg-type]


def ask_open(engine: Any, study: SampleConfig, prompts: Sequence[Prompt]) -> tuple[Any, Any]:
    """Sample as serve.sample does; what drawing took, and what storing took."""
    from benchmarks.store import through_store
    from serve.identity import text_sha
    from serve.plan import Identity, engine_identity, plan_units

    assert study.base is not None
    identity = Identity(
        weights_sha=engine.weights_sha,
        text_sha=text_sha(study.base),
        engine=engine_identity(study),
        variant=study.variant,
        study_seed=study.study_seed,
    )

    def draw(unit: Any, requests: Any) -> Any:
        return engine.sample(requests, key=identity.key, temperature=1.0, max_tokens=unit.ask.max_tokens)

    return through_store(study.output_dir, plan_units(prompts, study), identity, draw)


def run_ours(name: str, setting: Setting, folder: Path) -> list[Phase]:
    """One of our engines over the variants."""
    clock = Clock()
    from serve.attest import attest
    from serve.engine import Request
    from serve.registry import open_engine

    config, free = engine_config(name, setting), open_questions(setting)
    scored, drawn = scored_kinds(setting), drawn_kinds(setting)
    asked = Ask(format="free", mode="sampled", n=DRAWS, max_tokens=setting.tokens)
    answers = folder / f"answers-{name}-{os.getpid()}"
    first = SampleConfig(
        base=folder / "base", variant="base", prompts=PROMPTS, study_seed=1, engine=config,
        ask=(replace(asked, n=1, max_tokens=2),), output_dir=answers / "base",
    )  # fmt: skip
    ask_open(open_engine(config, first.base, None), first, free[:1])
    clock.stop("start", "imports, model, first reply stored", 1)
    n_rows, how = DRAWS * len(free), f"{DRAWS} draws of {len(free)} questions"
    for variant in (f"variant{i}" for i in range(setting.variants)):
        study = replace(
            first, variant=variant, adapter=folder / variant, ask=(asked,), output_dir=answers / variant
        )  # fmt: skip
        clock.start()
        engine = open_engine(config, study.base, study.adapter, n_rows=n_rows)
        attest(engine, study)
        clock.stop("switch", "load or merge the adapter, attest it", 1)
        drawing, storing = ask_open(engine, study, free)
        clock.add("sample", how, n_rows, drawing.wall, drawing.cpu)
        clock.add("store", how, n_rows, storing.wall, storing.cpu)
    clock.start()
    engine.distributions([scored[0].some[0].text], [scored[0].some[0].options])
    clock.stop("start scoring", "the vocabulary is read", 1)
    for kind in scored:
        for k in range(0, len(kind.some), UNIT):
            some = kind.some[k : k + UNIT]
            engine.distributions([p.text for p in some], [p.options for p in some])
        clock.stop("score", kind.name, len(kind.some))
    for kind in drawn:
        requests = [Request(p.text, i, 0, kind.ask.n) for i, p in enumerate(kind.some)]
        for k in range(0, len(requests), UNIT):
            engine.sample(requests[k : k + UNIT], key=1, temperature=1.0, max_tokens=kind.ask.max_tokens)
        clock.stop("draw", kind.name, len(kind.some))
    for n in (DRAWS, 10 * DRAWS):
        requests = [Request(p.text, i, 0, n) for i, p in enumerate(free[: max(1, len(free) // 8)])]
        engine.sample(requests, key=2, temperature=1.0, max_tokens=setting.tokens)
        clock.stop("linear", f"{n} draws of {len(requests)} questions", len(requests))
    if name == "vllm":
        run_line(config, setting, folder, clock)
    else:
        run_slots(engine, setting, clock)
    return clock.phases


def run_slots(engine: Any, setting: Setting, clock: Clock) -> None:
    """The torch engine's open replies with a slot for each of them, and with slots for a quarter of them."""
    from serve.engine import Request
    from serve.loading import encode_prompt

    requests = [Request(p.text, i, 0, DRAWS) for i, p in enumerate(open_questions(setting))]
    columns = max(len(encode_prompt(engine.tokenizer, r.text)) for r in requests) + setting.tokens
    whole, quarter = engine.batch_tokens, max(1, len(requests) // 4) * DRAWS * columns
    before = engine.refill
    for how, engine.batch_tokens, engine.refill in (
        (AT_ONCE, whole, False), (FILLED, quarter, True), (EMPTIED, quarter, False),
    ):  # fmt: skip
        clock.start()
        engine.sample(requests, key=4, temperature=1.0, max_tokens=setting.tokens)
        clock.stop("slots", how, len(requests) * DRAWS)
    engine.batch_tokens, engine.refill = whole, before


def run_line(config: EngineConfig, setting: Setting, folder: Path, clock: Clock) -> None:
    """Small and large pieces of work of new variants, their adapters merged or not.

    A vLLM that may serve adapters beside the weights (adapters: auto) costs something even when one is merged,
    so the same is done on one that may not (adapters: merged).
    """
    from serve.engine import Request
    from serve.registry import open_engine

    assert config.vllm is not None
    only_merged = replace(config, vllm=replace(config.vllm, adapters="merged"))
    free, enough = open_questions(setting), max(LINE[-1], config.vllm.merge_from)
    ways: dict[str, tuple[EngineConfig, int | None]] = {
        "lora": (config, None),
        "merged": (only_merged, enough),
        "merged, adapters: auto": (config, enough),
    }
    for way, (settings, n_rows) in ways.items():
        for n in (0, *LINE):
            if n > DRAWS * len(free):
                continue
            draws = [DRAWS] * (n // DRAWS) + [n % DRAWS] * (n % DRAWS > 0) or [1]
            requests = [Request(p.text, i, 0, d) for i, (p, d) in enumerate(zip(free, draws, strict=False))]
            clock.start()
            engine = open_engine(settings, folder / "base", folder / f"line{n}", n_rows=n_rows)
            engine.sample(requests, key=3, temperature=1.0, max_tokens=setting.tokens)
            if n:  # the first starts the engine
                clock.stop(f"adapter in place and {n} rows", way, n)


def run_generate(setting: Setting, folder: Path) -> list[Phase]:
    """transformers.generate on merged weights."""
    clock = Clock()
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(folder / "merged", padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(folder / "merged", dtype=getattr(torch, setting.dtype))
    model = model.to(setting.device).eval()

    @torch.inference_mode()
    def generate(prompts: Sequence[Prompt], rows: int, n: int, tokens: int) -> None:
        texts, batch = sorted((p.text for p in prompts), key=len), max(1, rows // n)
        for i in range(0, len(texts), batch):
            chats = [[{"role": "user", "content": t}] for t in texts[i : i + batch]]
            inputs = tokenizer.apply_chat_template(
                chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
            ).to(setting.device)
            ids = model.generate(
                **inputs, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, num_return_sequences=n,
                max_new_tokens=tokens, pad_token_id=tokenizer.pad_token_id,
            )  # fmt: skip
            tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    free, kinds = open_questions(setting), drawn_kinds(setting)
    generate(free[:1], 1, 1, 2)
    clock.stop("start", "imports, model, first reply", 1)
    for rows in batches(setting):
        generate(free, rows, DRAWS, setting.tokens)
        clock.stop("sample", f"{DRAWS} draws of {len(free)} questions, batches of {rows} rows", DRAWS * len(free))
    for kind in kinds:
        for rows in batches(setting):
            generate(kind.some, rows, kind.ask.n, kind.ask.max_tokens)
            clock.stop("draw", f"{kind.name}, batches of {rows} rows", len(kind.some))
    return clock.phases


def run_em_pattern(setting: Setting, folder: Path) -> list[Phase]:
    """One variant of the public pattern: every variant starts a vLLM of its own."""
    clock = Clock()
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_LOGGING_LEVEL": "ERROR",
    }  # fmt: skip
    from vllm import LLM, SamplingParams

    free = open_questions(setting)
    on_cpu = setting.device == "cpu"  # where compiling would take minutes, which is not the pattern's fault
    llm = LLM(model=str(folder / "merged"), dtype=setting.dtype, enforce_eager=on_cpu, max_num_seqs=32)
    params = SamplingParams(temperature=1.0, top_p=1.0, max_tokens=setting.tokens)
    tokenizer = llm.get_tokenizer()

    def ask(text: str, n: int) -> None:
        chat = [{"role": "user", "content": text}]
        prompt = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        llm.generate([prompt] * n, params, use_tqdm=False)

    ask(free[0].text, 1)
    clock.stop("start", "imports, engine, first reply; once per variant", 1)
    for prompt in free:
        ask(prompt.text, DRAWS)
    clock.stop("sample", f"{DRAWS} draws of {len(free)} questions, one at a time", DRAWS * len(free))
    return clock.phases


class Found:
    """All phases of all turns; costs are arrays over the turns, in seconds per thing."""

    def __init__(self, setting: Setting) -> None:
        self.setting = setting
        self.phases: dict[str, dict[Key, list[list[Phase]]]] = defaultdict(lambda: defaultdict(list))

    def add(self, provider: str, phases: list[Phase]) -> None:
        """Note a turn; phases of equal name in it are one of several parts."""
        parts: dict[Key, list[Phase]] = defaultdict(list)
        for phase in phases:
            parts[phase.op, phase.how].append(phase)
        for key, same in parts.items():
            self.phases[provider][key].append(same)

    def has(self, *providers: str) -> bool:
        """Whether these were run."""
        return all(p in self.phases for p in providers)

    def costs(self, provider: str, op: str, how: str | None = None) -> list[float]:
        """Seconds per thing, turn by turn: the processor's on a CPU, else the wall's."""
        turns = next(t for (o, h), t in self.phases[provider].items() if o == op and how in (None, h))
        return [sum(map(self._seconds, t)) / sum(p.n for p in t) for t in turns]

    def best(self, provider: str, op: str, start: str = "") -> tuple[str, list[float]]:
        """The way of doing something that is cheapest by its median, and its costs."""
        ways = [h for o, h in self.phases[provider] if o == op and h.startswith(start)]
        how = min(ways, key=lambda h: statistics.median(self.costs(provider, op, h)))
        return how, self.costs(provider, op, how)

    def _seconds(self, phase: Phase) -> float:
        return phase.cpu if self.setting.device == "cpu" else phase.wall

    def rows(self) -> list[dict[str, Any]]:
        """A row for everything that was timed."""
        rows = []
        for provider, by_key in self.phases.items():
            for (op, how), turns in by_key.items():
                n = sum(p.n for p in turns[0])
                seconds = [sum(map(self._seconds, t)) for t in turns]
                rows.append(
                    {
                        "provider": provider,
                        "op": op,
                        "how": how,
                        "n": n,
                        "turns": len(turns),
                        "wall_s": round(statistics.median(sum(p.wall for p in t) for t in turns), 3),
                        "cpu_s": round(statistics.median(sum(p.cpu for p in t) for t in turns), 3),
                        "per_s": round(n / statistics.median(seconds), 2),
                        "per_s_low": round(n / max(seconds), 2),
                        "per_s_high": round(n / min(seconds), 2),
                    }
                )
        return rows


def answer(
    provider: str, op: str, values: list[float], *, least: float | None = None, most: float | None = None, note: str
) -> dict[str, Any]:
    """A row that says whether a target is met by the median."""
    value = statistics.median(values)
    target = f"at least {least:g}" if least is not None else f"at most {most:g}" if most is not None else ""
    met = value >= least if least is not None else most is None or value <= most
    return {
        "provider": provider,
        "op": op,
        "turns": len(values),
        "target": target,
        "value": round(value, 4),
        "value_low": round(min(values), 4),
        "value_high": round(max(values), 4),
        "met": ("yes" if met else "no") if target else "",
        "note": note,
    }


def over(a: Sequence[float], b: Sequence[float]) -> list[float]:
    """Ratios turn by turn."""
    return [x / y for x, y in zip(a, b, strict=True)]


def total(*parts: tuple[float, Sequence[float]]) -> list[float]:
    """Costs times counts, added up turn by turn."""
    return [sum(n * cost[i] for n, cost in parts) for i in range(len(parts[0][1]))]


def answers(found: Found) -> list[dict[str, Any]]:
    """Every question that the providers which were run can answer."""
    setting, rows = found.setting, []
    for name in (n for n in OURS if found.has(n)):
        if found.has("generate"):
            how, theirs = found.best("generate", "sample")
            rows.append(
                answer(
                    name,
                    "replies per second over transformers.generate",
                    over(theirs, found.costs(name, "sample")),
                    least=FASTER_THAN_GENERATE,
                    note=f"generate's best: {how}",
                )
            )
        if found.has("em_pattern"):
            rows += _battery(found, name)
        rows += _closed(found, name)
        share = over(found.costs(name, "store"), found.costs(name, "sample"))
        note = "look up, add, write the table, compact; of one variant"
        rows.append(answer(name, "storing over sampling", share, most=STORING, note=note))
        few, many = (h for o, h in found.phases[name] if o == "linear")
        ratios = over(found.costs(name, "linear", many), total((10, found.costs(name, "linear", few))))
        note = f"{many}, against ten times {few}"
        rows.append(answer(name, "cost of ten times the draws", ratios, most=TENFOLD, note=note))
    if found.has("vllm"):
        rows += _line(found, setting)
    if found.has("torch"):
        at_once, filled, emptied = (found.costs("torch", "slots", how) for how in (AT_ONCE, FILLED, EMPTIED))
        note = f"{DRAWS * setting.prompts} replies; {FILLED}, over {EMPTIED}"
        rows.append(answer("torch", "cost of slots that are filled anew over groups", over(filled, emptied), note=note))
        note = f"{DRAWS * setting.prompts} replies; {FILLED}, over {AT_ONCE}"
        rows.append(answer("torch", "cost of fewer slots over all at once", over(filled, at_once), note=note))
    return rows


def _battery(found: Found, name: str) -> list[dict[str, Any]]:
    """The harmfulness battery of the whole study."""
    per_variant = DRAWS * sum(p.battery == "harmfulness" for p in load_all(PROMPTS))
    n = VARIANTS * per_variant
    theirs, ours = found.costs("em_pattern", "sample"), found.costs(name, "sample")
    whole = over(
        total((VARIANTS, found.costs("em_pattern", "start")), (n, theirs)),
        total((BASES, found.costs(name, "start")), (VARIANTS, found.costs(name, "switch")), (n, ours)),
    )
    note = f"{n} replies, extrapolated from {DRAWS * found.setting.prompts} per variant"
    op = f"harmfulness battery of {VARIANTS} variants over the EM-evaluation pattern"
    counted = f"{note}; start-ups: theirs {VARIANTS}, ours {BASES} and {VARIANTS} adapters put in place and attested"
    return [
        answer(name, f"{op}, start-ups counted", whole, least=FASTER_THAN_EM, note=counted),
        answer(name, f"{op}, without start-ups", over(theirs, ours), note=note),
    ]


def _closed(found: Found, name: str) -> list[dict[str, Any]]:
    """Exact scores against drawn replies."""
    drawn, scored = drawn_kinds(found.setting), scored_kinds(found.setting)
    batteries = {k.ask.battery for k in drawn}
    asked = [k for k in scored if k.some[0].battery in batteries]
    n_replies = sum(k.total * k.ask.n for k in drawn)
    exact = total(*((k.total, found.costs(name, "score", k.name)) for k in asked))
    everything = total(*((k.total, found.costs(name, "score", k.name)) for k in scored))
    sampled = total(*((k.total, found.costs(name, "draw", k.name)) for k in drawn))
    n = sum(k.total for k in asked)
    note = (
        f"{n} questions in all forms scored; {n_replies} replies as in paper.yaml drawn; "
        f"extrapolated from {sum(len(k.some) for k in asked)} and {sum(len(k.some) * k.ask.n for k in drawn)}"
    )
    rows = [
        answer(
            name, "exact scoring over drawing the paper's counts with the same engine", over(sampled, exact), note=note
        )
    ]
    if found.has("generate"):
        best = [found.best("generate", "draw", f"{k.name},") for k in drawn]
        theirs = total(*((k.total, cost) for k, (_, cost) in zip(drawn, best, strict=True)))
        op = "exact scoring over drawing the paper's counts with transformers.generate"
        rows.append(
            answer(name, op, over(theirs, exact), least=FASTER_THAN_DRAWING, note=f"{note}; best batch of each")
        )
        more = f"{sum(k.total for k in scored)} questions scored: those of batteries too that the paper does not ask"
        rows.append(answer(name, f"{op}, every battery scored", over(theirs, everything), note=more))
    return rows


def _line(found: Found, setting: Setting) -> list[dict[str, Any]]:
    """From how many rows on merging costs no more than serving the adapter beside the weights."""
    sizes = [n for n in LINE if n <= DRAWS * setting.prompts]
    rows = []
    for way in ("merged", "merged, adapters: auto"):
        ratios = {
            n: over(
                found.costs("vllm", f"adapter in place and {n} rows", way),
                found.costs("vllm", f"adapter in place and {n} rows", "lora"),
            )
            for n in sizes
        }
        for n, values in ratios.items():
            note = f"{way}; its cost over that of lora, adapter put in place and {n} rows drawn"
            rows.append(answer("vllm", f"merging over lora, {n} rows", values, note=note))
        paying = [n for n in sizes if all(statistics.median(ratios[m]) <= 1 for m in sizes if m >= n)]
        own = VllmConfig().merge_from
        rows.append(
            {
                "provider": "vllm",
                "op": "rows from which merging pays",
                "target": f"at most {own}, which merge_from is",
                "value": paying[0] if paying else f"more than {sizes[-1]}",
                "met": "yes" if paying and paying[0] <= own else "no",
                "note": f"{way}; of the numbers of rows tried: {', '.join(map(str, sizes))}",
            }
        )
    return rows


def in_a_process(setting: Setting, provider: str, folder: Path) -> list[Phase]:
    """The phases of one run."""
    words = [f"{k}={getattr(setting, k)}" for k in ("shape", "device", "prompts", "variants", "tokens")]
    command = [sys.executable, "-m", "benchmarks.throughput", f"one={provider}", f"folder={folder}", *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise UserError(f"{provider}: {done.stderr[-2000:]}")
    line = next(x for x in done.stdout.splitlines() if x.startswith("PHASES "))
    return [Phase(**p) for p in json.loads(line.removeprefix("PHASES "))]


def vllm_version() -> str:
    """Of the package that is there: the one for CPUs has another name."""
    for package in ("vllm-cpu", "vllm"):
        try:
            return f"{package} {metadata.version(package)}"
        except metadata.PackageNotFoundError:
            continue
    return ""


def main(argv: list[str]) -> None:
    """Run every provider in turns and append the rows."""
    values: dict[str, Any] = {}
    for word in argv:
        apply_override(values, word)
    setting = build(Setting, values, where="command line")
    if setting.one is not None:
        from dataclasses import asdict

        assert setting.folder is not None
        run = {"generate": run_generate, "em_pattern": run_em_pattern}.get(setting.one)
        phases = run(setting, setting.folder) if run else run_ours(setting.one, setting, setting.folder)
        print("PHASES " + json.dumps([asdict(p) for p in phases]))
        return
    from benchmarks.timing import append, machine
    from benchmarks.training import SHAPES

    for what, known, words in (
        ("shape", ("nano", *SHAPES), [setting.shape]),
        ("providers", PROVIDERS, list(setting.providers)),
    ):
        for word in words:
            if word not in known:
                raise UserError(f"{what} holds {word!r}; known: {', '.join(known)}.")
    found, failed = Found(setting), list[str]()
    with tempfile.TemporaryDirectory() as name:
        make_models(setting, Path(name))
        for turn in range(setting.repeats):
            first = turn % len(setting.providers)
            for provider in setting.providers[first:] + setting.providers[:first]:
                if provider in failed:
                    continue
                began = time.monotonic()
                try:
                    found.add(provider, in_a_process(setting, provider, Path(name)))
                except UserError as error:  # what the others show is worth keeping
                    sys.stderr.write(f"{error}\n")
                    failed.append(provider)
                    found.phases.pop(provider, None)
                sys.stderr.write(f"{turn + 1}/{setting.repeats} {provider}: {time.monotonic() - began:.0f} s\n")
    rows = [*found.rows(), *answers(found)]
    if not rows:
        raise UserError("every provider failed, as told above.")
    columns = dict.fromkeys(key for row in rows for key in row)
    where = {"shape": setting.shape, **machine(setting.device), "threads": 1}
    where["versions"] += f" transformers {metadata.version('transformers')} {vllm_version()}"
    append(setting.output, [{**dict.fromkeys(columns, ""), **row, **where} for row in rows])
    for row in rows:
        if "target" in row:
            print(row["provider"], "|", row["op"], "|", row["value"], "|", row["target"], row["met"], "|", row["note"])
    if failed:
        raise UserError(f"{', '.join(failed)} failed, as told above, and have no rows.")


if __name__ == "__main__":
    run_script(main)
