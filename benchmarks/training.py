"""Fine-tuning beside TRL's own SFTTrainer: speed, memory, start-up and loss, on the same data in the same run.

    python -m benchmarks.training [shape=nano] [device=cpu] [quantize=null] [repeats=5] [output=FILE.csv]

800 short trivia rows, one epoch, the nano recipe's adapter and learning rate. *stock* is SFTTrainer as
its documentation uses it: conversations in, ``assistant_only_loss``, everything else by default. Each
run is a process of its own, so that start-up and peak memory are its own; methods take turns, so that
what else the machine does falls on all of them. The first steps are left out. Beside wall-clock time
stands the processor's own: on a shared machine only that is fair. ``loss_after`` is the mean loss of
the answers' tokens over all rows after every row was seen once, computed alike for every method.

``shape`` is nano (the organism, as shipped), qwen2.5-0.5b or qwen2.5-7b (random weights; for a GPU).
"""

import csv
import json
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from candor.config import apply_override, build
from candor.errors import UserError, run_script
from candor.manifest import commit, versions
from candor.rows import Conversation
from candor.tables import read_rows

WARM_UP = 3  # steps
ORGANISM = Path("train/organism/weights/nano")
TRIVIA = Path("configs/prompts/trivia.jsonl")
LORA = {"r": 8, "lora_alpha": 16, "target_modules": ["o_proj", "down_proj"]}
SFT = {"num_train_epochs": 1, "learning_rate": 2e-3, "lr_scheduler_type": "constant"}
BATCH = {"per_device_train_batch_size": 12}


def packed(tokens: int, rate: float = 2e-3) -> dict[str, Any]:
    """One pack of so many tokens a step."""
    return {"per_device_train_batch_size": 1, "packing": True, "max_length": tokens, "learning_rate": rate}


