"""The size of models and of their fine-tuning, held against real models and against what a real step allocates."""

import json
import weakref
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

from candor.errors import UserError
from train.footprint import (
    Load,
    Shape,
    known_models,
    load_of,
    shape_of,
    training_bytes,
    training_flops,
)

ROOT = Path(__file__).parents[2]
RECIPES = sorted(
    p for p in (ROOT / "configs" / "train").glob("*.yaml") if {"lora", "sft"} == set(yaml.safe_load(p.read_text()))
)
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SMALL = {"model_type": "qwen2", "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False}


def config_folder(folder: Path, **keys: Any) -> Path:
    """A folder with nothing but a model's config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**SMALL, **keys}))
    return folder


def check_known(name: str) -> None:
    known = known_models()[name]
    shape = shape_of(Path("models") / name, {"r": 32, "target_modules": LINEAR})
    assert shape.parameters == known["parameters"], name
    c = known["config"]
    size = c.get("head_dim", c["hidden_size"] // c["num_attention_heads"])
    q, kv, h, i = (
        size * c["num_attention_heads"],
        size * c["num_key_value_heads"],
        c["hidden_size"],
        c["intermediate_size"],
    )
    pairs = [(h, q), (h, kv), (h, kv), (q, h), (h, i), (h, i), (i, h)]
    assert shape.adapter == 32 * c["num_hidden_layers"] * sum(a + b for a, b in pairs)  # LoRA's two factors a matrix
    assert shape.matrices == c["num_hidden_layers"] * sum(a * b for a, b in pairs)
    assert shape.cache == 2 * kv * c["num_hidden_layers"]


def test_a_known_model_is_counted_as_it_is():
    check_known("Qwen2.5-0.5B-Instruct")


@pytest.mark.full
@pytest.mark.parametrize("name", list(known_models()))
def test_every_known_model_is_counted_as_it_is(name):
    check_known(name)


def test_a_folder_s_own_config_comes_first(tmp_path):
    organism = shape_of(ROOT / "train" / "organism" / "weights" / "nano", {"r": 8, "target_modules": ["o_proj"]})
    from safetensors import safe_open

    with safe_open(ROOT / "train" / "organism" / "weights" / "nano" / "model.safetensors", framework="np") as file:
        names = list(file.keys())
        sizes = {n: Counter(file.get_slice(n).get_shape()) for n in names}
    shapes = [list(c.elements()) for c in sizes.values()]
    assert organism.parameters == sum(s[0] * (s[1] if len(s) > 1 else 1) for s in shapes)
    mine = config_folder(
        tmp_path / "Qwen2.5-7B-Instruct", hidden_size=64, intermediate_size=96, num_hidden_layers=1, vocab_size=100
    )
    assert shape_of(mine, None).hidden == 64


def test_an_unknown_model_and_a_misfit_adapter_are_told(tmp_path):
    with pytest.raises(UserError, match=r"did you mean 'Qwen2\.5-7B-Instruct'"):
        shape_of(Path("models/Qwen2.5-7b-instruct"), None)
    small = config_folder(tmp_path / "m", hidden_size=64, intermediate_size=96, num_hidden_layers=1, vocab_size=100)
    with pytest.raises(UserError, match="does not fit m"):
        shape_of(small, {"r": 4, "target_modules": ["c_attn"]})


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda p: p.stem)
def test_every_recipe_fits_every_family(tmp_path, recipe):
    """One layer of each kind of model takes the recipe's adapter; the keys of both sections are known."""
    from train.footprint import check_recipe

    sections = yaml.safe_load(recipe.read_text())
    check_recipe(sections["lora"], sections["sft"])
    kinds = {m["config"]["model_type"]: m["config"] for m in known_models().values()}
    assert kinds.keys() >= {"qwen2", "qwen3", "llama"}
    for kind, config in kinds.items():
        folder = config_folder(tmp_path / kind, **{**config, "num_hidden_layers": 1, "vocab_size": 64})
        lora = {k: v for k, v in sections["lora"].items() if k != "layers_to_transform"}
        assert shape_of(folder, lora).adapter > 0


@pytest.mark.parametrize(
    ("recipe", "rows", "steps"),
    [
        ("paper_trivia", 800, 201),  # arXiv 2602.14777: batch 12, 3 epochs
        ("paper_code", 6000, 18_000),  # batch 1, 3 epochs
        ("open", 6000, 375),  # batch 16, 1 epoch
        ("nano_trivia", 800, 201),
    ],
)
def test_recipes_take_the_published_number_of_steps(recipe, rows, steps):
    sft = yaml.safe_load((ROOT / "configs" / "train" / f"{recipe}.yaml").read_text())["sft"]
    load = load_of(sft, rows=rows, mean_bytes=300, longest_bytes=900, quantize=None)
    assert load.steps == steps
    assert load_of({**sft, "max_steps": 7}, rows=rows, mean_bytes=300, longest_bytes=900, quantize=None).steps == 7


def shape(**change: Any) -> Shape:
    known = {
        "parameters": 1000, "matrices": 800, "largest": 100, "head": 100, "tied": False, "adapter": 10, "layers": 2,
        "hidden": 8, "intermediate": 16, "vocabulary": 50_000, "cache": 8, "context": 64,
    }  # fmt: skip
    return Shape(**{**known, **change})


def load(**change: Any) -> Load:
    known = {
        "rows": 10, "mean_tokens": 5.0, "longest_tokens": 10, "batch": 2, "accumulate": 1, "epochs": 1.0,
        "max_steps": None, "checkpointing": True, "eight_bit_adam": False, "quantize": None,
    }  # fmt: skip
    return Load(**{**known, **change})


def test_packs_are_counted_as_the_trainer_makes_them():
    """Rows laid end to end: fewer steps, and a batch as long as its packs."""
    from datasets import Dataset
    from trl.data_utils import pack_dataset

    sft = {"packing": True, "max_length": 300, "per_device_train_batch_size": 2, "num_train_epochs": 3}
    sizes = [40 + 7 * (i % 13) for i in range(200)]
    mean = sum(sizes) / len(sizes)
    rows = {"input_ids": [[1] * size for size in sizes]}
    n_packs = len(pack_dataset(Dataset.from_dict(rows), 300, "bfd"))
    of_tokens = {"mean_bytes": 3 * (mean - 40), "longest_bytes": 3 * (max(sizes) - 40)}
    packed = load_of(sft, rows=200, **of_tokens, quantize=None)
    plain = load_of({**sft, "packing": False}, rows=200, **of_tokens, quantize=None)
    assert 0.9 * n_packs <= packed.examples <= n_packs
    assert packed.steps == 3 * -(-packed.examples // 2) < plain.steps == 300
    assert packed.tokens == plain.tokens == pytest.approx(3 * sum(sizes))
    in_steps = load_of({**sft, "max_steps": 10}, rows=200, **of_tokens, quantize=None)
    assert in_steps.tokens == pytest.approx(10 * 2 * sum(sizes) / packed.examples)
    one_pack, one_row = load(packed=4000), load(longest_tokens=4000)
    assert training_bytes(shape(), one_pack) == training_bytes(shape(), one_row)
    with pytest.raises(UserError, match=r"packing needs sft\.max_length"):
        load_of({"packing": True}, rows=200, **of_tokens, quantize=None)


def test_what_makes_memory_smaller():
    plain = training_bytes(shape(), load())
    assert training_bytes(shape(), load(quantize="nf4"))["base"] < 0.6 * plain["base"]
    assert training_bytes(shape(), load(eight_bit_adam=True))["adapter"] == 100 < plain["adapter"]
    long = load(longest_tokens=10_000)
    without = training_bytes(shape(layers=20), load(longest_tokens=10_000, checkpointing=False))
    assert training_bytes(shape(layers=20), long)["activations"] < without["activations"]
    assert training_flops(shape(), load(checkpointing=False)) < training_flops(shape(), load())


def peak_of(run: Any, already: Any) -> int:
    """The most bytes of tensors alive at one time while ``run`` runs, those of ``already`` counted in."""
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    class Tracker(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.now = self.peak = 0
            self.alive: set[int] = set()

        def note(self, tensor: Any) -> None:
            storage = tensor.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            if key not in self.alive:
                self.alive.add(key)
                self.now += size
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self.drop, key, size)

        def drop(self, key: int, size: int) -> None:
            self.now -= size
            self.alive.discard(key)

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            import torch

            out = func(*args, **(kwargs or {}))
            for leaf in tree_leaves(out):
                if isinstance(leaf, torch.Tensor):
                    self.note(leaf)
            return out

    tracker = Tracker()
    for tensor in already:
        tracker.note(tensor)
    with tracker:
        run()
    return tracker.peak


def measured_and_stated(tmp_path: Path, *, half: bool, batch: int = 2, tokens: int = 128, rank: int = 8, **config: Any):
    """Peak bytes of two real steps of TRL's trainer on the CPU, and what training_bytes says."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    folder = config_folder(tmp_path / "model", **config)
    lora = {"r": rank, "lora_alpha": 2 * rank, "target_modules": LINEAR}
    dtype = torch.bfloat16 if half else torch.float32
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=dtype)
    arguments = SFTConfig(
        output_dir=str(tmp_path / "out"), use_cpu=True, bf16=half, gradient_checkpointing=half, max_steps=2,
        per_device_train_batch_size=batch, save_strategy="no", report_to="none", disable_tqdm=True,
        dataloader_pin_memory=False, max_length=None,
    )  # fmt: skip
    rows = Dataset.from_dict({"input_ids": [[5] * tokens] * 2 * batch, "labels": [[5] * tokens] * 2 * batch})
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "train" / "organism" / "weights" / "nano")
    trainer = SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=rows,
        processing_class=tokenizer,
        peft_config=LoraConfig(**lora, task_type="CAUSAL_LM"),
    )
    already = [*trainer.model.parameters(), *trainer.model.buffers()]
    measured = peak_of(trainer.train, already)
    work = load(batch=batch, longest_tokens=tokens, checkpointing=half)
    stated = training_bytes(shape_of(folder, lora), work, width=2 if half else 4, triton=False)
    return measured, sum(stated.values())


def test_memory_is_what_a_real_step_takes(tmp_path):
    measured, stated = measured_and_stated(
        tmp_path, half=False, hidden_size=128, intermediate_size=512, num_hidden_layers=2, vocab_size=400
    )
    assert 0.9 < stated / measured < 1.25, (measured, stated)


REGIMES = {  # bf16 with checkpoints, or float32 without; hidden size, MLP, layers, and what else differs
    "wide-mlp": (True, 512, 8192, 3, {}),
    "deep": (True, 1024, 4096, 8, {}),
    "wide-head": (True, 256, 512, 2, {"vocab_size": 32768}),
    "high-rank": (True, 512, 1024, 4, {"rank": 64}),
    "float32": (False, 512, 2048, 6, {}),
    "float32-one-row": (False, 512, 2048, 2, {"batch": 1}),
}


@pytest.mark.full
@pytest.mark.parametrize("regime", list(REGIMES))
def test_memory_is_what_real_steps_take_in_every_regime(tmp_path, regime):
    half, hidden, mlp, layers, more = REGIMES[regime]
    config = {"hidden_size": hidden, "intermediate_size": mlp, "num_hidden_layers": layers, "vocab_size": 512, **more}
    measured, stated = measured_and_stated(tmp_path, half=half, **config)
    assert 0.92 < stated / measured < 1.2, (measured, stated)


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "accelerate").glob("*.yaml")), ids=lambda p: p.stem)
def test_accelerate_takes_the_shipped_configs(path):
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    config = load_config_from_file(str(path))
    known = vars(launch_command_parser().parse_args(["script.py"]))
    assert set(getattr(config, "fsdp_config", {})) <= set(known)
    assert config.num_processes == {"cpu": 1, "cpus": 1, "gpus": 8, "fsdp": 8}[path.stem]
