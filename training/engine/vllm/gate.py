"""Limits the requests at the server, and lets the groups of jobs take turns."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class FairGate:
    """At most so many inside. A free place goes to the group with the fewest inside and, among
    such groups, to the one that has waited longest; within a group the order is that of
    arrival."""

    def __init__(self, places: int) -> None:
        self._places = places
        self._inside = Counter[str]()
        self._waiting: dict[str, list[asyncio.Future[None]]] = {}

    @asynccontextmanager
    async def place(self, group: str) -> AsyncIterator[None]:
        """Wait for a place, and hold it inside."""
        await self._enter(group)
        try:
            yield
        finally:
            self._leave(group)

    async def _enter(self, group: str) -> None:
        if self._inside.total() < self._places and not self._waiting:
            self._inside[group] += 1
            return
        turn = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(group, []).append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self._leave(group)  # the place came together with the cancellation
            else:
                self._forget(group, turn)
            raise

    def _forget(self, group: str, turn: asyncio.Future[None]) -> None:
        waiting = self._waiting.get(group, [])
        if turn in waiting:
            waiting.remove(turn)
        if not waiting:
            self._waiting.pop(group, None)

    def _leave(self, group: str) -> None:
        self._inside[group] -= 1
        if not self._inside[group]:
            del self._inside[group]
        while self._waiting and self._inside.total() < self._places:
            next_group = min(self._waiting, key=lambda name: self._inside[name])
            turn = self._waiting[next_group].pop(0)
            waiting = self._waiting.pop(next_group)
            if waiting:  # behind the other groups
                self._waiting[next_group] = waiting
            if turn.cancelled():
                continue
            self._inside[next_group] += 1
            turn.set_result(None)
