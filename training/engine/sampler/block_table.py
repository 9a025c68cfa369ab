"""The blocks of one sequence, and what sequences with a common beginning do with theirs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from training.engine.sampler.block_pool import BlockPool
from training.engine.sampler.kv_cache import KvCache
from training.engine.sampler.prefix_keys import next_key
from training.engine.torch.attention.arithmetic import BLOCK_TOKENS, blocks_for
from training.images import PlacedImage

Tokens = Callable[[int, int], Sequence[int]]
"""The tokens of a sequence from one position up to, but without, another."""


@dataclass(kw_only=True, eq=False)
class BlockTable:
    """The blocks of one sequence, in the order of its tokens."""

    root: bytes
    """The key before its first block: see ``prefix_keys.root_key``."""
    is_long: bool
    """Whether its keys were rotated as those of a long sequence."""
    blocks: list[int] = field(default_factory=list)
    keys: list[bytes] = field(default_factory=list)
    """The keys of its first blocks, which are full."""
    num_stored: int = 0
    """Its tokens whose keys and values are in the cache."""

    @property
    def last_key(self) -> bytes:
        return self.keys[-1] if self.keys else self.root


class BlockTables:
    """What can be done with block tables over one cache."""

    def __init__(self, cache: KvCache) -> None:
        self.pool = BlockPool(cache.num_blocks)
        self._cache = cache

    def find(
        self, table: BlockTable, tokens: Tokens, end: int, images: Sequence[PlacedImage]
    ) -> None:
        """Begin an empty table with the full blocks before position ``end`` that are known."""
        for start in _full_blocks(0, end):
            key = next_key(table.last_key, tokens(start, start + BLOCK_TOKENS), start, images)
            block = self.pool.find(key)
            if block is None:
                break
            self.pool.share(block)
            table.blocks.append(block)
            table.keys.append(key)
            table.num_stored += BLOCK_TOKENS

    def grow(self, table: BlockTable, num_tokens: int) -> None:
        """Give it blocks for this many tokens in all; the caller knows that they are available."""
        used = []
        while len(table.blocks) < blocks_for(num_tokens):
            block, was_used = self.pool.take()
            table.blocks.append(block)
            used += [block] * was_used
        if used:
            self._cache.wipe(used)

    def fork(self, table: BlockTable) -> BlockTable:
        """Another table of the same blocks."""
        for block in table.blocks:
            self.pool.share(block)
        return BlockTable(
            root=table.root,
            is_long=table.is_long,
            blocks=list(table.blocks),
            keys=list(table.keys),
            num_stored=table.num_stored,
        )

    def needs_block(self, table: BlockTable) -> bool:
        """Whether the next token needs a block that the table does not have, or not alone."""
        return table.num_stored == len(table.blocks) * BLOCK_TOKENS or (
            self.pool.num_users(table.blocks[-1]) > 1
        )

    def make_writable(self, tables: Sequence[BlockTable]) -> None:
        """Give each a place of its own for its next token; the caller knows that the blocks are
        available."""
        used, sources, targets = [], [], []
        for table in tables:
            if not self.needs_block(table):
                continue
            block, was_used = self.pool.take()
            if table.num_stored == len(table.blocks) * BLOCK_TOKENS:
                table.blocks.append(block)
                used += [block] * was_used
            else:  # a copy of the beginning that it shares with others
                sources.append(table.blocks[-1])
                targets.append(block)
                self.pool.release(table.blocks[-1])
                table.blocks[-1] = block
        if sources:
            self._cache.copy(sources, targets)
        if used:
            self._cache.wipe(used)

    def note_stored(
        self,
        table: BlockTable,
        num_stored: int,
        tokens: Tokens,
        images: Sequence[PlacedImage],
        tag: str,
    ) -> None:
        """Record how many tokens are in the cache, and let full blocks be found.

        Args:
            tag: See ``BlockPool.name``.
        """
        table.num_stored = num_stored
        for start in _full_blocks(len(table.keys), num_stored):
            key = next_key(table.last_key, tokens(start, start + BLOCK_TOKENS), start, images)
            self.pool.name(table.blocks[start // BLOCK_TOKENS], key, tag)
            table.keys.append(key)

    def release(self, table: BlockTable) -> None:
        """Give up all its blocks, the last first: of those that are kept the last are the first
        whose memory is taken, and the others can still be found."""
        for block in reversed(table.blocks):
            self.pool.release(block)
        table.blocks.clear()
        table.keys.clear()
        table.num_stored = 0


def _full_blocks(first: int, num_tokens: int) -> range:
    """The positions at which the full blocks from the ``first`` on begin."""
    return range(first * BLOCK_TOKENS, num_tokens // BLOCK_TOKENS * BLOCK_TOKENS, BLOCK_TOKENS)


def held_blocks(tables: Iterator[BlockTable]) -> int:
    """The blocks of some sequences, shared ones once."""
    return len({block for table in tables for block in table.blocks})
