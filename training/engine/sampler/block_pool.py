"""Which blocks of the key-value cache are in use, and what the others still hold.

A block is in use by one sequence or by several with the same beginning. A full block can have a
key, which stands for everything its contents depend on (``prefix_keys``). Blocks that nobody uses
keep their contents until the memory is needed: those with a key can be found and used again, the
least recently used go first.
"""

from __future__ import annotations

import heapq
from collections import Counter, OrderedDict


class BlockPool:
    """Blocks 0 to ``num_blocks`` - 1.

    It takes memory only for blocks that were used: there may be millions.
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self._num_taken = 0
        """Blocks with lower numbers were used at some time, the others never."""
        self._users: Counter[int] = Counter()
        self._free: list[int] = []
        """Those that were used and are free again: a heap, since low numbers first keep memory
        dense."""
        self._kept: OrderedDict[int, None] = OrderedDict()
        """Blocks with a key and without a user, the least recently used first."""
        self._keys: dict[int, tuple[bytes, str]] = {}
        """Block to its key and its tag."""
        self._by_key: dict[bytes, int] = {}
        self._by_tag: dict[str, set[int]] = {}

    @property
    def num_available(self) -> int:
        """Blocks that ``take`` can give."""
        return self.num_blocks - self._num_taken + len(self._free) + len(self._kept)

    @property
    def num_kept(self) -> int:
        """Blocks without a user that may be found again."""
        return len(self._kept)

    def num_users(self, block: int) -> int:
        return self._users[block]

    def take(self) -> tuple[int, bool]:
        """A block for one user, and whether it has contents of an earlier one.

        Raises:
            IndexError: None is available.
        """
        if not self._free and self._num_taken < self.num_blocks:
            block, was_used = self._num_taken, False
            self._num_taken += 1
        else:
            if not self._free and self._kept:
                self._forget(next(iter(self._kept)))
            block, was_used = heapq.heappop(self._free), True
        self._users[block] = 1
        return block, was_used

    def find(self, key: bytes) -> int | None:
        """The block of a key."""
        return self._by_key.get(key)

    def share(self, block: int) -> None:
        """Add a user to a block that has a user or a key."""
        if not self._users[block]:
            del self._kept[block]
        self._users[block] += 1

    def release(self, block: int) -> None:
        """Remove a user."""
        self._users[block] -= 1
        if self._users[block]:
            return
        del self._users[block]
        if block in self._keys:
            self._kept[block] = None
        else:
            heapq.heappush(self._free, block)

    def name(self, block: int, key: bytes, tag: str) -> None:
        """Let a full block be found under a key, unless another is already.

        Args:
            tag: For ``drop``.
        """
        if key in self._by_key or block in self._keys:
            return
        self._keys[block] = (key, tag)
        self._by_key[key] = block
        self._by_tag.setdefault(tag, set()).add(block)

    def drop(self, tag: str) -> None:
        """Let no block of a tag be found any more; those in use stay with their users."""
        for block in list(self._by_tag.get(tag, ())):
            self._forget(block)

    def drop_all(self) -> None:
        for tag in list(self._by_tag):
            self.drop(tag)

    def _forget(self, block: int) -> None:
        key, tag = self._keys.pop(block)
        del self._by_key[key]
        self._by_tag[tag].discard(block)
        if not self._by_tag[tag]:
            del self._by_tag[tag]
        if block in self._kept:
            del self._kept[block]
            heapq.heappush(self._free, block)
