"""The rows of a batch in the making: a fixed number of slots, each with columns of its own.

A slot holds one reply: the prompt's keys and values, then one column a step. When the reply has ended
another takes the slot, at whatever step the others are; so every slot has its own first and last column,
and what lies outside is masked. Nothing is moved when a slot changes hands, and shapes do not change, which
is what a CUDA graph asks for. Only when no reply waits any more is the batch made smaller.

On a GPU a step can be recorded as a CUDA graph and replayed (``engine.cuda_graphs``). That has never been run, for
want of a GPU, and is off until ``make gpu-test`` has compared it with the step as it is (tests/serve/test_slots.py).
"""

import sys
import weakref
from collections.abc import Callable
from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicLayer

from serve.loading import is_out_of_memory
from serve.prefill import Prefilled, as_mask

Read = Callable[[torch.Tensor], torch.Tensor]  # tokens [slots] to logits [slots, vocab]


class Slots:
    """Where each slot's reply begins and goes on, and the cache that a model writes it into."""

    def __init__(self, model: Any, n: int, capacity: int, *, graphs: bool = False) -> None:
        self.model, self.capacity = model, capacity
        self.begin = torch.zeros(n, dtype=torch.int64, device=model.device)  # first column of the prompt
        self.end = torch.zeros_like(self.begin)  # column the next token is written to
        self.width = 0  # columns that are looked at
        self._every = 128 if graphs else 1  # the width is a multiple of this: each width is a graph of its own
        self._graphs = _Graphs() if graphs else None
        text = model.config.get_text_config(decoder=True)
        self._kinds = getattr(text, "layer_types", None)
        self._window = getattr(text, "sliding_window", None)
        self._chunk = getattr(text, "attention_chunk_size", None)
        # layers do not hold on to the slots: a cycle would keep a finished batch's memory until Python looks for cycles
        slots = weakref.proxy(self)
        self.cache = Cache(layers=[SlotLayer(slots) for _ in range(text.num_hidden_layers)])

    def __len__(self) -> int:
        return len(self.end)

    def place(self, where: torch.Tensor, start: Prefilled, prompts: torch.Tensor) -> None:
        """Let these slots continue prompts that have been read: ``prompts`` are rows of ``start``."""
        width = start.attend.shape[1]  # what has been read behind the prompts is no part of them
        for layer, read in zip(self.cache.layers, start.cache.layers, strict=True):
            both = (x[:, :, :width].index_select(0, prompts) for x in (read.keys, read.values))
            layer.place(where, *both)
        self.end[where] = width
        self.begin[where] = self.end[where] - start.lengths[prompts]

    def keep(self, going: torch.Tensor) -> torch.Tensor:
        """Keep these slots only, by moving the last of them into the gaps; which slot each one was."""
        n = int(going.sum())
        gaps, last = (~going[:n]).nonzero().flatten(), n + going[n:].nonzero().flatten()
        were = torch.arange(n, device=going.device)
        were[gaps] = last
        self.begin, self.end = self.begin[were], self.end[were]
        for layer in self.cache.layers:
            layer.keep(n, gaps, last)
        if self._graphs is not None:
            self._graphs = _Graphs(record=self._graphs.record)  # those there are are of another size
        return were

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """Read one token per slot [slots] and give the logits [slots, vocab] of what follows it."""
        needed = int(self.end.max()) + 1
        self.width = min(self.capacity, -(-needed // self._every) * self._every)
        return self._read(tokens) if self._graphs is None else self._graphs(self._read, tokens, self.width)

    def _read(self, tokens: torch.Tensor) -> torch.Tensor:
        output = self.model(
            input_ids=tokens[:, None],
            attention_mask=self._masks(),
            position_ids=(self.end - self.begin)[:, None],
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits: torch.Tensor = output.logits[:, -1]
        return logits

    def _masks(self) -> torch.Tensor | dict[str, torch.Tensor]:
        """What the tokens see, for models whose layers differ by kind of layer."""
        columns = torch.arange(self.width, device=self.end.device)
        begin, end = self.begin[:, None], self.end[:, None]
        seen = (columns >= begin) & (columns <= end)

        def mask(kind: str) -> torch.Tensor:
            view = seen
            if kind == "sliding_attention" and self._window:
                view = view & (columns > end - self._window)
            elif kind == "chunked_attention" and self._chunk:
                view = view & ((columns - begin) // self._chunk == (end - begin) // self._chunk)
            return as_mask(view[:, None], self.model.dtype)

        if self._kinds is None:
            return mask("sliding_attention" if self._window else "chunked_attention")
        kinds = sorted(set(self._kinds))
        return {kind: mask(kind) for kind in kinds} if len(kinds) > 1 else mask(kinds[0])


class _Graphs:
    """Steps as CUDA graphs, one per width; where a model's step cannot be recorded it is run as it is."""

    def __init__(self, *, record: bool = True) -> None:
        self.record = record  # False once a step was found that cannot be
        self._recorded: dict[int, torch.cuda.CUDAGraph] = {}
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, read: Read, tokens: torch.Tensor, width: int) -> torch.Tensor:
        """Logits [slots, vocab], valid until the next step."""
        if self.record and not self._recorded:
            self._tokens = tokens.clone()  # what every graph reads
            self._logits = read(self._tokens)  # and writes
        if self.record and width not in self._recorded:
            self._tokens.copy_(tokens)
            self._record(read, width)
        if not self.record:
            return read(tokens)
        self._tokens.copy_(tokens)
        self._recorded[width].replay()
        return self._logits

    def _record(self, read: Read, width: int) -> None:
        """Record a step of this width, or find that no step can be: one that looks at a number on the host."""
        mode = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")  # found out here, because a recording that fails leaves torch recording
        try:
            read(self._tokens)  # compiles what has to be; writes the column that the replay writes again
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            self.record = False
            sys.stderr.write(f"this model's step cannot be a CUDA graph and is run as it is: {error}\n")
            return
        finally:
            torch.cuda.set_sync_debug_mode(mode)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            self._logits.copy_(read(self._tokens))
        self._recorded[width] = graph


class SlotLayer(DynamicLayer):  # type: ignore[misc]  # transformers is untyped here
    """Keys and values of one layer: [slots, heads, capacity, head size]."""

    is_initialized: bool
    keys: Any
    values: Any

    def __init__(self, slots: Slots) -> None:
        super().__init__()
        self._slots = slots
        self._clean = 0  # columns before this one hold numbers: what is masked is multiplied by 0, which NaN survives

    def place(self, where: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Write the columns [some, heads, columns, head size] of prompts to the front of these slots."""
        if not self.is_initialized:
            n, capacity = len(self._slots), self._slots.capacity
            self.keys, self.values = (x.new_empty(n, x.shape[1], capacity, x.shape[3]) for x in (keys, values))
            self.dtype, self.device, self.is_initialized = keys.dtype, keys.device, True
        width = keys.shape[2]
        self._clean_up_to(width)
        self.keys[where, :, :width], self.values[where, :, :width] = keys, values

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write every slot's new column and give all that are looked at."""
        n, heads, capacity, _ = self.keys.shape
        width, end = self._slots.width, self._slots.end
        self._clean_up_to(width)
        at = torch.arange(n * heads, device=self.device).view(n, heads) * capacity + end[:, None]
        for all_, new in ((self.keys, key_states), (self.values, value_states)):
            all_.flatten(0, 2).index_copy_(0, at.flatten(), new.flatten(0, 2))
        return self.keys[:, :, :width], self.values[:, :, :width]

    def keep(self, n: int, gaps: torch.Tensor, last: torch.Tensor) -> None:
        """Keep the first ``n`` slots, once the ``last`` have been moved into the ``gaps``."""
        for all_ in (self.keys, self.values):
            all_[gaps, :, : self._clean] = all_[last, :, : self._clean]
        self.keys, self.values = self.keys[:n], self.values[:n]

    def get_seq_length(self) -> int:
        """Columns before the one that is being written."""
        return self._slots.width - 1

    def _clean_up_to(self, width: int) -> None:
        if width > self._clean:
            self.keys[:, :, self._clean : width] = 0
            self.values[:, :, self._clean : width] = 0
            self._clean = width