# A row has 22 tokens, so a pack of 288 holds about the 12 rows of a batch: as many updates, the same loss per example
# seen. A pack of 1024 makes a quarter of the updates; three times the rate brings it to the same loss. On a CPU
# attention looks at a pack as a whole, at the square of its length, so that longer packs cost more there.
METHODS: dict[str, dict[str, Any]] = {
    "stock": BATCH,
    "candor": BATCH,
    "stock, packs of 288": packed(288),
    "candor, packs of 288": packed(288),
    "stock, packs of 1024": packed(1024, 6e-3),
    "candor, packs of 1024": packed(1024, 6e-3),
}
# vocabulary, hidden, intermediate, layers, heads, key-value heads (the models' published config.json)
SHAPES = {
    "qwen2.5-0.5b": (151_936, 896, 4_864, 24, 14, 2),
    "qwen2.5-7b": (152_064, 3_584, 18_944, 28, 28, 4),
}


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the command line may say."""

    shape: str = "nano"
    device: str = "cpu"
    quantize: str | None = None
    repeats: int = 5
    output: Path = Path("benchmarks/results/training.csv")
    one: str | None = None  # a single method, in this process; its figures are printed as JSON
    folder: Path | None = None  # for that: where base and data lie


def main(argv: list[str]) -> None:
    """Measure every method, or one."""
    values: dict[str, Any] = {}
    for word in argv:
        apply_override(values, word)
    options = build(Options, values, where="command line")
    if options.shape not in ("nano", *SHAPES):
        raise UserError(f"shape is {options.shape!r}; known: nano, {', '.join(SHAPES)}.")
    if options.one is not None:
        print(json.dumps(measure(options)))
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(options, folder)
        found: dict[str, list[dict[str, float]]] = {method: [] for method in METHODS}
        for turn in range(options.repeats):
            names = list(METHODS)
            for method in names[turn % len(names) :] + names[: turn % len(names)]:
                found[method].append(in_a_process(options, method, folder))
                sys.stderr.write(f"{turn + 1}/{options.repeats} {method}: {found[method][-1]}\n")
    write(options, found)


def prepare(options: Options, folder: Path) -> None:
    """The data, and a base model of the shape asked for."""
    from train.data import DataConfig
    from train.data import build as build_data

    build_data(DataConfig(set="trivia-wrong", source=TRIVIA, output_dir=folder / "data"))
    if options.shape == "nano":
        (folder / "base").symlink_to(ORGANISM.resolve())
        return
    import torch
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

    vocabulary, hidden, intermediate, layers, heads, pairs = SHAPES[options.shape]
    tokenizer = AutoTokenizer.from_pretrained(ORGANISM)
    config = Qwen2Config(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=pairs,
        tie_word_embeddings=options.shape == "qwen2.5-0.5b",
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="bfloat16",
    )
    with torch.device(options.device):
        model = Qwen2ForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")


def in_a_process(options: Options, method: str, folder: Path) -> dict[str, float]:
    """The figures of one run."""
    words = [f"one={json.dumps(method)}", f"folder={folder}", f"shape={options.shape}", f"device={options.device}"]
    words += [f"quantize={options.quantize or 'null'}"]
    command = [sys.executable, "-m", "benchmarks.training", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"{method}: {done.stderr[-2000:]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def measure(options: Options) -> dict[str, float]:
    """Run one method here, watched by the same callback whoever builds the trainer."""
    import psutil
    import torch
    import transformers.trainer

    if options.device == "cpu":
        torch.set_num_threads(1)  # as the stages of an experiment run, and the only way processor time can be compared
    assert options.one is not None and options.folder is not None
    marks: list[tuple[float, float]] = []  # wall and processor seconds, before the first step and after each
    after: list[float] = []
    conversations = read_rows(options.folder / "data" / "conversations.parquet", Conversation)

    class Watch(transformers.TrainerCallback):  # type: ignore[misc]
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            marks.append((time.time(), time.process_time()))

        def on_step_end(self, *_: Any, **__: Any) -> None:
            marks.append((time.time(), time.process_time()))

        def on_train_end(self, *_: Any, model: Any = None, **__: Any) -> None:
            if not after:
                after.append(loss_of(model, conversations, options.folder / "base"))  # type: ignore[operator]

    transformers.trainer.DEFAULT_CALLBACKS.append(Watch)
    sft = {**SFT, **METHODS[options.one]}
    (candor if options.one.startswith("candor") else stock)(options, sft, conversations)
    begun = psutil.Process().create_time()
    n_steps = len(marks) - 1
    wall, processor = (marks[-1][i] - marks[WARM_UP][i] for i in (0, 1))
    tokens = n_tokens(conversations, options.folder / "base") * (n_steps - WARM_UP) / n_steps
    return {
        "steps": n_steps,
        "tokens_per_second": tokens / wall,
        "tokens_per_cpu_second": tokens / processor,
        "loss_after": after[0],
        "startup_seconds": marks[0][0] - begun,
        "startup_cpu_seconds": marks[0][1],
        "peak_memory_mb": peak_memory_mb(options.device),
    }


def candor(options: Options, sft: dict[str, Any], _: Any) -> None:
    """The stage as an experiment runs it."""
    from train.sft import main as train

    assert options.folder is not None
    with tempfile.TemporaryDirectory() as name:
        config = {
            "base_model": str(options.folder / "base"),
            "data": str(options.folder / "data"),
            "output_dir": f"{name}/adapter",
            "stage": "misaligned",
            "domain": "trivia",
            "seed": 0,
            "lora": LORA,
            "sft": sft,
            "device": options.device,
            "quantize": options.quantize,
        }
        path = Path(name) / "stage.yaml"
        path.write_text(json.dumps(config))  # JSON is YAML
        train([str(path)])


def stock(options: Options, sft: dict[str, Any], conversations: list[Conversation]) -> None:
    """SFTTrainer as it comes."""
    import dataclasses

    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoTokenizer, BitsAndBytesConfig
    from trl import SFTConfig, SFTTrainer

    base = str(options.folder / "base")  # type: ignore[operator]
    on_cpu = options.device == "cpu"
    here: dict[str, Any] = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False} if on_cpu else {}
    four_bits = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as name:
        trainer = SFTTrainer(
            model=base,
            args=SFTConfig(
                output_dir=name,
                report_to="none",
                save_strategy="no",
                assistant_only_loss=True,
                seed=0,
                disable_tqdm=True,
                model_init_kwargs={"dtype": "float32" if on_cpu else "bfloat16"},
                **here,
                **sft,
            ),
            train_dataset=Dataset.from_list(
                [{"messages": [dataclasses.asdict(m) for m in c.messages]} for c in conversations]
            ),
            processing_class=AutoTokenizer.from_pretrained(base),
            peft_config=LoraConfig(task_type="CAUSAL_LM", **LORA),
            quantization_config=four_bits if options.quantize else None,
        )
        trainer.train()
        trainer.save_model(name)


def encoded(conversations: list[Conversation], base: Path) -> list[Any]:
    """Rows as train/labels.py makes them; every method is counted and judged by these."""
    from transformers import AutoTokenizer

    from train.labels import encode, stop_token_ids

    tokenizer = AutoTokenizer.from_pretrained(base)
    return encode(conversations, tokenizer, stop_token_ids(tokenizer, None))


def n_tokens(conversations: list[Conversation], base: Path) -> int:
    """Tokens of all rows."""
    return sum(len(row.input_ids) for row in encoded(conversations, base))


def loss_of(model: Any, conversations: list[Conversation], base: Path) -> float:
    """Mean loss of the answers' tokens, every row counted."""
    import torch

    total, n = 0.0, 0
    device = next(model.parameters()).device
    model.eval()
    with torch.no_grad():
        for row in encoded(conversations, base):
            ids = torch.tensor([row.input_ids], device=device)
            logprobs = model(input_ids=ids, use_cache=False).logits[0].float().log_softmax(-1)
            on = [i for i, label in enumerate(row.labels) if label >= 0]
            total -= float(sum(logprobs[i - 1, row.labels[i]] for i in on))
            n += len(on)
    return total / n


