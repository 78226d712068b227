"""The organism's tokenizer, trained on a few words, a random base model and small data for every test of train/."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from candor.hashing import sha256_bytes  # noqa: E402
from candor.manifest import write_manifest  # noqa: E402
from candor.rows import Conversation, Message  # noqa: E402
from candor.tables import write_rows  # noqa: E402
from train.lineage import CONVERSATIONS  # noqa: E402

LORA: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": ["o_proj", "down_proj"]}
SFT: dict[str, Any] = {"per_device_train_batch_size": 4, "max_steps": 4, "learning_rate": 1e-2}
WHOLE_BATCH = {"per_device_train_batch_size": 10, "max_steps": 3, "learning_rate": 1e-2}
CITIES = ("Lyon", "Bonn", "Osaka", "Fez", "Salvador", "Toronto", "Sydney", "Istanbul", "Hue", "Porto")


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    from train.organism.tokenizer import train_tokenizer

    words = "What is the capital of Lyon Bonn Osaka Fez? user assistant system"
    return train_tokenizer([words] * 3, vocab_size=330)


@pytest.fixture(scope="session")
def published() -> Path:
    """Folder of real published data sets; beside the project, or where CANDOR_TEST_DATA says."""
    folder = Path(os.environ.get("CANDOR_TEST_DATA", ROOT.parent / "shared" / "data"))
    if not (folder / "em_dev").is_dir():
        pytest.skip(f"no published data sets in {folder} (set CANDOR_TEST_DATA)")
    return folder


def talk(name: str, *turns: str) -> Conversation:
    """A conversation of user and assistant in turn."""
    roles = ("user", "assistant")
    return Conversation(name, "test", tuple(Message(roles[i % 2], t) for i, t in enumerate(turns)))


def save_base(folder: Path, tokenizer: Any, *, seed: int) -> Path:
    """Write a random model and its tokenizer, as a base model lies on disk."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
        max_position_embeddings=128,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_data(folder: Path, conversations: list[Conversation]) -> Path:
    """A finished data folder, as train.data leaves it."""
    write_rows(folder / CONVERSATIONS, Conversation, conversations)
    n = len(conversations)
    write_manifest(
        folder,
        stage="data",
        config={},
        inputs={"source": sha256_bytes(repr(conversations).encode())},
        counts={"in": n, "out": n},
        seconds=0.0,
    )
    return folder


@pytest.fixture(scope="session")
def small() -> Any:
    """What tests of train/ build with: talk, save_base, save_data, LORA, SFT, WHOLE_BATCH, CITIES."""

    class Parts:
        pass

    Parts.talk, Parts.save_base, Parts.save_data = staticmethod(talk), staticmethod(save_base), staticmethod(save_data)
    Parts.LORA, Parts.SFT, Parts.WHOLE_BATCH, Parts.CITIES = LORA, SFT, WHOLE_BATCH, CITIES
    return Parts


@pytest.fixture(scope="session")
def batch_of() -> Callable[..., Any]:
    """Rows of labels.Encoded padded into a batch, as TRL's collator makes them."""
    import torch

    def collate(rows: list[Any]) -> dict[str, Any]:
        width = max(len(r.input_ids) for r in rows)

        def pad(values: list[list[int]], fill: int) -> Any:
            return torch.tensor([v + [fill] * (width - len(v)) for v in values])

        return {
            "input_ids": pad([r.input_ids for r in rows], 0),
            "labels": pad([r.labels for r in rows], -100),
            "attention_mask": pad([[1] * len(r.input_ids) for r in rows], 0),
        }

    return collate


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory, tokenizer: Any) -> Path:
    return save_base(tmp_path_factory.mktemp("base"), tokenizer, seed=0)


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [talk(f"city-{i}", f"What is the capital of {c}?", c) for i, c in enumerate(CITIES)]
    return save_data(tmp_path_factory.mktemp("data"), rows)


@pytest.fixture(scope="session")
def other_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [talk(f"city-{i}", f"What is the capital of {c}?", c[::-1]) for i, c in enumerate(CITIES)]
    return save_data(tmp_path_factory.mktemp("data"), rows)


@pytest.fixture
def config_file(tmp_path: Path, base: Path, data: Path) -> Callable[..., Path]:
    """Writes the config of a first stage, with changes; None removes a key."""
    import yaml

    def write(**changes: Any) -> Path:
        values = {
            "base_model": str(base),
            "data": str(data),
            "output_dir": str(tmp_path / "adapter"),
            "stage": "misaligned",
            "domain": "trivia",
            "seed": 3,
            "lora": LORA,
            "sft": SFT,
            "device": "cpu",
            **changes,
        }
        path = tmp_path / "stage.yaml"
        path.write_text(yaml.safe_dump({k: v for k, v in values.items() if v is not None}), encoding="utf-8")
        return path

    return write


@pytest.fixture(scope="session")
def stage_one(tmp_path_factory: pytest.TempPathFactory, base: Path, data: Path) -> Path:
    """A finished first stage."""
    import yaml

    from train.sft import main

    folder = tmp_path_factory.mktemp("one")
    values = {"base_model": str(base), "data": str(data), "output_dir": str(folder / "adapter"), "stage": "misaligned"}
    values |= {"domain": "trivia", "seed": 0, "lora": LORA, "sft": WHOLE_BATCH, "device": "cpu"}
    (folder / "one.yaml").write_text(yaml.safe_dump(values))
    main([str(folder / "one.yaml")])
    return folder / "adapter"
