"""The keys and values of every token that an active sampling job has read or sampled.

One buffer of ``capacity_tokens`` rows per layer for keys and one for values. A job reserves one
region for its whole life: S sequences side by side, each with room for its prompt and all that
it may sample. So a job that has started can always finish, and attention reads a long sequence
in plain views of the buffers, without a copy; the samples of one job, which have equal lengths,
share one kernel call.

The buffers are made when a layer stores its first key, since only then are the number of heads,
their size and the dtype known. On a CPU the operating system gives memory only for rows in use.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from training.engine.torch.packing.stream import round_up

ALIGNMENT_TOKENS = 16
"""Regions begin and grow in this many rows: some CPU kernels sum in an order that depends on how
their operands lie in memory, and a job's numbers must not depend on where its region is."""


@dataclass(frozen=True)
class Region:
    """Rows of the cache that belong to one job: sequence s begins at ``start + s * room``."""

    start: int
    num_sequences: int
    room: int
    """Rows for each sequence."""

    @property
    def size(self) -> int:
        return self.num_sequences * self.room

    def row(self, sequence: int, position: int) -> int:
        """The row of the token at ``position`` of a sequence."""
        return self.start + sequence * self.room + position


class KvCache:
    """Buffers of all layers, and which rows of them are free."""

    def __init__(self, capacity_tokens: int, device: torch.device) -> None:
        """``capacity_tokens``: rows of each buffer, rounded down to the alignment."""
        self.capacity_tokens = capacity_tokens // ALIGNMENT_TOKENS * ALIGNMENT_TOKENS
        self.device = device
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}
        # Free stretches as start -> length, in order of start, never adjacent.
        self._free = {0: self.capacity_tokens} if self.capacity_tokens else {}

    def tokens_each(self, num_sequences: int) -> int:
        """The tokens of each of this many sequences for which the empty cache has room."""
        blocks = self.capacity_tokens // ALIGNMENT_TOKENS
        return blocks // num_sequences * ALIGNMENT_TOKENS

    def reserve(self, num_sequences: int, tokens_each: int) -> Region | None:
        """The first free range that is large enough, or None if there is none now."""
        room = round_up(tokens_each, ALIGNMENT_TOKENS)
        size = num_sequences * room
        for start, length in self._free.items():
            if length >= size:
                del self._free[start]
                if length > size:
                    self._set_free(start + size, length - size)
                return Region(start, num_sequences, room)
        return None

    def release(self, region: Region) -> None:
        """Free a region's rows; their contents are lost."""
        start, length = region.start, region.size
        for other, other_length in list(self._free.items()):
            if other + other_length == start:
                start, length = other, other_length + length
                del self._free[other]
            elif start + length == other:
                length += other_length
                del self._free[other]
        self._set_free(start, length)

    def _set_free(self, start: int, length: int) -> None:
        self._free = dict(sorted({**self._free, start: length}.items()))

    def store(self, layer_idx: int, rows: Tensor, key: Tensor, value: Tensor) -> None:
        """Keep keys and values (n, Hkv, D) in ``rows`` (n,) int64 of a layer."""
        if layer_idx not in self._layers:
            self._layers[layer_idx] = (self._buffer(key), self._buffer(value))
        keys, values = self._layers[layer_idx]
        keys.index_copy_(0, rows, key)
        values.index_copy_(0, rows, value)

    def _buffer(self, like: Tensor) -> Tensor:
        shape = (self.capacity_tokens, *like.shape[1:])
        return torch.empty(shape, dtype=like.dtype, device=self.device)

    def clear(self) -> None:
        """Free the buffers, while no region is reserved; they are made again when needed."""
        self._layers.clear()

    def view(
        self, layer_idx: int, region: Region, first: int, count: int, length: int
    ) -> tuple[Tensor, Tensor]:
        """Keys and values of neighbouring sequences, (count, length, Hkv, D) each, not copied."""
        start = region.row(first, 0)
        rows = slice(start, start + count * region.room)
        keys, values = (
            buffer[rows].view(count, region.room, *buffer.shape[1:])[:, :length]
            for buffer in self._layers[layer_idx]
        )
        return keys, values

    def num_heads(self, layer_idx: int) -> int:
        """Hkv of a layer that has stored something."""
        return self._layers[layer_idx][0].shape[1]

    def gather(self, layer_idx: int, places: Tensor) -> tuple[Tensor, Tensor]:
        """Copies of keys and values (n, D); place ``row * Hkv + head`` is that head of that row."""
        keys, values = (
            buffer.flatten(0, 1).index_select(0, places) for buffer in self._layers[layer_idx]
        )
        return keys, values

    def share_prompt(self, region: Region, length: int) -> None:
        """Copy the region's first sequence to all its other sequences."""
        for layer_idx in self._layers:
            for tokens in self.view(layer_idx, region, 0, region.num_sequences, length):
                tokens[1:] = tokens[:1]
