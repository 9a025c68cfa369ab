"""How long a pass waits for batch-mates, on a clock that only the bell moves."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from futures.notify import Bell
from training.worker.batching_delay import (
    FIRST_SECONDS,
    LEAST_SECONDS,
    LIMIT_SECONDS,
    collect_batch_mates,
)


class Arrivals:
    """A bell that rings at given times."""

    def __init__(
        self,
        times: Sequence[float],
        *,
        hurry_at: float = float("inf"),
        bell: Bell = Bell.RANG,
    ) -> None:
        self._times = list(times)
        self._bell = bell
        self._hurry_at = hurry_at
        self.now = 0.0
        self.claimed = 0

    def bell_rang(self, seconds: float) -> Bell:
        heard = min([*self._times[:1], self._hurry_at])
        if heard > self.now + seconds:
            self.now += seconds
            return Bell.SILENT
        self.now = max(self.now, heard)
        if heard == self._hurry_at:
            return Bell.FLUSH
        del self._times[0]
        return self._bell

    def claim(self) -> None:
        self.claimed += 1

    def collect_batch_mates(self, may_wait: Callable[[], bool] = lambda: True) -> None:
        collect_batch_mates(
            may_wait=may_wait, bell_rang=self.bell_rang, claim=self.claim, clock=lambda: self.now
        )


def test_one_alone_waits_for_the_longest_pause_only() -> None:
    alone = Arrivals([])
    alone.collect_batch_mates()

    assert (alone.claimed, alone.now) == (0, FIRST_SECONDS)


def test_all_that_arrive_in_step_are_gathered_and_the_end_is_noticed_soon() -> None:
    arrivals = Arrivals([0.004, 0.008, 0.012, 0.016])
    arrivals.collect_batch_mates()

    assert arrivals.claimed == 4
    assert arrivals.now == pytest.approx(0.016 + 4 * 0.004)


def test_a_quick_client_may_be_slower_once() -> None:
    arrivals = Arrivals([0.001, 0.001 + 0.9 * LEAST_SECONDS])
    arrivals.collect_batch_mates()

    assert arrivals.claimed == 2


def test_who_begins_to_wait_has_sent_everything() -> None:
    arrivals = Arrivals([0.004, 0.008, 0.030], hurry_at=0.010)
    arrivals.collect_batch_mates()

    assert (arrivals.claimed, arrivals.now) == (2, 0.010)


@pytest.mark.parametrize("hurry_at", [0.010, float("inf")])
def test_what_may_wait_itself_is_claimed_at_the_end_and_all_at_once(hurry_at: float) -> None:
    arrivals = Arrivals([0.002, 0.004, 0.006, 0.008], hurry_at=hurry_at, bell=Bell.DELAYABLE)
    arrivals.collect_batch_mates()

    assert arrivals.claimed == 1
    assert arrivals.now == min(hurry_at, 0.008 + 4 * 0.002)


def test_a_stream_of_what_may_wait_is_claimed_when_it_is_cut_off() -> None:
    arrivals = Arrivals([0.003 * number for number in range(1000)], bell=Bell.DELAYABLE)
    arrivals.collect_batch_mates()

    assert arrivals.claimed == 1


def test_a_stream_without_end_is_cut_off() -> None:
    arrivals = Arrivals([0.003 * number for number in range(1000)])
    arrivals.collect_batch_mates()

    assert LIMIT_SECONDS <= arrivals.now < LIMIT_SECONDS + 0.004


def test_nobody_waits_once_somebody_minds() -> None:
    arrivals = Arrivals([0.004, 0.008, 0.012])
    arrivals.collect_batch_mates(may_wait=lambda: arrivals.claimed < 2)

    assert (arrivals.claimed, arrivals.now) == (2, 0.008)
