"""Replies and scored questions per second: our engines, transformers.generate, and vLLM as EM evaluations use it.

    .venv-vllm/bin/python -m benchmarks.throughput [prompts=32] [variants=2] [base=FOLDER] [device=cpu]

Every provider runs in a process of its own on the same prompts, with the same adapters, one thread.
CPU seconds stand beside wall seconds: on a machine that is busy with other work only they compare.
Rows are appended to benchmarks/results/throughput.csv with device, versions and commit. Adapters are
random (what they say does not matter here) and merged where the provider merges.

Providers: ``torch`` and ``vllm`` are ours, one process for all variants; ``generate`` is
transformers' generate with num_return_sequences=10 at its best batch size; ``em_pattern`` is the
public evaluation's: a new vLLM per variant on merged weights, one question at a time, the prompt
repeated instead of ``n``, at most 32 sequences.
"""

import csv
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "throughput.csv"
DRAWS, TOKENS = 10, 40  # of an open question, as in the nano study
CLOSED_DRAWS = 500  # the paper's, of a closed question
PROVIDERS = ("torch", "vllm", "generate", "em_pattern")


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What is run."""

    prompts: int = 32  # open questions; a quarter as many closed ones are drawn 500 times
    variants: int = 2
    base: Path = ROOT / "train/organism/weights/nano"
    device: str = "cpu"
    providers: tuple[str, ...] = PROVIDERS


class Clock:
    """Rows of one provider: wall and CPU seconds of phases."""

    def __init__(self, provider: str) -> None:
        self.provider, self.rows = provider, []
        self.start()

    def start(self) -> None:
        """Begin a phase."""
        self._wall, self._cpu = time.monotonic(), time.process_time()

    def stop(self, op: str, n: int, note: str = "") -> None:
        """End a phase in which ``n`` things were made."""
        wall, cpu = time.monotonic() - self._wall, time.process_time() - self._cpu
        row = {"provider": self.provider, "op": op, "n": n, "wall_s": round(wall, 3), "cpu_s": round(cpu, 3)}
        self.rows.append(row | {"per_cpu_s": round(n / cpu, 2), "note": note})
        self.start()


def questions(setting: Setting) -> tuple[list[Any], list[Any]]:
    """Open and closed prompts."""
    from candor.questions import load_all

    every = load_all(ROOT / "configs/prompts")
    free = [p for p in every if p.format == "free"]
    closed = [p for p in every if p.options and p.format in ("choice", "decision", "numerical", "likert")]
    few = len(closed) // max(1, setting.prompts)
    return free[: setting.prompts], closed[:: max(1, few)][: setting.prompts]


def make_adapters(setting: Setting, folder: Path) -> list[Path]:
    """Adapters that act, of random weights."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    found = []
    for seed in range(setting.variants):
        lora = LoraConfig(r=8, lora_alpha=16, target_modules=["o_proj", "down_proj"], task_type="CAUSAL_LM")
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(setting.base), lora)
        torch.manual_seed(seed)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.01)
        model.save_pretrained(folder / f"adapter{seed}")
        model.merge_and_unload().save_pretrained(folder / f"merged{seed}")
        for file in setting.base.glob("*"):
            if "token" in file.name or file.suffix == ".jinja":
                (folder / f"merged{seed}" / file.name).write_bytes(file.read_bytes())
        found.append(folder / f"adapter{seed}")
    return found


