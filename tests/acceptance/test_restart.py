"""Kill the worker, kill everything, start again: nothing that was accepted is lost."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

import pytest

from tests.server import Server

pytestmark = pytest.mark.acceptance


def test_a_killed_worker_loses_nothing_and_the_run_comes_out_the_same(server: Server) -> None:
    unbroken = server.results(server.submit_steps("unbroken", 4, learning_rate=1e-3))
    first = server.submit_steps("broken", 2, learning_rate=1e-3)
    server.results(first)
    rest = server.submit_steps("broken", 2, learning_rate=1e-3)
    os.kill(server.worker_pid(), signal.SIGKILL)
    broken = server.results(first + rest)
    for one, other in zip(unbroken, broken, strict=True):
        assert one["metrics"] == pytest.approx(other["metrics"], rel=1e-5)


def test_a_restart_of_everything_keeps_results_and_goes_on(
    start_server: Callable[..., Server], server: Server
) -> None:
    model = server.data_dir / "models" / "HuggingFaceTB--SmolLM2-135M-Instruct"
    other = start_server(TINKERAPI_BASE_MODEL=str(model))
    done = other.submit_steps("m", 2, learning_rate=1e-3)
    before = other.results(done)
    waiting = other.submit_steps("m", 2, learning_rate=1e-3)
    other.kill()
    other.start()
    assert other.results(done) == before
    assert other.results(waiting)[-1]["metrics"]["step"] == 4
