"""The throughput that a worker tells of itself."""

from __future__ import annotations

from collections.abc import Callable

from futures.models import Future
from tests.conftest import InProcessWorker
from training.worker.throughput import Throughput


class Clock:
    """A clock that the test moves."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_nothing_finished_is_no_pace() -> None:
    assert Throughput(Clock()).futures_per_second is None


def test_it_is_what_was_finished_over_the_time_it_took() -> None:
    clock = Clock()
    throughput = Throughput(clock)
    throughput.work_begins()
    for count, seconds in ((3, 1.0), (1, 3.0)):
        clock.now += seconds
        throughput.finished(count)
    assert throughput.futures_per_second == 1.0


def test_time_without_work_does_not_count() -> None:
    clock = Clock()
    throughput = Throughput(clock)
    clock.now += 2
    throughput.finished(4)
    clock.now += 1000
    throughput.work_begins()
    clock.now += 2
    throughput.finished(4)
    assert throughput.futures_per_second == 2.0


def test_what_is_more_than_a_minute_of_work_ago_is_forgotten() -> None:
    clock = Clock()
    throughput = Throughput(clock)
    for count, seconds in ((1000, 10.0), (10, 50.0), (10, 50.0)):
        clock.now += seconds
        throughput.finished(count)
    assert throughput.futures_per_second == 0.2


def test_the_worker_says_its_pace_among_its_figures(
    work: InProcessWorker, forward_backward: Callable[..., Future]
) -> None:
    forward_backward("m", "hi", "hello")
    work()
    assert work.loop._figures["futures_per_second"] > 0