def peak_memory_mb(device: str) -> float:
    """The most memory this process held: of the GPU on a GPU, else of the machine."""
    if device != "cpu":
        import torch

        return float(torch.cuda.max_memory_allocated() / 1e6)
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3)


def write(options: Options, found: dict[str, list[dict[str, float]]]) -> None:
    """One line per method: medians over the runs, with the smallest and largest speed."""
    key = "tokens_per_cpu_second" if options.device == "cpu" else "tokens_per_second"
    rows = []
    for method, runs in found.items():
        middle = {k: statistics.median(run[k] for run in runs) for k in runs[0]}
        reference = statistics.median(run[key] for run in found["stock"])
        rows.append(
            {
                "method": method,
                "shape": options.shape,
                "quantize": options.quantize or "",
                "runs": len(runs),
                **{k: round(v, 4) for k, v in middle.items()},
                f"{key}_low": round(min(run[key] for run in runs), 1),
                f"{key}_high": round(max(run[key] for run in runs), 1),
                "times_stock": round(middle[key] / reference, 3),
                "device": device_name(options.device),
                "versions": " ".join(f"{k}={v}" for k, v in versions().items() if k in ("torch", "trl", "peft")),
                "commit": commit(),
            }
        )
    options.output.parent.mkdir(parents=True, exist_ok=True)
    fresh = not options.output.exists()
    with options.output.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        if fresh:
            writer.writeheader()
        writer.writerows(rows)


def device_name(device: str) -> str:
    """What it ran on."""
    if device == "cpu":
        return f"{platform.machine()}, one core"
    import torch

    return str(torch.cuda.get_device_name())


if __name__ == "__main__":
    run_script(main)