def run_ours(name: str, setting: Setting, folder: Path) -> list[dict[str, Any]]:
    """One of our engines over all variants."""
    clock = Clock(name)
    from serve.attest import attest
    from serve.config import Ask, EngineConfig, SampleConfig, VllmConfig
    from serve.engine import Request
    from serve.registry import open_engine

    config = EngineConfig(name=name, device=setting.device, threads=1)  # type: ignore[arg-type]
    if name == "vllm":
        config = replace(config, vllm=VllmConfig(cache_gb=0.5))
    free, closed = questions(setting)
    requests = [Request(p.text, i + 1, 0, DRAWS) for i, p in enumerate(free)]
    open_engine(config, setting.base, None).sample(requests[:1], key=1, temperature=1.0, max_tokens=2)
    clock.stop("start", 1, "imports, model, first reply")
    for adapter in sorted(folder.glob("adapter*")):
        n_rows = DRAWS * len(free)
        engine = open_engine(config, setting.base, adapter, n_rows=n_rows)
        sample = SampleConfig(
            base=setting.base, adapter=adapter, variant="v", prompts=folder, ask=(Ask(format="free", mode="sampled"),),
            output_dir=folder, study_seed=1, engine=config,
        )  # fmt: skip
        attest(engine, sample)
        clock.stop("switch", 1, "load or merge the adapter, attest it")
        engine.sample(requests, key=1, temperature=1.0, max_tokens=TOKENS)
        clock.stop("sample", n_rows)
    engine.distributions([p.text for p in closed], [p.options for p in closed])
    clock.stop("score", len(closed), "first time: option tries are built")
    engine.distributions([p.text for p in closed], [p.options for p in closed])
    clock.stop("score", len(closed), "again")
    few = closed[:: max(1, len(closed) // 8)]
    drawn = [Request(p.text, i, 0, CLOSED_DRAWS) for i, p in enumerate(few)]
    engine.sample(drawn, key=1, temperature=1.0, max_tokens=6)
    clock.stop("draw closed 500x", len(few))
    engine.sample([replace(r, n=10 * DRAWS) for r in requests[:8]], key=1, temperature=1.0, max_tokens=TOKENS)
    clock.stop("sample", 80 * DRAWS, "10 times the draws of 8 prompts")
    return clock.rows


def run_generate(setting: Setting, folder: Path) -> list[dict[str, Any]]:
    """transformers.generate on merged weights."""
    clock = Clock("generate")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(1)
    free, closed = questions(setting)
    tokenizer = AutoTokenizer.from_pretrained(folder / "merged0", padding_side="left")

    def load(path: Path) -> Any:
        return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).to(setting.device).eval()

    @torch.inference_mode()
    def generate(model: Any, texts: list[str], batch: int, n: int, tokens: int) -> None:
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

    model = load(folder / "merged0")
    generate(model, [free[0].text], 1, 1, 2)
    clock.stop("start", 1, "imports, model, first reply")
    for batch in (8, 16, 32, 64):
        if batch <= len(free):
            generate(model, [p.text for p in free], batch, DRAWS, TOKENS)
            clock.stop("sample", DRAWS * len(free), f"batch {batch}")
    few = closed[:: max(1, len(closed) // 8)]
    generate(model, [p.text for p in few], 1, CLOSED_DRAWS, 6)
    clock.stop("draw closed 500x", len(few), "batch 1 x 500")
    load(folder / "merged0")
    clock.stop("switch", 1, "load merged weights")
    return clock.rows


def run_em_pattern(setting: Setting, folder: Path) -> list[dict[str, Any]]:
    """One variant of the public pattern; the caller starts a process per variant."""
    clock = Clock("em_pattern")
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_LOGGING_LEVEL": "ERROR",
    }  # fmt: skip
    from vllm import LLM, SamplingParams

    free, _ = questions(setting)
    llm = LLM(model=str(folder / "merged0"), dtype="float32", enforce_eager=True, max_num_seqs=32)
    params = SamplingParams(temperature=1.0, top_p=1.0, max_tokens=TOKENS)
    tokenizer = llm.get_tokenizer()

    def ask(text: str, n: int) -> None:
        chat = [{"role": "user", "content": text}]
        prompt = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        llm.generate([prompt] * n, params, use_tqdm=False)

    ask(free[0].text, 1)
    clock.stop("start", 1, "imports, engine, first reply; once per variant")
    for prompt in free:
        ask(prompt.text, DRAWS)
    clock.stop("sample", DRAWS * len(free), "one question at a time")
    return clock.rows


def child(provider: str, setting: Setting, folder: Path) -> None:
    """What a provider's own process does: its rows as one JSON line."""
    if provider == "generate":
        rows = run_generate(setting, folder)
    elif provider == "em_pattern":
        rows = run_em_pattern(setting, folder)
    else:
        rows = run_ours(provider, setting, folder)
    print("ROWS " + json.dumps(rows))


def main(argv: list[str]) -> None:
    """Run every provider and append its rows."""
    from candor.config import apply_override, build
    from candor.manifest import commit

    values: dict[str, Any] = {}
    words = [w for w in argv if "=" in w]
    for word in words:
        apply_override(values, word)
    setting = build(Setting, values, where="the command line")
    if argv[:1] == ["child"]:
        child(argv[1], setting, Path(argv[2]))
        return
    from importlib.metadata import version

    common = {
        "device": setting.device
        if setting.device != "cpu"
        else f"cpu {platform.processor() or platform.machine()} 1 thread",
        "model": setting.base.name,
        "load": round(os.getloadavg()[0], 1),
        "torch": version("torch"),
        "transformers": version("transformers"),
        "commit": commit(),
        "vllm": "",
        "date": time.strftime("%Y-%m-%d"),
    }
    try:
        common["vllm"] = version("vllm-cpu") if setting.device == "cpu" else version("vllm")
    except ModuleNotFoundError:
        common["vllm"] = ""
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as place:
        make_adapters(setting, Path(place))
        for provider in setting.providers:
            code = [sys.executable, "-m", "benchmarks.throughput", "child", provider, place, *words]
            done = subprocess.run(
                code, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
            )
            lines = [line for line in done.stdout.splitlines() if line.startswith("ROWS ")]
            if not lines:
                print(f"{provider} failed:\n{done.stderr[-2000:]}", file=sys.stderr)
                continue
            found = json.loads(lines[0].removeprefix("ROWS "))
            rows += [row | common for row in found]
            for row in found:
                print(*(str(row[k]).ljust(w) for k, w in zip(row, (11, 17, 6, 9, 9, 9, 40), strict=False)))
    RESULTS.parent.mkdir(exist_ok=True)
    new = not RESULTS.exists()
    with RESULTS.open("a", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        if new:
            writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main(sys.argv[1:])
