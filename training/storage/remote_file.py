"""A file of a bucket, open for reading."""

from __future__ import annotations

from collections.abc import Callable

from training.errors import StorageFailed
from training.storage.interface import StoredFile

READ_AHEAD_BYTES = 8 * 2**20


class RemoteFile(StoredFile):
    """Reads ahead, so that small reads in order are few calls."""

    def __init__(self, name: str, size_bytes: int, read: Callable[[int, int], bytes]) -> None:
        super().__init__(name, size_bytes)
        self._read = read
        self._begin, self._ahead = 0, b""

    def read(self, begin: int, length: int) -> bytes:
        end = begin + length
        if not self._begin <= begin <= end <= self._begin + len(self._ahead):
            ahead = min(max(length, READ_AHEAD_BYTES), self.size_bytes - begin)
            self._begin, self._ahead = begin, self._read(begin, ahead) if ahead > 0 else b""
        piece = self._ahead[begin - self._begin : end - self._begin]
        if len(piece) != length:
            raise StorageFailed(f"{self.name} is damaged: it ends at byte {begin + len(piece)}.")
        return piece

    def close(self) -> None:
        self._ahead = b""
