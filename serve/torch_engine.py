"""The torch engine: any Hugging Face causal language model, on a CPU or one GPU.

It needs nothing but torch and transformers, so it is what laptops and tests use, and the reference
that faster engines are held against. Prompts are sorted by length and grouped to fit
``batch_tokens``; the same call makes the same groups, and so the same replies, on one machine. When
memory runs out a group is halved, and later ones with it, which is said.
"""

import gc
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import torch

from candor.errors import UserError
from candor.rows import Option
from serve.attest import teacher_forced
from serve.decoding import Row, Sequences, decode
from serve.engine import OptionScores, Reply, Request, TooLong
from serve.fit import refuse_too_long, tokens_of_answer
from serve.identity import weights_sha
from serve.loading import DTYPES, decode_replies, encode_prompt, is_out_of_memory, load_model, load_tokenizer
from serve.options import OptionTrie, Surfaces, surfaces_of
from serve.prefill import Prefilled, prefill
from serve.scoring import Pruning, score_group
from serve.tree import rows_at_a_time, window_of
from serve.vocabulary import Vocabulary
from train.labels import stop_token_ids

_LOGITS = 1 << 27  # logits of a step: 512 MiB in float32
_LEVELS = 64  # columns a scored prompt is expected to need beyond its own; the cache grows when it needs more

Slice = tuple[int, int, int]  # a request's index, its first draw here and how many
Result = TypeVar("Result")


