"""The rule by which replies are parsed, and the vocabulary's bytes."""

import numpy as np
import pytest
from transformers import AutoTokenizer

from candor.errors import UserError
from candor.rows import Option
from serve.options import OptionTrie, parse, surfaces_of
from serve.vocabulary import Vocabulary, boundary

NUMBERS = tuple(Option(str(k), k / 10, (str(k),)) for k in range(11))
WORDS = (Option("aligned", 0, ("aligned", "Aligned")), Option("New", 1, ("New",)), Option("New York", 1, ("New York",)))


@pytest.mark.parametrize(
    ("text", "options", "label"),
    [
        ("1", NUMBERS, "1"),
        ("10", NUMBERS, "10"),
        (" 10.", NUMBERS, "10"),
        ("1 0", NUMBERS, "1"),
        ("1/10", NUMBERS, "1"),
        ("100", NUMBERS, None),
        ("1a", NUMBERS, None),
        ("1_", NUMBERS, None),
        ("1é", NUMBERS, None),
        ("1\ufffd", NUMBERS, "1"),
        ("  1", NUMBERS, None),
        ("\n1", NUMBERS, None),
        ("", NUMBERS, None),
        ("aligned", WORDS, "aligned"),
        (" Aligned, of course", WORDS, "aligned"),
        ("ALIGNED", WORDS, None),
        ("aligned_", WORDS, None),
        ("misaligned", WORDS, None),
        ("New", WORDS, "New"),
        ("New York", WORDS, "New York"),
        ("New Yorker", WORDS, "New"),
        ("Newer", WORDS, None),
    ],
)
def test_parse(text, options, label):
    found = parse(text, options)
    assert (None if found is None else options[found].label) == label


def test_spellings_that_cannot_be_told_apart_are_refused():
    with pytest.raises(UserError, match="share the spelling 'A'"):
        surfaces_of((Option("A", 0, ("A",)), Option("a", 1, ("a", "A"))))
    with pytest.raises(UserError, match="starts with a space"):
        surfaces_of((Option("A", 0, (" A",)),))


@pytest.mark.parametrize(
    ("rest", "kind"),
    [
        (b"a", "word"),
        (b"_", "word"),
        (b".", "break"),
        (b"\n", "break"),
        ("é".encode(), "word"),
        ("é".encode()[:1], "open"),
        ("é".encode()[1:], "break"),  # a stray continuation byte decodes to the replacement character
        ("あ".encode()[:2], "open"),
        ("…".encode(), "break"),
        (b"\xc3A", "break"),
    ],
)
def test_boundary(rest, kind):
    assert boundary(rest) == kind


@pytest.mark.parametrize("folder", ["base", "tiny"])
def test_token_bytes_are_what_the_tokenizer_decodes(folder, request):
    tokenizer = AutoTokenizer.from_pretrained(request.getfixturevalue(folder))
    end = tokenizer.eos_token_id
    vocabulary = Vocabulary.of(tokenizer, size=len(tokenizer) + 2, end_ids=[end])
    assert vocabulary.textless.tolist() == [len(tokenizer), len(tokenizer) + 1]
    text_of = dict(vocabulary.all())
    assert set(text_of) == set(range(len(tokenizer))) - {end}
    rng = np.random.default_rng(0)
    for _ in range(300):
        ids = rng.choice(list(text_of), size=5).tolist()
        assert tokenizer.decode(ids) == b"".join(text_of[i] for i in ids).decode("utf-8", "replace")


def test_added_tokens_too_are_what_the_tokenizer_decodes(base):
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(["é", "<é>", "a é", "<\uff5cend\uff5c>"])
    text_of = dict(Vocabulary.of(tokenizer, size=len(tokenizer), end_ids=[]).all())
    for i in range(len(tokenizer) - 4, len(tokenizer)):
        assert tokenizer.decode([i]) == text_of[i].decode("utf-8", "replace")


def test_other_tokenizers_are_refused():
    class Slow:
        name_or_path = "slow"

    with pytest.raises(UserError, match="byte-level"):
        Vocabulary.of(Slow(), size=3, end_ids=[0])


def test_the_longer_spelling_takes_its_share():
    vocabulary = Vocabulary([b"New", b" York", b".", None], end_ids=[3])
    trie = OptionTrie(vocabulary, surfaces_of(WORDS))
    settled = np.zeros(len(trie.spellings))
    settled[trie.spellings.index(b"New")] = 0.6
    settled[trie.spellings.index(b"New York")] = 0.25
    np.testing.assert_allclose(trie.shares(settled), [0.0, 0.35, 0.25])


def test_a_token_that_finishes_and_breaks_counts_and_one_that_goes_on_does_not():
    vocabulary = Vocabulary([b"A", b"A\n", b"A.", b"AB", b"Ax", b"A_", None], end_ids=[6])
    trie = OptionTrie(vocabulary, surfaces_of((Option("A", 0, ("A",)),)))
    root = trie.node(b"")
    ids = {trie.spellings[i]: ids.tolist() for i, ids in root.settled_by_ids}
    assert ids == {b"A": [1, 2]}
    assert root.child_ids.tolist() == [0]
    ((spelling, mask),) = trie.node(b"A").settled_by_mask
    assert trie.spellings[spelling] == b"A"
    assert mask.tolist() == [0, 0, 0, 0, 0, 0, 1]
