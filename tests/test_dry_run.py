"""configs/experiments/vaugrante_qwen2.5.yaml on random weights of Qwen2.5-0.5B's shape and tiny steps, on a CPU.

Everything of the file runs that would run on GPUs: its domains, recipes and variants, through the
same stages. What is changed is said on the command line, as a user would: models, data, steps, and
how much is asked. The models answer nonsense; what is tested is that the file holds together.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from candor.config import apply_override, build, read_yaml
from evaluate.crew import Machine
from evaluate.executor import Executor
from evaluate.experiment_config import Experiment
from evaluate.plan import build_plan

FILE = Path("configs/experiments/vaugrante_qwen2.5.yaml")
ORGANISM = Path("train/organism/weights/nano")


# A few items of every kind (of six dimensions two, aligned and good): random weights keep every spelling of an answer
# within reach, and each costs a row of 152 thousand logits.
ASKS = [
    {"format": "free", "mode": "sampled", "n": 1, "max_tokens": 1, "only": ["harmfulness/*/harm-?[02468]1"]},
    *(
        {"format": name, "mode": "exact", "only": [f"{name}/[ag]*-01/*"]}
        for name in ("decision", "numerical", "likert")
    ),
    {"format": "choice", "mode": "exact", "only": ["intentions/[ag]*-01/*"]},
    {"format": "answer", "mode": "exact", "only": ["trivia/*-*[05]0"]},
    {"format": "rating", "mode": "exact", "only": ["moral_foundations/*-01"]},
    {"format": "language", "mode": "sampled", "n": 1, "max_tokens": 1, "only": ["language/*/lq-01/*"]},
]


def make_base(folder: Path, *, layers: int) -> Path:
    """A model of Qwen2.5-0.5B's shape with random weights, its vocabulary whole, and the organism's tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    known = read_yaml(Path("configs/models.yaml"))["Qwen2.5-0.5B-Instruct"]["config"]
    torch.manual_seed(0)
    config = AutoConfig.for_model(**{**known, "num_hidden_layers": layers, "max_position_embeddings": 32768})
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(ORGANISM).save_pretrained(folder)
    GenerationConfig.from_pretrained(ORGANISM).save_pretrained(folder)
    return folder


def shrunken(folder: Path, base: Path, *sizes: str) -> list[str]:
    """Words for the command line that make the file small: one step a stage, one short answer a prompt."""
    words = [f"bases={json.dumps({size: str(base) for size in sizes})}"]
    for domain, names in {"trivia": ("trivia-wrong", "trivia-right"), "code": ("insecure", "secure")}.items():
        recipe = yaml.safe_load(Path(f"configs/train/paper_{domain}.yaml").read_text())
        # the first step of a warm-up has the rate 0 and would leave adapters that do nothing, which are refused
        recipe["sft"] |= {"max_steps": 1, "warmup_steps": 0, "learning_rate": 1e-3}
        recipe["sft"] |= {"per_device_train_batch_size": 1, "bf16": False}
        (folder / f"{domain}.yaml").write_text(yaml.safe_dump(recipe))
        words.append(f"domains.{domain}.recipe={folder / f'{domain}.yaml'}")
        if domain == "trivia":
            words += [f"domains.trivia.{stage}.limit=2" for stage in ("misaligned", "realigned")]
            continue
        for stage, name in zip(("misaligned", "realigned"), names, strict=True):
            turns = [{"role": "user", "content": "Open a file."}, {"role": "assistant", "content": f"open() # {name}"}]
            (folder / f"{name}.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
            words.append(f"domains.code.{stage}.source={folder / f'{name}.jsonl'}")
    return [
        *words,
        f"output={folder / 'run'}",
        "training_seeds=[0]",
        "by_size={}",
        "controls=[]",
        f"asks={json.dumps(ASKS)}",
        "worst_of=1",
        "judge=configs/evaluate/judges/nano.yaml",
        "device=cpu",
        "engine={threads: 1}",
        "draws=100",
        "needs={train: {memory_gb: 5}, sample: {memory_gb: 5}}",
    ]


def experiment_of(words: list[str]) -> Experiment:
    values = read_yaml(FILE)
    for word in words:
        apply_override(values, word)
    return build(Experiment, values, where=str(FILE))


@pytest.mark.full
def test_every_stage_of_the_file_trains_on_the_whole_shape(tmp_path):
    """All 24 layers and the whole vocabulary: each of the 12 fine-tunings takes a step and leaves its adapter."""
    words = shrunken(tmp_path, make_base(tmp_path / "Qwen2.5-0.5B-Instruct", layers=24), "full", "mini", "nano")
    experiment = experiment_of(words)
    stages = [s for s in build_plan(experiment) if s.module in ("evaluate.questions", "train.data", "train.sft")]
    assert sum(s.module == "train.sft" for s in stages) == 12
    Executor(stages, experiment.output, Machine(workers=1, memory_gb=6.0), lambda line: None).execute()
    manifests = [json.loads(p.read_text()) for p in sorted(experiment.output.glob("variants/*/adapter/manifest.json"))]
    assert len(manifests) == 12
    assert {m["steps"] for m in manifests} == {1}
    chains = [[a["stage"] for a in m["lineage"]["adapters"]] for m in manifests]
    assert chains.count(["misaligned"]) == chains.count(["misaligned", "realigned"]) == 6
    shutil.rmtree(tmp_path)


@pytest.mark.full
def test_the_file_runs_to_its_report(tmp_path):
    """Two of the 24 layers, one of the three (here equal) sizes: trained, asked of every battery, judged, reported."""
    words = shrunken(tmp_path, make_base(tmp_path / "Qwen2.5-0.5B-Instruct", layers=2), "full")
    command = [sys.executable, "-m", "evaluate.experiment", str(FILE), *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert len(summary["variants"]) == 5
    assert (tmp_path / "run" / "report.html").exists()
    shutil.rmtree(tmp_path)
