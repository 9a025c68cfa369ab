"""A file of a bucket, open for reading."""

from __future__ import annotations

from collections.abc import Callable
from threading import Lock
from typing import ClassVar
from weakref import WeakSet

from training.errors import StorageFailed
from training.storage.interface import StoredFile

READ_AHEAD_BYTES = 8 * 2**20
ALL_AHEAD_BYTES = 128 * 2**20
"""Read ahead by all open files of a process: clients may be many, and slow."""


class RemoteFile(StoredFile):
    """Reads ahead where it is read in order, so that small reads are few calls."""

    _lock: ClassVar = Lock()
    _open: ClassVar[WeakSet[RemoteFile]] = WeakSet()

    def __init__(self, name: str, size_bytes: int, read: Callable[[int, int], bytes]) -> None:
        super().__init__(name, size_bytes)
        self._read = read
        self._begin, self._ahead = 0, b""
        self._next: int | None = None
        """Where the last read ended."""
        with self._lock:
            self._open.add(self)

    def read(self, begin: int, length: int) -> bytes:
        end = begin + length
        if not self._begin <= begin <= end <= self._begin + len(self._ahead):
            ahead = min(max(length, self._room(begin)), self.size_bytes - begin)
            self._begin, self._ahead = begin, self._read(begin, ahead) if ahead > 0 else b""
        piece = self._ahead[begin - self._begin : end - self._begin]
        if len(piece) != length:
            raise StorageFailed(f"{self.name} is damaged: it ends at byte {begin + len(piece)}.")
        self._next = end
        if end == self._begin + len(self._ahead):
            self._begin, self._ahead = end, b""
        return piece

    def _room(self, begin: int) -> int:
        """Bytes to read at once: a client may want one byte only, and read it again and again."""
        if begin != self._next:
            return 0
        with self._lock:
            taken = sum(len(file._ahead) for file in self._open)
        return min(READ_AHEAD_BYTES, ALL_AHEAD_BYTES - taken)

    def close(self) -> None:
        self._ahead = b""
        with self._lock:
            self._open.discard(self)
