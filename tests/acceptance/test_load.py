"""Small forms of ``tests/benchmarks/load.py``: crowds of clients on a whole server."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.benchmarks import load
from tests.benchmarks.report import Report
from tests.server import Server
from tests.tiny_model import make_tiny_model

pytestmark = pytest.mark.acceptance

PARTS: dict[str, tuple[Callable[..., None], dict[str, Any]]] = {
    "sampling": (load.sampling, {"clients": 64, "rounds": 1}),
    "bodies": (load.bodies, {"clients": 8, "size_bytes": 1_000_000}),
    "queue": (load.queue, {"requests": 200, "models": 10}),
    "polls": (load.polls, {"clients": 50, "parked_seconds": 1.5}),
}


@pytest.fixture(scope="module")
def crowded(
    start_server: Callable[..., Server], tmp_path_factory: pytest.TempPathFactory
) -> Server:
    """One server on a tiny model."""
    folder = make_tiny_model(tmp_path_factory.mktemp("base") / "tiny")
    return start_server(TINKERAPI_BASE_MODEL=str(folder), TINKERAPI_NUM_THREADS="1")


@pytest.mark.parametrize("part", PARTS)
def test_a_crowd_is_served_and_nothing_is_lost_or_done_twice(crowded: Server, part: str) -> None:
    play, sizes = PARTS[part]
    report = Report(benchmark="load", settings={})

    play(crowded, report, **sizes)

    goals = {item["name"]: item["goal_met"] for item in report.figures if item["goal"]}
    assert len(goals) >= 2
    assert all(goals.values()), goals
