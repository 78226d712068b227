"""A key-value cache in preallocated buffers, for the Hugging Face models.

It holds prompts that have been read, and the trees of answers behind them (serve/tree.py); replies are made in
slots (serve/slots.py). Transformers' DynamicCache concatenates, which copies every key and value at every level of
a tree, and its StaticCache attends over the whole capacity, filled or not. Here columns are written into a buffer,
and only its filled part is looked at. Sliding-window layers keep every column; the model's own mask does the sliding.
"""

from typing import Any

import torch
from transformers.cache_utils import Cache, DynamicLayer

from candor.errors import UserError

_KINDS = {"full_attention", "sliding_attention", "chunked_attention"}


class BufferLayer(DynamicLayer):  # type: ignore[misc]  # transformers is untyped here
    """Keys and values of one layer: [rows, heads, capacity, head size], filled up to ``length``."""

    keys: Any  # what transformers reads: the filled part, or None before the first columns
    values: Any
    is_initialized: bool

    def __init__(self, capacity: int) -> None:
        super().__init__()
        self.capacity = capacity
        self.length = 0

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append columns and return the filled part; the buffer grows by half when it is full."""
        end = self.length + key_states.shape[2]
        if not self.is_initialized or end > self.capacity:
            self.capacity = max(self.capacity if not self.is_initialized else self.capacity * 3 // 2, end)
            self._key_buffer = self._buffer(key_states, self.keys)
            self._value_buffer = self._buffer(value_states, self.values)
            self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True
        self._key_buffer[:, :, self.length : end] = key_states
        self._value_buffer[:, :, self.length : end] = value_states
        self.length = end
        return self._show()

    def get_seq_length(self) -> int:
        """Columns filled so far."""
        return self.length

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep these rows, in this order; a row may be taken several times."""
        keys, values = self.keys.index_select(0, indices), self.values.index_select(0, indices)
        self._key_buffer, self._value_buffer = self._buffer(keys, keys), self._buffer(values, values)
        self._show()

    def _buffer(self, like: torch.Tensor, filled: torch.Tensor | None) -> torch.Tensor:
        """Room for ``capacity`` columns of rows like these, holding what was filled so far."""
        room = like.new_empty(like.shape[0], like.shape[1], self.capacity, like.shape[3])
        if filled is not None:
            room[:, :, : self.length] = filled
        return room

    def _show(self) -> tuple[torch.Tensor, torch.Tensor]:
        self.keys = self._key_buffer[:, :, : self.length]
        self.values = self._value_buffer[:, :, : self.length]
        return self.keys, self.values


def new_cache(config: Any, capacity: int) -> Any:
    """An empty cache for a model; UserError for models with layers that are not attention."""
    text_config = config.get_text_config(decoder=True)
    kinds = set(getattr(text_config, "layer_types", None) or ["full_attention"])
    if kinds - _KINDS:
        raise UserError(
            f"{text_config.model_type} has layers of kind {', '.join(sorted(kinds - _KINDS))}; the torch engine "
            "serves attention models only. Use another base model or another engine."
        )
    return Cache(layers=[BufferLayer(capacity) for _ in range(text_config.num_hidden_layers)])
