"""The process that computes custom losses: the same bits, and limits that the worker outlives."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.engine.test_custom_loss import LOSSES, draw, graph_of, many_targets
from tests.platform.processes import is_running
from tests.waiting import LONG_SECONDS, wait_for
from training.custom_loss_graph import CustomLossGraph, check_graph
from training.engine.custom_loss import process as custom_loss_process
from training.engine.custom_loss.process import CustomLossProcess
from training.engine.custom_loss.run import (
    CustomLossInputs,
    CustomLossOutput,
    Outcome,
    Work,
    run_custom_losses,
)
from training.engine.custom_loss.wire import decode_request, encode_limits, encode_request
from training.errors import InvalidRequest, LimitExceeded, OutOfMemory

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="the kernel's limits are Linux's")


@pytest.fixture
def process(custom_loss_process: CustomLossProcess) -> CustomLossProcess:
    return custom_loss_process


@pytest.fixture
def limited(
    process: CustomLossProcess, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., CustomLossProcess]:
    """The same process with other limits."""

    def set_limits(**limits: float) -> CustomLossProcess:
        for name, value in limits.items():
            monkeypatch.setattr(process, f"_{name}", value)
        return process

    return set_limits


def checked(*nodes: tuple[str, list[Any]]) -> CustomLossGraph:
    """``logprobs``, the nodes x0, x1 ..., and the sum of logprobs as the loss."""
    items: list[dict[str, Any]] = [
        {"op": "placeholder", "name": "logprobs", "target": "logprobs"},
        *(
            {"op": "call_function", "name": f"x{index}", "target": target, "args": args}
            for index, (target, args) in enumerate(nodes)
        ),
        {"op": "call_method", "name": "loss", "target": "sum", "args": [{"ref": "logprobs"}]},
        {"op": "output", "name": "output", "target": "output",
         "args": [{"tuple": [{"ref": "loss"}, {"dict": {"custom/a:mean": {"ref": "loss"}}}]}]},
    ]  # fmt: skip
    graph = {"format": 1, "nodes": items}
    return check_graph("mine", [{"name": "logprobs", "rank": 1}], graph)


PLAIN = checked()
LONG = checked(*(("torch.exp", [{"ref": "logprobs"}]) for _ in range(300)))
"""Seconds of processor time on hundreds of datums; no machine does that in a hundredth."""
LARGE = checked(*(("torch.ones", [[2**24]]) for _ in range(3)))


def inputs(*values: float) -> CustomLossInputs:
    logprobs = torch.tensor(values or (-1.0, -2.0), dtype=torch.float32)
    return CustomLossInputs(logprobs=logprobs, others={})


def one(outcomes: list[Outcome]) -> Outcome:
    (outcome,) = outcomes
    return outcome


@pytest.mark.parametrize("function", LOSSES, ids=lambda function: function.__name__)
def test_it_computes_the_same_bits_as_this_process(
    process: CustomLossProcess, function: Any
) -> None:
    names = function.__code__.co_varnames[: function.__code__.co_argcount]
    values = {name: draw(name, many=function is many_targets) for name in names}
    data = [CustomLossInputs(logprobs=values.pop("logprobs"), others=values)]
    graph = graph_of(function, *names)
    here, there = Work(), Work()

    expected = one(run_custom_losses(graph, data, here))
    outcome = one(process(graph, data, there))

    assert isinstance(expected, CustomLossOutput)
    assert isinstance(outcome, CustomLossOutput)
    assert outcome.loss == expected.loss
    assert outcome.metrics == expected.metrics
    assert outcome.grad.numpy().tobytes() == expected.grad.numpy().tobytes()
    assert (here.num_steps, here.num_elements) == (there.num_steps, there.num_elements)


def test_arrays_of_every_dtype_travel_unchanged() -> None:
    arrays: list[np.ndarray[Any, Any]] = [
        np.array([[-0.0, np.nextafter(np.float32(1), np.float32(2))]], np.float32),
        np.array([2**53 + 1, -(2**62)]),
        np.array(7.25),
        np.zeros((0, 3), np.int32),
    ]
    others = {f"x{index}": torch.tensor(array) for index, array in enumerate(arrays)}
    data = [CustomLossInputs(logprobs=torch.tensor([-1.5]), others=others)]
    request = decode_request(encode_limits(1.5, 2**40) + encode_request(PLAIN, data, Work()))
    (arrived,) = request.data
    assert request.graph.nodes == PLAIN.nodes
    assert (request.cpu_seconds, request.memory_bytes) == (1.5, 2**40)
    for name, tensor in others.items():
        assert arrived.others[name].dtype == tensor.dtype
        assert arrived.others[name].shape == tensor.shape
        assert arrived.others[name].numpy().tobytes() == tensor.numpy().tobytes()


def test_a_datum_that_fails_leaves_the_others_their_results(process: CustomLossProcess) -> None:
    graph = checked(("operator.getitem", [{"ref": "logprobs"}, 2]))
    good, bad = process(graph, [inputs(-1, -2, -3), inputs(-1, -2)], Work())
    assert isinstance(good, CustomLossOutput)
    assert isinstance(bad, InvalidRequest)
    assert "node x0 (operator.getitem)" in str(bad)


def test_a_graph_out_of_processor_time_fails_by_name_and_the_next_one_runs(
    limited: Callable[..., CustomLossProcess],
) -> None:
    process = limited(cpu_seconds=0.01)
    before = process.child_pid
    data = [inputs()] * 500
    failed = process(LONG, data, Work())
    assert [type(outcome) for outcome in failed] == [LimitExceeded] * len(data)
    assert str(failed[0]) == (
        "custom loss 'mine': it took more than the 0.01 s of processor time that the custom loss "
        "of one request may take"
    )
    limited(cpu_seconds=LONG_SECONDS)
    assert isinstance(one(process(PLAIN, [inputs(-3, -4)], Work())), CustomLossOutput)
    assert process.child_pid != before


def test_a_graph_that_keeps_the_worker_waiting_is_ended(
    limited: Callable[..., CustomLossProcess],
) -> None:
    process = limited()
    process(PLAIN, [inputs(-13)], Work())
    stopped = process.child_pid
    assert stopped is not None
    os.kill(stopped, signal.SIGSTOP)

    failed = one(limited(wall_seconds=0.02)(PLAIN, [inputs(-14)], Work()))

    assert isinstance(failed, LimitExceeded)
    assert "more than the 0.02 s of time" in str(failed)
    assert not is_running(stopped)
    after = one(limited(wall_seconds=LONG_SECONDS)(PLAIN, [inputs(-14)], Work()))
    assert isinstance(after, CustomLossOutput)


@LINUX
def test_a_graph_that_needs_too_much_memory_fails_by_name(
    limited: Callable[..., CustomLossProcess],
) -> None:
    process = limited(memory_bytes=2**26)
    failed = one(process(LARGE, [inputs()], Work()))
    assert isinstance(failed, LimitExceeded)
    assert "more memory than the 0.0625 GiB that a custom loss may take" in str(failed)
    assert isinstance(one(process(PLAIN, [inputs(-5)], Work())), CustomLossOutput)


def test_the_datums_of_a_request_share_its_time(limited: Callable[..., CustomLossProcess]) -> None:
    process, work = limited(cpu_seconds=1.0), Work(cpu_seconds=2.0)
    assert isinstance(one(process(PLAIN, [inputs(-8)], work)), LimitExceeded)
    process(LONG, [inputs(-9)], used := Work())
    assert used.cpu_seconds > 0
    assert used.wall_seconds > 0


def test_a_replay_gets_more_time_and_is_no_users_fault(
    limited: Callable[..., CustomLossProcess],
) -> None:
    process = limited(cpu_seconds=1.0)
    later = one(process(PLAIN, [inputs(-10)], Work(cpu_seconds=2.0, is_replay=True)))
    assert isinstance(later, CustomLossOutput)
    too_long = one(process(PLAIN, [inputs(-11)], Work(cpu_seconds=11.0, is_replay=True)))
    assert isinstance(too_long, OutOfMemory)  # so that the run is rebuilt another time
    assert too_long.category == "server"


def test_a_process_that_somebody_ended_is_replaced_unnoticed(process: CustomLossProcess) -> None:
    process(PLAIN, [inputs(-12)], Work())
    child = process.child_pid
    assert child is not None
    os.kill(child, signal.SIGKILL)
    assert isinstance(one(process(PLAIN, [inputs(-1, -6)], Work())), CustomLossOutput)
    assert process.child_pid not in (None, child)


@pytest.mark.parametrize(
    ("status", "error", "message"),
    [
        (-signal.SIGSEGV, InvalidRequest, "custom loss 'mine': its process ended by SIGSEGV"),
        (3, InvalidRequest, "custom loss 'mine': its process ended with exit code 3"),
        (-signal.SIGKILL, OutOfMemory, "custom loss 'mine': the machine has no memory left"),
    ],
)
def test_a_graph_that_its_process_does_not_survive_twice_fails_by_name(
    process: CustomLossProcess,
    monkeypatch: pytest.MonkeyPatch,
    status: int,
    error: type[Exception],
    message: str,
) -> None:
    attempts = []

    def die(*args: Any) -> bytes:
        attempts.append(args)
        raise custom_loss_process._Died(status)

    monkeypatch.setattr(process, "_ask", die)
    failed = one(process(PLAIN, [inputs(-1, -2, -3, status)], Work()))
    assert type(failed) is error
    assert str(failed).startswith(message)
    assert len(attempts) == 2


def test_the_same_question_is_answered_once(
    process: CustomLossProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pass is repeated without the jobs that failed in it, and the others wait no longer."""
    first = one(process(PLAIN, [inputs(-7)], Work()))
    monkeypatch.setattr(CustomLossProcess, "_ask", None)
    again = one(process(PLAIN, [inputs(-7)], work := Work()))
    assert isinstance(first, CustomLossOutput)
    assert isinstance(again, CustomLossOutput)
    assert again.loss == first.loss
    assert work.num_steps


