"""The leader's watch over the other ranks' processes."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.waiting import wait_for
from training.base_model_config import BaseModelConfig
from training.engine.group.members import Members, RankStart

START = RankStart(
    config=BaseModelConfig(name="tiny", path="nowhere", device="cpu", tp_size=2),
    folder="nowhere",
    rank=0,
    device="cpu",
    meeting_place="",
    num_threads=1,
    num_sharing=1,
    batch_tokens=512,
    cache_tokens=4096,
    wait_seconds=600.0,
)


def test_a_start_travels_as_text() -> None:
    config = BaseModelConfig(name="a", path="/a", devices=("cuda:0", "cuda:1"), fsdp_size=2)
    start = RankStart(**{**vars(START), "config": config, "rank": 1})
    assert RankStart.from_json(start.to_json()) == start


@pytest.fixture
def left() -> threading.Event:
    """Set once the leader would have ended."""
    return threading.Event()


@pytest.fixture
def members(tmp_path: Path, left: threading.Event) -> Iterator[Members]:
    """One follower, which waits for a leader that never comes."""
    start = RankStart(**{**vars(START), "meeting_place": str(tmp_path / "meeting_place")})
    members = Members(start, ["cpu", "cpu"], leave=left.set)
    yield members
    members.stop()


def test_the_leader_ends_with_a_killed_rank(members: Members, left: threading.Event) -> None:
    [pid] = members.pids
    os.kill(pid, signal.SIGKILL)
    wait_for(left.is_set)


def test_ranks_that_the_leader_stops_do_not_end_it(members: Members, left: threading.Event) -> None:
    [pid] = members.pids
    members.stop()
    assert not Path(f"/proc/{pid}").exists()
    assert not left.is_set()


def test_a_rank_ignores_the_signals_that_stop_its_leader(members: Members) -> None:
    [pid] = members.pids

    def ignored() -> bool:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        mask = int(next(line for line in lines if line.startswith("SigIgn")).split()[1], 16)
        return all(mask >> (number - 1) & 1 for number in (signal.SIGTERM, signal.SIGINT))

    wait_for(ignored)
