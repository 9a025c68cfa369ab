"""The next tokens of sequences whose keys and values are in the blocks of a cache, and the rows and
blocks that a pass reads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from training.engine.torch.attention.arithmetic import BLOCK_TOKENS, GROUP_BLOCKS, blocks_for
from training.engine.torch.attention.variants import Reach
from training.engine.torch.to_device import to_device


@dataclass(frozen=True, kw_only=True)
class Part:
    """Adjacent rows of a pass: the next tokens of one sequence."""

    first_row: int
    start: int
    """The number of the sequence's tokens that are in the cache already."""
    num_tokens: int
    blocks: Sequence[int]
    """The blocks of the sequence, from its first token to the last of these."""

    @property
    def end(self) -> int:
        return self.start + self.num_tokens


def first_block(position: int, reach: Reach) -> int:
    """The first block of the first group of which the token at ``position`` sees something."""
    return reach.first_key(position) // BLOCK_TOKENS // GROUP_BLOCKS * GROUP_BLOCKS


def num_seen(part: Part, reach: Reach) -> int:
    return blocks_for(part.end) - first_block(part.start, reach)


def seen_blocks(part: Part, reach: Reach) -> Sequence[int]:
    return part.blocks[first_block(part.start, reach) : blocks_for(part.end)]


def num_shared(tables: Sequence[Sequence[int]]) -> int:
    """The blocks that all of some sequences begin with, but never a sequence's last one."""
    if len(tables) == 1:
        return 0
    shortest = min(map(len, tables)) - 1
    if not shortest:
        return 0
    for number, blocks in enumerate(zip(*(table[:shortest] for table in tables), strict=True)):
        if any(block != blocks[0] for block in blocks):
            return number
    return shortest


class Rows:
    """Rows of a pass."""

    def __init__(self, rows: Sequence[int], device: torch.device) -> None:
        self.numbers = to_device(rows, device, torch.int64)
        """(n,)"""
        self._neighbours: slice | None = None
        if rows and list(rows) == list(range(rows[0], rows[0] + len(rows))):
            self._neighbours = slice(rows[0], rows[0] + len(rows))

    def __len__(self) -> int:
        return len(self.numbers)

    def of(self, x: Tensor) -> Tensor:
        """(n, ...) of x (T, ...); not copied if they are neighbours."""
        if self._neighbours is not None:
            return x[self._neighbours]
        return x.index_select(0, self.numbers)

    def write(self, x: Tensor, into: Tensor) -> None:
        """The inverse; x may be of another dtype."""
        if self._neighbours is not None:
            into[self._neighbours] = x
        else:
            into.index_copy_(0, self.numbers, x.to(into.dtype))


class Blocks:
    """Blocks of a cache, one after another."""

    def __init__(self, blocks: Sequence[int], device: torch.device) -> None:
        self._numbers = blocks
        self._are_neighbours = bool(blocks) and list(blocks) == list(
            range(blocks[0], blocks[0] + len(blocks))
        )
        self._ids = to_device(blocks, device, torch.int64)

    def __len__(self) -> int:
        return len(self._numbers)

    def of(self, buffer: Tensor) -> Tensor:
        """(n, Hkv, tokens, D); not copied if they are neighbours in the cache."""
        if self._are_neighbours:
            return buffer[self._numbers[0] : self._numbers[0] + len(self._numbers)]
        return buffer.index_select(0, self._ids)
