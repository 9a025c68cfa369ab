"""How long a pass waits for company, on a clock that only the bell moves."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from futures.notify import Bell
from training.worker.gathering import FIRST_SECONDS, LEAST_SECONDS, LIMIT_SECONDS, gather


class Arrivals:
    """A bell that rings at given times."""

    def __init__(self, times: Sequence[float], hurry_at: float = float("inf")) -> None:
        self._times = list(times)
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
            return Bell.HURRY
        del self._times[0]
        return Bell.RANG

    def claim(self) -> None:
        self.claimed += 1

    def gather(self, may_wait: Callable[[], bool] = lambda: True) -> None:
        gather(
            may_wait=may_wait, bell_rang=self.bell_rang, claim=self.claim, clock=lambda: self.now
        )


def test_one_alone_waits_for_the_longest_pause_only() -> None:
    alone = Arrivals([])
    alone.gather()

    assert (alone.claimed, alone.now) == (0, FIRST_SECONDS)


def test_all_that_arrive_in_step_are_gathered_and_the_end_is_noticed_soon() -> None:
    arrivals = Arrivals([0.004, 0.008, 0.012, 0.016])
    arrivals.gather()

    assert arrivals.claimed == 4
    assert arrivals.now == pytest.approx(0.016 + 4 * 0.004)


def test_a_quick_client_may_be_slower_once() -> None:
    arrivals = Arrivals([0.001, 0.001 + 0.9 * LEAST_SECONDS])
    arrivals.gather()

    assert arrivals.claimed == 2


def test_who_begins_to_wait_has_sent_everything() -> None:
    arrivals = Arrivals([0.004, 0.008, 0.030], hurry_at=0.010)
    arrivals.gather()

    assert (arrivals.claimed, arrivals.now) == (2, 0.010)


def test_a_stream_without_end_is_cut_off() -> None:
    arrivals = Arrivals([0.003 * number for number in range(1000)])
    arrivals.gather()

    assert LIMIT_SECONDS <= arrivals.now < LIMIT_SECONDS + 0.004


def test_nobody_waits_once_somebody_minds() -> None:
    arrivals = Arrivals([0.004, 0.008, 0.012])
    arrivals.gather(may_wait=lambda: arrivals.claimed < 2)

    assert (arrivals.claimed, arrivals.now) == (2, 0.008)
