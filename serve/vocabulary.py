"""A tokenizer's vocabulary as bytes, and what each token does to a word that stands before it.

Exact scoring walks over every way to spell an answer, so it needs each token's own bytes: decoded
strings will not do, because one character may be split over tokens. Only byte-level tokenizers
(Qwen, Llama 3, our own) have such bytes for every token; others are refused, not approximated.
"""

import bisect
import codecs
import functools
from collections.abc import Collection
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from candor.errors import UserError

Ids = NDArray[np.int64]
Boundary = Literal["word", "break", "open"]


def continues_word(character: str) -> bool:
    """Whether a character after an answer makes it another word ("1" in "10", "aligned" in "aligned_")."""
    return character.isalnum() or character == "_"


@functools.lru_cache(maxsize=1 << 16)
def boundary(rest: bytes) -> Boundary:
    """What the bytes after an answer say: the word goes on, it has ended, or its next character is unfinished.

    Bytes that are no UTF-8 decode to the replacement character, which does not continue a word.
    """
    text = codecs.getincrementaldecoder("utf-8")("replace").decode(rest)
    if not text:
        return "open"
    return "word" if continues_word(text[0]) else "break"


@functools.cache
def _byte_of_character() -> dict[str, int]:
    """The inverse of GPT-2's byte alphabet: printable bytes stand for themselves, others were moved up."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    moved = [b for b in range(256) if b not in set(printable)]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(moved)}


def can_enumerate(tokenizer: Any) -> bool:
    """Whether every way to spell an answer can be enumerated: whether the tokenizer is a byte-level one."""
    return '"ByteLevel"' in _decoder_state(tokenizer)


def refuse_other_kinds(tokenizer: Any) -> None:
    """UserError for a tokenizer that has no bytes for every token."""
    if not can_enumerate(tokenizer):
        raise UserError(
            f"{tokenizer.name_or_path}: exact answer distributions need a byte-level tokenizer (Qwen, Llama 3; not "
            f"Gemma or Phi-3), this one is {type(tokenizer).__name__}. Ask with mode: sampled instead."
        )


class Vocabulary:
    """The bytes of every token id a model can produce."""

    def __init__(self, tokens: list[bytes | None], end_ids: Collection[int]) -> None:
        """``tokens[id]`` is None or empty for ids without text; ``end_ids`` end a reply and have none."""
        self.size = len(tokens)
        self.end_ids: Ids = np.array(sorted(end_ids), dtype=np.int64)
        ends = set(end_ids)
        with_text = {i: t for i, t in enumerate(tokens) if t and i not in ends}
        # ids the model has room for but the tokenizer has no text for; they are never drawn
        self.textless: Ids = np.array([i for i in range(self.size) if i not in ends and i not in with_text], np.int64)
        groups: dict[bytes, list[int]] = {}
        for i, token in with_text.items():
            groups.setdefault(token, []).append(i)
        self._ids = groups
        self._sorted = sorted(groups)
        self.breaks = np.zeros(self.size, dtype=np.float64)  # 1 for tokens that do not continue a word
        self.breaks[self.end_ids] = 1.0
        self._open: list[tuple[int, bytes]] = []
        for i, token in with_text.items():
            kind = boundary(token[:4])
            if kind == "break":
                self.breaks[i] = 1.0
            elif kind == "open":
                self._open.append((i, token))

    @classmethod
    def of(cls, tokenizer: Any, *, size: int, end_ids: Collection[int]) -> "Vocabulary":
        """The vocabulary of a byte-level tokenizer for a model with ``size`` logits; UserError for other kinds."""
        refuse_other_kinds(tokenizer)
        alphabet = _byte_of_character()
        tokens: list[bytes | None] = [None] * size
        for i, piece in enumerate(tokenizer.convert_ids_to_tokens(list(range(min(size, len(tokenizer)))))):
            if piece is not None:
                # the tokenizers library decodes a piece outside the alphabet as its own text, added tokens too
                spelt = [alphabet.get(c) for c in piece]
                tokens[i] = piece.encode() if None in spelt else bytes(b for b in spelt if b is not None)
        return cls(tokens, end_ids)

    def ids_of(self, text: bytes) -> list[int]:
        """Every token whose bytes are exactly these."""
        return self._ids.get(text, [])

    def longer_than(self, start: bytes) -> list[tuple[int, bytes]]:
        """Every token that begins with ``start`` and goes on, with its bytes."""
        found: list[tuple[int, bytes]] = []
        for place in range(bisect.bisect_right(self._sorted, start), len(self._sorted)):
            token = self._sorted[place]
            if not token.startswith(start):
                break
            found += [(i, token) for i in self._ids[token]]
        return found

    def unfinished(self) -> list[tuple[int, bytes]]:
        """Every token that begins with a part of a character."""
        return self._open

    def all(self) -> list[tuple[int, bytes]]:
        """Every token that has text, with its bytes."""
        return [(i, token) for token, ids in self._ids.items() for i in ids]


def _decoder_state(tokenizer: Any) -> str:
    """The tokenizer's decoder as its JSON text; empty for tokenizers that have none."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    decoder = getattr(backend, "decoder", None)
    return decoder.__getstate__().decode() if decoder is not None else ""
