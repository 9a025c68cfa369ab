"""When an idle worker returns memory to the system."""

from __future__ import annotations

import pytest

from training.worker.idle import AGAIN_SECONDS, IDLE_SECONDS, IdleTime


class Worker:
    """The actions of an idle worker, and its clock."""

    def __init__(self) -> None:
        self.now = 0.0
        self.to_let_go = 0
        self.did: list[str] = []
        self.idle = IdleTime(
            let_go=self._let_go,
            release_memory=lambda: self.did.append("release"),
            clock=lambda: self.now,
        )

    def _let_go(self) -> bool:
        if not self.to_let_go:
            return False
        self.to_let_go -= 1
        self.did.append("let go")
        return True

    def look_for(self, seconds: float) -> list[str]:
        """Check four times a second; return the actions."""
        self.did.clear()
        for _ in range(int(4 * seconds)):
            self.now += 0.25
            self.idle.look()
        return list(self.did)


@pytest.fixture
def worker() -> Worker:
    return Worker()


def test_nothing_is_given_back_between_two_steps_of_a_client(worker: Worker) -> None:
    worker.to_let_go = 1
    for _ in range(5):
        assert worker.look_for(IDLE_SECONDS - 1) == []
        worker.idle.worked()


def test_what_nobody_needs_leaves_piece_by_piece_and_then_the_memory(worker: Worker) -> None:
    worker.to_let_go = 2
    assert worker.look_for(IDLE_SECONDS + 5) == ["let go", "let go", "release"]
    assert worker.look_for(AGAIN_SECONDS - 10) == []


def test_clients_that_leave_later_are_noticed(worker: Worker) -> None:
    assert worker.look_for(IDLE_SECONDS) == ["release"]
    worker.to_let_go = 1
    assert worker.look_for(AGAIN_SECONDS + 1) == ["let go", "release"]


def test_memory_is_given_back_again_after_more_work(worker: Worker) -> None:
    assert worker.look_for(IDLE_SECONDS + 1) == ["release"]
    worker.idle.worked()
    assert worker.look_for(IDLE_SECONDS + 1) == ["release"]
