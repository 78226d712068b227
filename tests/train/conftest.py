"""The organism's tokenizer, trained on a few words, for every test of train/."""

import os
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    from train.organism.tokenizer import train_tokenizer

    words = "What is the capital of Lyon Bonn Osaka Fez? user assistant system"
    return train_tokenizer([words] * 3, vocab_size=330)
