"""How much of a bucket's file is read, and held in memory."""

from __future__ import annotations

import pytest

from training.errors import StorageFailed
from training.storage import remote_file
from training.storage.remote_file import ALL_AHEAD_BYTES, READ_AHEAD_BYTES, RemoteFile

MIB = 2**20
SIZE = 20 * MIB
BYTE = 7


class Counted:
    """A file that counts what is asked of the bucket."""

    def __init__(self, size_bytes: int = SIZE) -> None:
        self.asked: list[tuple[int, int]] = []
        self.file = RemoteFile("weights", size_bytes, self.read)

    def read(self, begin: int, length: int) -> bytes:
        self.asked.append((begin, length))
        return bytes([BYTE]) * length


def test_reads_in_order_are_few_calls() -> None:
    counted = Counted()
    for begin in range(0, SIZE, MIB):
        assert counted.file.read(begin, MIB) == bytes([BYTE]) * MIB
    assert counted.asked == [(0, MIB), (MIB, 8 * MIB), (9 * MIB, 8 * MIB), (17 * MIB, 3 * MIB)]


def test_one_byte_costs_one_byte() -> None:
    counted = Counted()
    for begin in (5, 1000, 5):
        assert counted.file.read(begin, 1) == bytes([BYTE])
    assert counted.asked == [(5, 1), (1000, 1), (5, 1)]


def test_many_slow_clients_hold_no_more_than_few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_file, "ALL_AHEAD_BYTES", 20 * MIB)
    downloads = [Counted() for _ in range(50)]
    for counted in downloads:
        counted.file.read(0, MIB)
        counted.file.read(MIB, MIB)
    held = sum(len(counted.file._ahead) for counted in downloads)
    assert held <= 20 * MIB + MIB
    for counted in downloads:
        counted.file.close()
    again = Counted()
    again.file.read(0, MIB)
    again.file.read(MIB, MIB)
    assert again.asked[-1] == (MIB, READ_AHEAD_BYTES)
    assert ALL_AHEAD_BYTES > READ_AHEAD_BYTES


def test_a_file_that_is_shorter_than_its_table_says_is_damaged() -> None:
    file = RemoteFile("weights", 10, lambda begin, length: b"12345"[begin : begin + length])
    with pytest.raises(StorageFailed, match="it ends at byte 5"):
        file.read(0, 8)
