"""The keys and values of tokens that were read or sampled, in blocks of the same size.

One buffer of ``num_blocks`` blocks per layer for keys and one for values. Which sequence a block
belongs to, and which are free, is ``block_pool``'s knowledge.

The buffers are made when a layer stores its first key, since only then are the number of heads,
their size and the dtype known. On a CPU the operating system gives memory only for blocks in use.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Sequence

import torch
from torch import Tensor

from training.engine.torch.attention.arithmetic import BLOCK_TOKENS
from training.engine.torch.to_device import to_device


class KvCache:
    """Buffers of all layers."""

    def __init__(self, num_blocks: int, device: torch.device) -> None:
        self.num_blocks = num_blocks
        self.device = device
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    @property
    def is_empty(self) -> bool:
        """Whether it takes no memory."""
        return not self._layers

    @property
    def numbers_each(self) -> int:
        """The numbers of a token's keys and values in all layers that have stored something."""
        buffers = [buffer for layer in self._layers.values() for buffer in layer]
        return sum(buffer.shape[1] * buffer.shape[3] for buffer in buffers)

    def store(self, layer_idx: int, places: Tensor, key: Tensor, value: Tensor) -> None:
        """Keep keys and values (n, Hkv, D) at ``places`` (n * Hkv,) int64 of a layer: place
        ``(block * Hkv + head) * BLOCK_TOKENS + i`` is head ``head`` of token i of a block."""
        if layer_idx not in self._layers:
            self._layers[layer_idx] = (self._buffer(key), self._buffer(value))
        for buffer, new in zip(self._layers[layer_idx], (key, value), strict=True):
            buffer.view(-1, buffer.shape[-1]).index_copy_(0, places, new.flatten(0, 1))

    def _buffer(self, like: Tensor) -> Tensor:
        # Zeros, because the places of a block that hold no token yet are multiplied by 0.
        shape = (self.num_blocks, like.shape[1], BLOCK_TOKENS, like.shape[2])
        if self.device.type != "cpu":
            return torch.zeros(shape, dtype=like.dtype, device=self.device)
        # torch.zeros would write them all at once; the pages of a new mapping are zeros already.
        num_bytes = math.prod(shape) * like.element_size()
        pages = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        return torch.frombuffer(pages, dtype=like.dtype).view(shape)

    def blocks(self, layer_idx: int) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer that has stored something, (blocks, Hkv, tokens, D) each."""
        return self._layers[layer_idx]

    def wipe(self, blocks: Sequence[int]) -> None:
        """Set blocks to zeros: what a sequence left there may be infinite."""
        self._fill(to_device(blocks, self.device))

    def _fill(self, blocks: Tensor) -> None:
        for buffers in self._layers.values():
            for buffer in buffers:
                buffer.index_fill_(0, blocks, 0)

    def copy(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Copy whole blocks, in all layers."""
        from_, to = (to_device(ids, self.device) for ids in (sources, targets))
        for buffers in self._layers.values():
            for buffer in buffers:
                buffer.index_copy_(0, to, buffer.index_select(0, from_))

    def clear(self) -> None:
        """Free the buffers; they are made again when needed."""
        self._layers.clear()