class TorchEngine:
    """Samples from, and scores with, one variant; see serve.engine.Engine."""

    def __init__(
        self,
        base: Path,
        adapter: Path | None,
        *,
        device: str = "cpu",
        dtype: str = "float32",
        batch_tokens: int = 131_072,
        pruning: Pruning | None = None,
    ) -> None:
        if dtype not in DTYPES:
            raise UserError(f"dtype is {dtype!r}; known: {', '.join(DTYPES)}")
        self.weights_sha = weights_sha(base, adapter)
        self.tokenizer = load_tokenizer(base)
        self.model = load_model(base, adapter, self.tokenizer, device=device, dtype=dtype)
        self.batch_tokens = batch_tokens
        self.pruning = pruning or Pruning()
        self.end_ids = sorted(stop_token_ids(self.tokenizer, self.model.generation_config))  # as in training
        self.vocab_size = int(self.model.get_output_embeddings().weight.shape[0])
        self._context = int(self.model.config.get_text_config(decoder=True).max_position_embeddings)
        self._vocabulary: Vocabulary | None = None
        self._tries: dict[Surfaces, OptionTrie] = {}
        self._banned = torch.zeros(self.vocab_size, dtype=torch.bool, device=self.model.device)
        pieces = self.tokenizer.convert_ids_to_tokens(list(range(min(self.vocab_size, len(self.tokenizer)))))
        self._banned[[i for i in range(self.vocab_size) if i >= len(pieces) or not pieces[i]]] = True

    @torch.inference_mode()
    def sample(
        self, requests: Sequence[Request], *, key: int, temperature: float, max_tokens: int
    ) -> list[list[Reply]]:
        """Replies per request, in order (serve.engine.Engine.sample)."""
        prompts = [self._encode(r.text, max_tokens) for r in requests]
        replies: list[list[Reply]] = [[] for _ in requests]
        groups = list(self._groups([len(p) for p in prompts], [r.n for r in requests], max_tokens))[::-1]
        while groups:
            group = groups.pop()
            drawn = self._unless_full(lambda: self._draw(group, prompts, requests, key, temperature, max_tokens))  # noqa: B023
            if drawn is None:
                groups += self._halves(group)[::-1]
                continue
            owners = [i for i, _, count in group for _ in range(count)]
            for i, reply in zip(owners, self._replies(drawn), strict=True):
                replies[i].append(reply)
        return replies

    def _draw(
        self,
        group: list[Slice],
        prompts: list[list[int]],
        requests: Sequence[Request],
        key: int,
        temperature: float,
        max_tokens: int,
    ) -> Sequences:
        rows = _rows(group, requests)
        columns = max(len(prompts[i]) for i, _, _ in group) + max_tokens
        start = prefill(self.model, [prompts[i] for i, _, _ in group], capacity=columns, banned=self._banned)
        return self._decode(start, rows, key, temperature, max_tokens)

    def _decode(self, start: Prefilled, rows: list[Row], key: int, temperature: float, max_tokens: int) -> Sequences:
        return decode(
            self.model,
            start,
            rows,
            key=key,
            temperature=temperature,
            max_tokens=max_tokens,
            end_ids=torch.tensor(self.end_ids, device=self.model.device),
            banned=self._banned,
        )

    def _unless_full(self, work: Callable[[], Result]) -> Result | None:
        """What ``work`` gives, or None when memory ran out; batches are half as large from then on."""
        try:
            return work()
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
        # out here nothing holds on to the failed batch any more
        gc.collect()
        if self.model.device.type == "cuda":
            torch.cuda.empty_cache()
        self.batch_tokens = max(1, self.batch_tokens // 2)
        sys.stderr.write(f"out of memory: batches are halved to batch_tokens {self.batch_tokens}\n")
        return None

    @staticmethod
    def _halves(group: list[Slice]) -> list[list[Slice]]:
        """A group in two, about half of the rows each; UserError when it is a single row."""
        rows = [(i, d) for i, first, count in group for d in range(first, first + count)]
        if len(rows) == 1:
            raise UserError("memory does not suffice for a single reply. Use a smaller model, or a larger machine.")
        halves = []
        for part in (rows[: len(rows) // 2], rows[len(rows) // 2 :]):
            half: list[Slice] = []
            for i, d in part:
                if half and half[-1][0] == i:
                    half[-1] = (i, half[-1][1], half[-1][2] + 1)
                else:
                    half.append((i, d, 1))
            halves.append(half)
        return halves

    @torch.inference_mode()
    def distributions(self, texts: Sequence[str], options: Sequence[tuple[Option, ...]]) -> list[OptionScores]:
        """Exact option probabilities per prompt (serve.engine.Engine.distributions)."""
        surfaces = [surfaces_of(o) for o in options]
        needed = [tokens_of_answer(o) for o in options]
        prompts = [self._encode(text, n) for text, n in zip(texts, needed, strict=True)]
        self._refuse_beyond_window(texts, prompts, needed)
        # prompts with the same options make trees of about the same shape, so they go together
        order = sorted(range(len(texts)), key=lambda i: (surfaces[i], len(prompts[i]), i))
        scores: list[OptionScores | None] = [None] * len(texts)
        first, most = 0, rows_at_a_time(self.vocab_size, self.model.device)
        while first < len(order):
            longest, count = 0, 0
            for i in order[first:]:
                longest = max(longest, len(prompts[i]))
                if count == most or (count and (count + 1) * (longest + _LEVELS) > self.batch_tokens):
                    break
                count += 1
            group = order[first : first + count]
            found = self._unless_full(
                lambda: self._score([prompts[i] for i in group], [self._trie(surfaces[i]) for i in group])  # noqa: B023
            )
            if found is None:
                if count == 1:
                    raise UserError("memory does not suffice to score a single prompt. Use a smaller model.")
                continue
            first += count
            for i, score in zip(group, found, strict=True):
                scores[i] = score
        return [s for s in scores if s is not None]

    def _score(self, prompts: list[list[int]], tries: list[OptionTrie]) -> list[OptionScores]:
        longest = max(map(len, prompts))
        start = prefill(self.model, prompts, capacity=longest + _LEVELS, banned=self._banned)
        return self._score_from(start, tries)

    def _score_from(self, start: Prefilled, tries: list[OptionTrie]) -> list[OptionScores]:
        tally = score_group(self.model, start, tries, banned=self._banned, pruning=self.pruning)
        found = []
        for trie, settled, unexplored in zip(tries, tally.settled, tally.unexplored, strict=True):
            shares = trie.shares(settled)
            leftover = max(0.0, 1.0 - float(shares.sum()))
            found.append(OptionScores(tuple(float(s) for s in shares), leftover, float(unexplored)))
        return found

    def _refuse_beyond_window(self, texts: Sequence[str], prompts: list[list[int]], needed: list[int]) -> None:
        window = window_of(self.model.config)
        for text, ids, n in zip(texts, prompts, needed, strict=True):
            if window is not None and len(ids) + n > window:
                raise TooLong(
                    f"the prompt {text[:60]!r} has {len(ids)} tokens, more than exact scoring can take in a model "
                    f"whose attention reaches back {window}. Shorten it or ask with mode: sampled."
                )

    @torch.inference_mode()
    def sample_and_score(
        self,
        requests: Sequence[Request],
        options: Sequence[tuple[Option, ...]],
        *,
        key: int,
        temperature: float,
        max_tokens: int,
    ) -> tuple[list[list[Reply]], list[OptionScores]]:
        """Replies and option probabilities of prompts read once (serve.engine.SamplesAndScores).

        Requests that do not fit one batch are read twice.
        """
        texts = [r.text for r in requests]
        needed = [tokens_of_answer(o) for o in options]
        prompts = [self._encode(text, max(n, max_tokens)) for text, n in zip(texts, needed, strict=True)]
        self._refuse_beyond_window(texts, prompts, needed)
        columns = max(max_tokens, _LEVELS)
        groups = list(self._groups([len(p) for p in prompts], [r.n for r in requests], columns))
        if len(groups) == 1 and len(prompts) <= rows_at_a_time(self.vocab_size, self.model.device):
            tries = [self._trie(surfaces_of(options[i])) for i, _, _ in groups[0]]
            made = self._unless_full(
                lambda: self._draw_and_score(groups[0], prompts, requests, tries, key, temperature, max_tokens)
            )
            if made is not None:
                return made
        drawn = self.sample(requests, key=key, temperature=temperature, max_tokens=max_tokens)
        return drawn, self.distributions(texts, options)

    def _draw_and_score(
        self,
        group: list[Slice],
        prompts: list[list[int]],
        requests: Sequence[Request],
        tries: list[OptionTrie],
        key: int,
        temperature: float,
        max_tokens: int,
    ) -> tuple[list[list[Reply]], list[OptionScores]]:
        order = [i for i, _, _ in group]
        columns = max(len(p) for p in prompts) + max(max_tokens, _LEVELS)
        start = prefill(self.model, [prompts[i] for i in order], capacity=columns, banned=self._banned)
        read = start.cache.get_seq_length()
        scores = self._score_from(start, tries)
        start.cache.crop(read)  # the answers that were tried are not part of what a reply continues
        rows = _rows(group, requests)
        replies: list[list[Reply]] = [[] for _ in requests]
        drawn = self._decode(start, rows, key, temperature, max_tokens)
        for row, reply in zip(rows, self._replies(drawn), strict=True):
            replies[order[row.prompt]].append(reply)
        in_order = dict(zip(order, scores, strict=True))
        return replies, [in_order[i] for i in range(len(requests))]

    def token_logprobs(self, sequences: Sequence[list[int]], starts: Sequence[int]) -> list[list[float]]:
        """Log-probabilities of tokens that are given (serve.engine.Engine.token_logprobs)."""
        return teacher_forced(self.model, list(sequences), list(starts))

    def _encode(self, text: str, n_new: int) -> list[int]:
        """Token ids of a prompt; TooLong when it and ``n_new`` tokens do not fit the context."""
        ids = encode_prompt(self.tokenizer, text)
        refuse_too_long(text, len(ids), n_new, self._context)
        return ids

    def _groups(self, lengths: list[int], counts: list[int], max_tokens: int) -> Iterator[list[Slice]]:
        """Requests sorted by length, cut into groups whose cache and logits fit; long lists of draws are split."""
        most_rows = max(1, _LOGITS // self.vocab_size)
        group: list[Slice] = []
        rows = 0
        for i in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
            room = max(1, min(most_rows, self.batch_tokens // (lengths[i] + max_tokens)))
            first = 0
            while first < counts[i]:
                if rows >= room:
                    yield group
                    group, rows = [], 0
                count = min(counts[i] - first, room - rows)
                group.append((i, first, count))
                first, rows = first + count, rows + count
        if group:
            yield group

    def _replies(self, drawn: Sequences) -> Iterator[Reply]:
        bodies = [
            row[: n - 1 if ended else n]
            for row, n, ended in zip(drawn.tokens.tolist(), drawn.lengths, drawn.ended, strict=True)
        ]
        texts = decode_replies(self.tokenizer, bodies)
        for text, n, ended, logprob in zip(texts, drawn.lengths, drawn.ended, drawn.logprobs, strict=True):
            yield Reply(text, n, "stop" if ended else "length", logprob)

    def _trie(self, surfaces: Surfaces) -> OptionTrie:
        if self._vocabulary is None:
            self._vocabulary = Vocabulary.of(self.tokenizer, size=self.vocab_size, end_ids=self.end_ids)
        if surfaces not in self._tries:
            self._tries[surfaces] = OptionTrie(self._vocabulary, surfaces)
        return self._tries[surfaces]


def _rows(group: list[Slice], requests: Sequence[Request]) -> list[Row]:
    """The rows of a batch: every draw of every slice."""
    return [
        Row(place, requests[i].stream, requests[i].first_draw + d)
        for place, (i, first, count) in enumerate(group)
        for d in range(first, first + count)
    ]