def test_nothing_secret_and_no_device_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DATABASE_URL", "postgres://secret")
    monkeypatch.setenv("TINKERAPI_SECRET_KEY", "secret")
    environment = custom_loss_process._environment()
    assert "secret" not in " ".join(environment.values())
    assert environment["CUDA_VISIBLE_DEVICES"] == ""
    assert environment["OMP_NUM_THREADS"] == "1"


def test_one_that_cannot_start_fails_the_request_and_not_the_worker(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(custom_loss_process, "COMMAND", (sys.executable, "-c", "pass"))
    process = CustomLossProcess()
    failed = one(process(PLAIN, [inputs()], Work()))
    process.close()
    assert isinstance(failed, OutOfMemory)
    assert "does not start: it ended with exit code 0" in str(failed)


@LINUX
def test_both_processes_go_with_a_worker_that_is_killed(tmp_path: Path) -> None:
    script = (
        "import time\n"
        "from training.engine.custom_loss.process import CustomLossProcess\n"
        "server = CustomLossProcess()._running()\n"
        "server.connection()\n"
        "print(server._process.pid, server.child_pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    worker = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert worker.stdout is not None
    pids = [int(pid) for pid in worker.stdout.readline().split()]
    assert len(pids) == 2
    worker.kill()
    worker.wait()
    worker.stdout.close()
    wait_for(lambda: not any(map(is_running, pids)))


# -- starting and ending ---------------------------------------------------------------------------


class Clock:
    """Stands until it is moved."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def unused(clock: Clock) -> Iterator[CustomLossProcess]:
    """A process without any request."""
    process = CustomLossProcess(clock=clock)
    yield process
    process.close()


def is_started(process: CustomLossProcess) -> bool:
    return process._server is not None


def test_it_starts_when_it_is_first_needed_and_nobody_waits(unused: CustomLossProcess) -> None:
    assert not is_started(unused)
    assert not unused.prepare()
    assert is_started(unused)
    wait_for(unused.prepare)
    unused.wait_until_ready()
    assert isinstance(one(unused(PLAIN, [inputs()], Work())), CustomLossOutput)


def test_a_process_that_does_not_start_holds_nobody_back(
    unused: CustomLossProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(custom_loss_process, "COMMAND", (sys.executable, "-c", "pass"))
    unused.prepare()
    wait_for(unused.prepare)
    assert isinstance(one(unused(PLAIN, [inputs()], Work())), OutOfMemory)


def test_it_ends_when_it_was_not_used_for_long_and_starts_again(
    unused: CustomLossProcess, clock: Clock
) -> None:
    unused.prepare()
    clock.now = custom_loss_process.UNUSED_SECONDS
    unused.release()
    assert is_started(unused)
    clock.now += 1
    unused.release()
    assert not is_started(unused)
    assert not unused.prepare()
    assert is_started(unused)
