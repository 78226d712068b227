r"""When a reply counts as one of a closed question's options: on text, and on paths of tokens.

The rule (``serve.engine.Engine.distributions``): after at most one leading space the reply starts
with one of the option's spellings, and what follows does not continue the word; of several spellings
the longest wins. ``parse`` applies it to a reply. ``OptionTrie`` applies it to every tokenisation of
every reply at once, so that scoring counts what sampling would parse, no more and no less.

A path of tokens is summed up by the bytes it has spelt so far. Per such prefix the trie knows which
next tokens settle a spelling (end of turn, or a token whose text breaks the word, perhaps the very
token that finishes it: "A\n") and which keep one within reach. That does not depend on the model,
so it is worked out once per prefix and used for every prompt with these options.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from candor.errors import UserError
from candor.rows import Option
from serve.vocabulary import Ids, Vocabulary, boundary, continues_word

Surfaces = tuple[tuple[str, ...], ...]  # the spellings of each option
Floats = NDArray[np.float64]


def surfaces_of(options: Sequence[Option]) -> Surfaces:
    """The spellings of each option, checked: none empty or led by a space, none shared by two options."""
    owner: dict[str, str] = {}
    for option in options:
        for surface in option.surfaces:
            if not surface or surface[0].isspace():
                raise UserError(f"option {option.label!r}: the spelling {surface!r} is empty or starts with a space.")
            if owner.setdefault(surface, option.label) != option.label:
                raise UserError(
                    f"options {owner[surface]!r} and {option.label!r} share the spelling {surface!r}; "
                    "an answer could not be told apart. Remove it from one."
                )
    return tuple(tuple(dict.fromkeys(option.surfaces)) for option in options)


def parse(text: str, options: Sequence[Option]) -> int | None:
    """The index of the option a reply gives, or None when it gives none of them."""
    answer = text.removeprefix(" ")
    best, length = None, 0
    for index, option in enumerate(options):
        for surface in option.surfaces:
            if len(surface) <= length or not answer.startswith(surface):
                continue
            if len(answer) == len(surface) or not continues_word(answer[len(surface)]):
                best, length = index, len(surface)
    return best


@dataclass(frozen=True, slots=True, eq=False)
class Node:
    """What the next token can do after some bytes; spellings are numbered as in ``OptionTrie.spellings``."""

    settled_by_mask: tuple[tuple[int, Floats], ...]  # spelling, and per token 1 where it settles it
    settled_by_ids: tuple[tuple[int, Ids], ...]  # spelling, and the few tokens that finish and settle it
    child_ids: Ids  # tokens that keep some spelling within reach
    child_prefixes: tuple[bytes, ...]  # the bytes spelt after each of them
    child_unfinished: NDArray[np.bool_]  # whether those end inside a character after a finished spelling

    @property
    def settled(self) -> list[int]:
        """The spellings that the next token may settle, in the order of serve.walk.values_of."""
        return [spelling for spelling, _ in (*self.settled_by_mask, *self.settled_by_ids)]

    @property
    def n_values(self) -> int:
        """How many numbers serve.walk.values_of gives for it."""
        return len(self.settled_by_mask) + len(self.settled_by_ids) + len(self.child_ids)


class OptionTrie:
    """Every way to spell the options of one kind of question in one vocabulary."""

    def __init__(self, vocabulary: Vocabulary, surfaces: Surfaces) -> None:
        self._vocabulary = vocabulary
        self._owner: list[int] = []
        self.spellings: list[bytes] = []  # every surface, and every surface after a space
        for option, texts in enumerate(surfaces):
            for text in texts:
                self.spellings += [text.encode(), b" " + text.encode()]
                self._owner += [option, option]
        self.n_options = len(surfaces)
        self._nodes: dict[bytes, Node] = {}
        self._parts: dict[bytes, tuple[Floats, list[tuple[int, bytes]]]] = {}
        # Spellings that hold a shorter one followed by a break ("A" in "A B"): they win over it.
        self._longer = [
            [j for j, other in enumerate(self.spellings) if other != text and _extends(other, text)]
            for text in self.spellings
        ]

    def node(self, prefix: bytes) -> Node:
        """What can come after these bytes."""
        if prefix not in self._nodes:
            self._nodes[prefix] = self._build(prefix)
        return self._nodes[prefix]

    def shares(self, settled: Floats) -> Floats:
        """Probability per option from the probability [spellings] that each spelling is settled.

        A longer spelling that contains a settled shorter one takes its share away from it.
        """
        longest = settled.copy()
        for i in sorted(range(len(self.spellings)), key=lambda i: -len(self.spellings[i])):
            longest[i] -= sum(longest[j] for j in self._longer[i])
        shares = np.zeros(self.n_options)
        np.add.at(shares, self._owner, longest.clip(min=0.0))
        assert shares.sum() <= 1 + 1e-9, f"option probabilities sum to {shares.sum()}"
        return shares

    def _build(self, prefix: bytes) -> Node:
        masks: list[tuple[int, Floats]] = []
        few: list[tuple[int, Ids]] = []
        children: dict[int, bytes] = {}
        for i, spelling in enumerate(self.spellings):
            if spelling == prefix:
                masks.append((i, self._vocabulary.breaks))
                children.update((t, prefix + token) for t, token in self._vocabulary.unfinished())
            elif spelling.startswith(prefix):
                ids, more = self._finishing(spelling[len(prefix) :])
                if ids:
                    few.append((i, np.array(ids, dtype=np.int64)))
                children.update((t, prefix + token) for t, token in more)
            elif prefix.startswith(spelling) and boundary(prefix[len(spelling) :]) == "open":
                mask, more = self._after_part(prefix[len(spelling) :])
                masks.append((i, mask))
                children.update((t, prefix + token) for t, token in more)
        ids = sorted(children)
        return Node(
            settled_by_mask=tuple(masks),
            settled_by_ids=tuple(few),
            child_ids=np.array(ids, dtype=np.int64),
            child_prefixes=tuple(children[t] for t in ids),
            child_unfinished=np.array([not self._spells(children[t]) for t in ids], dtype=np.bool_),
        )

    def _spells(self, prefix: bytes) -> bool:
        """Whether these bytes are the beginning of a spelling, or all of it."""
        return any(spelling.startswith(prefix) for spelling in self.spellings)

    def _finishing(self, rest: bytes) -> tuple[list[int], list[tuple[int, bytes]]]:
        """For a spelling that still lacks ``rest``: the tokens that finish and settle it, and those that go on."""
        going_on = [(t, rest[:n]) for n in range(1, len(rest) + 1) for t in self._vocabulary.ids_of(rest[:n])]
        settling = []
        for t, token in self._vocabulary.longer_than(rest):
            kind = boundary(token[len(rest) : len(rest) + 4])
            if kind == "break":
                settling.append(t)
            elif kind == "open":
                going_on.append((t, token))
        return settling, going_on

    def _after_part(self, part: bytes) -> tuple[Floats, list[tuple[int, bytes]]]:
        """After a spelling and part of a character: which tokens break the word, and which leave it open."""
        if part not in self._parts:
            mask = np.zeros(self._vocabulary.size)
            mask[self._vocabulary.end_ids] = 1.0
            going_on = []
            for t, token in self._vocabulary.all():
                kind = boundary(part + token[:4])
                if kind == "break":
                    mask[t] = 1.0
                elif kind == "open":
                    going_on.append((t, token))
            self._parts[part] = mask, going_on
        return self._parts[part]


def _extends(longer: bytes, shorter: bytes) -> bool:
    return longer.startswith(shorter) and boundary(longer[len(shorter) :]) == "break"
