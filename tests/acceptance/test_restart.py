"""Kill the worker, kill everything, start again: nothing that was accepted is lost."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable

import pytest

from tests.server import Json, Server

pytestmark = pytest.mark.acceptance

CONVERSATION = [{"role": "user", "content": "test"}, {"role": "assistant", "content": "passed"}]


def submit_steps(server: Server, model_id: str, steps: int) -> list[str]:
    """Queue ``steps`` forward_backwards with an optim_step each; return all request ids."""
    ids = []
    for _ in range(steps):
        for path, fields in (
            ("/api/v1/forward_backward_async", {"data": [CONVERSATION]}),
            ("/api/v1/optim_step_async", {"adam_params": {"learning_rate": 1e-3}}),
        ):
            answer = server.post(path, model_id=model_id, **fields)
            assert answer.status_code == 200, answer.text
            ids.append(answer.json()["request_id"])
    return ids


def results(server: Server, ids: list[str]) -> list[Json]:
    answers = [server.retrieve(request_id) for request_id in ids]
    assert [answer.status_code for answer in answers] == [200] * len(ids)
    return [answer.json() for answer in answers]


def test_a_killed_worker_loses_nothing_and_the_run_comes_out_the_same(server: Server) -> None:
    unbroken = results(server, submit_steps(server, "unbroken", 4))
    first = submit_steps(server, "broken", 2)
    results(server, first)
    rest = submit_steps(server, "broken", 2)
    os.kill(server.worker_pid(), signal.SIGKILL)
    broken = results(server, first + rest)
    for one, other in zip(unbroken, broken, strict=True):
        assert one["metrics"] == pytest.approx(other["metrics"], rel=1e-5)


def test_a_restart_of_everything_keeps_results_and_goes_on(
    start_server: Callable[..., Server], server: Server
) -> None:
    model = server.data_dir / "models" / "HuggingFaceTB--SmolLM2-135M-Instruct"
    other = start_server(TINKERAPI_BASE_MODEL=str(model))
    done = submit_steps(other, "m", 2)
    before = results(other, done)
    waiting = submit_steps(other, "m", 2)
    other.kill()
    other.start()
    assert results(other, done) == before
    assert results(other, waiting)[-1]["metrics"]["step"] == 4
