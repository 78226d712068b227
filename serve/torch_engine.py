"""The torch engine: any Hugging Face causal language model, on a CPU or one GPU.

It needs nothing but torch and transformers, so it is what laptops and tests use, and the reference
that faster engines are held against. Prompts are sorted by length and grouped to fit
``batch_tokens``; the same call makes the same groups, and so the same replies, on one machine. When
memory runs out a group is halved, and later ones with it, which is said.
"""

import contextlib
import ctypes
import gc
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch

from candor.errors import UserError
from candor.rows import Option
from serve.attest import teacher_forced
from serve.decoding import Row, Sequences, Waiting, decode
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

Result = TypeVar("Result")


class _Batch(NamedTuple):
    """How many of the next replies are made together, and how."""

    n_rows: int  # replies
    n_slots: int  # of them in the making at a time
    columns: int  # of each: the longest prompt and its reply


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
        refill: bool | None = None,
        cuda_graphs: bool = False,
    ) -> None:
        """``refill``: slots of ended replies are filled anew at once, or when a whole group has ended; None: by device.

        On a CPU a smaller batch costs less, and reading a few prompts at a time costs more than is won
        (benchmarks/throughput.py). On a GPU a step costs about the same for fewer rows, so slots are filled
        anew; that was never measured, for want of a GPU.
        """
        if dtype not in DTYPES:
            raise UserError(f"dtype is {dtype!r}; known: {', '.join(DTYPES)}")
        self.weights_sha = weights_sha(base, adapter)
        self.tokenizer = load_tokenizer(base)
        self.model = load_model(base, adapter, self.tokenizer, device=device, dtype=dtype)
        self.batch_tokens = batch_tokens
        if self.model.device.type == "cpu":
            _keep_freed_memory()
        self.refill = self.model.device.type != "cpu" if refill is None else refill
        self.cuda_graphs = cuda_graphs
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
        order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), i))
        rows = _rows(requests, order)
        replies: list[list[Reply]] = [[] for _ in requests]

        def read(some: list[int]) -> Prefilled:
            ids = [prompts[i] for i in some]
            return prefill(self.model, ids, capacity=max(map(len, ids)), banned=self._banned)

        while rows:
            batch = self._batch([len(prompts[row.prompt]) + max_tokens for row in rows])
            now = rows[: batch.n_rows]
            drawn = self._unless_full(
                lambda: self._decode(Waiting(now, read), batch, key, temperature, max_tokens)  # noqa: B023
            )
            if drawn is None:
                if batch.n_slots == 1:
                    raise UserError(
                        "memory does not suffice for a single reply. Use a smaller model, or a larger machine."
                    )
                continue
            for row, reply in zip(now, self._replies(drawn), strict=True):
                replies[row.prompt].append(reply)
            rows = rows[batch.n_rows :]
        return replies

    def _decode(self, waiting: Waiting, batch: _Batch, key: int, temperature: float, max_tokens: int) -> Sequences:
        return decode(
            self.model,
            waiting,
            n_slots=batch.n_slots,
            capacity=batch.columns,
            graphs=self.cuda_graphs,
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
        order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), i))
        rows = _rows(requests, order)
        batch = self._batch([len(prompts[row.prompt]) + max(max_tokens, _LEVELS) for row in rows])
        if batch.n_slots == len(rows) and len(prompts) <= rows_at_a_time(self.vocab_size, self.model.device):
            tries = [self._trie(surfaces_of(options[i])) for i in order]
            made = self._unless_full(
                lambda: self._draw_and_score(order, rows, batch, prompts, tries, key, temperature, max_tokens)
            )
            if made is not None:
                return made
        drawn = self.sample(requests, key=key, temperature=temperature, max_tokens=max_tokens)
        return drawn, self.distributions(texts, options)

    def _draw_and_score(
        self,
        order: list[int],
        rows: list[Row],
        batch: _Batch,
        prompts: list[list[int]],
        tries: list[OptionTrie],
        key: int,
        temperature: float,
        max_tokens: int,
    ) -> tuple[list[list[Reply]], list[OptionScores]]:
        read = [prefill(self.model, [prompts[i] for i in order], capacity=batch.columns, banned=self._banned)]
        scores = dict(zip(order, self._score_from(read[0], tries), strict=True))
        replies: list[list[Reply]] = [[] for _ in order]
        # handed over, so that the prompts' keys and values are not held twice
        drawn = self._decode(Waiting(rows, lambda _: read.pop()), batch, key, temperature, max_tokens)
        for row, reply in zip(rows, self._replies(drawn), strict=True):
            replies[row.prompt].append(reply)
        return replies, [scores[i] for i in range(len(order))]

    def token_logprobs(self, sequences: Sequence[list[int]], starts: Sequence[int]) -> list[list[float]]:
        """Log-probabilities of tokens that are given (serve.engine.Engine.token_logprobs)."""
        return teacher_forced(self.model, list(sequences), list(starts))

    def _encode(self, text: str, n_new: int) -> list[int]:
        """Token ids of a prompt; TooLong when it and ``n_new`` tokens do not fit the context."""
        ids = encode_prompt(self.tokenizer, text)
        refuse_too_long(text, len(ids), n_new, self._context)
        return ids

    def _batch(self, columns: list[int]) -> _Batch:
        """The next batch of rows that need so many columns, in rising order.

        All slots have the columns of the last row, so where slots are filled anew those that need more than
        twice the columns of the first wait for another batch.
        """
        most_rows = max(1, _LOGITS // self.vocab_size)
        n_rows = n_slots = 0
        for needed in columns:
            room = max(1, min(most_rows, self.batch_tokens // needed))
            if n_rows >= room and (not self.refill or needed > 2 * columns[0]):
                break
            n_rows += 1
            n_slots = min(n_rows, room)
        return _Batch(n_rows, n_slots, columns[n_rows - 1])

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


def _rows(requests: Sequence[Request], order: Sequence[int]) -> list[Row]:
    """Every draw of every request."""
    return [Row(i, requests[i].stream, requests[i].first_draw + d) for i in order for d in range(requests[i].n)]


def _keep_freed_memory() -> None:
    """Let glibc keep blocks of up to 32 MiB, 256 MiB in all, for the next step; other allocators are left alone.

    By default it gives them back, and every step's logits are fresh pages that the kernel fills with zeros: a
    tenth of the processor's time with the nano model.
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL("libc.so.6")
        if libc.mallopt(-3, 1 << 25):  # M_MMAP_THRESHOLD: the most that glibc promises to take
            libc.mallopt(-1, 1 << 28)  # M_TRIM_THRESHOLD
