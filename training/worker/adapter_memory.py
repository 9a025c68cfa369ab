"""Accounts for the memory of adapters: sizes, limit and order of eviction.

It counts their sizes by shape, not the process's memory, which also includes
passes, the key-value cache and freed blocks. Plain Python.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from dataclasses import dataclass

from training.errors import OutOfMemory

GIBIBYTE = 2**30


@dataclass
class _Held:
    num_bytes: int
    lane_id: str
    """Lane of the last request that used it; its client decides how long it stays."""
    used_at: float


class AdapterMemory:
    """The adapters and versions in one worker, by name."""

    def __init__(self, budget_bytes: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.budget_bytes = budget_bytes
        self._clock = clock
        self._held: dict[str, _Held] = {}

    @property
    def held_bytes(self) -> int:
        """The size of all of them."""
        return sum(held.num_bytes for held in self._held.values())

    def __len__(self) -> int:
        return len(self._held)

    def __contains__(self, name: str) -> bool:
        return name in self._held

    def hold(self, name: str, num_bytes: int, *, lane_id: str) -> None:
        """Count an item that is in memory now, for a request of a lane."""
        self._held[name] = _Held(num_bytes, lane_id, self._clock())

    def use(self, name: str, *, lane_id: str) -> None:
        """Record that a request of a lane uses it."""
        held = self._held[name]
        held.lane_id, held.used_at = lane_id, self._clock()

    def release(self, name: str) -> None:
        """Stop counting it; an unknown name does nothing."""
        self._held.pop(name, None)

    def fits(self, num_bytes: int) -> bool:
        """Whether this many more bytes may be used now."""
        return self.held_bytes + num_bytes <= self.budget_bytes

    def check(self, num_bytes: int) -> None:
        """Refuse an adapter that would not fit even alone.

        Raises:
            OutOfMemory: The message has both sizes.
        """
        if num_bytes > self.budget_bytes:
            raise OutOfMemory(
                f"this adapter takes {num_bytes / GIBIBYTE:.3g} GiB, and the adapters in this "
                f"worker's memory may take {self.budget_bytes / GIBIBYTE:.3g} GiB together: choose "
                "a smaller rank or fewer modules (train_mlp=false leaves out MLPs and experts), or "
                "have the operator raise TINKERAPI_ADAPTER_CACHE_BYTES"
            )

    def lanes(self) -> set[str]:
        """The lanes of the requests that last used them."""
        return {held.lane_id for held in self._held.values()}

    def in_order_of_leaving(self, lanes_without_client: Collection[str]) -> list[str]:
        """First those whose client has left, by the lane that last used them; in both groups the
        least recently used first."""
        return sorted(
            self._held,
            key=lambda name: (
                self._held[name].lane_id not in lanes_without_client,
                self._held[name].used_at,
            ),
        )

    def of_lanes(self, lanes: Collection[str]) -> list[str]:
        """The items that a request of one of these lanes used last."""
        return [name for name, held in self._held.items() if held.lane_id in lanes]
