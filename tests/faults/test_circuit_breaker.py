"""While Postgres is down one request waits for it, and the others fail at once."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from django.db import OperationalError

from futures import circuit_breaker
from futures.circuit_breaker import BELIEVED_SECONDS, LOOK_SECONDS, PATIENCE_SECONDS, CircuitBreaker
from tests.conftest import ApiClient
from tinkerapi.api import async_view


class Clock:
    """Time that passes only during sleeps."""

    now = 10.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


class Postgres:
    """Refuses connections until a time."""

    def __init__(self, clock: Clock, back_at: float) -> None:
        self._clock, self._back_at = clock, back_at
        self.asked = 0

    def connect(self) -> None:
        self.asked += 1
        if self._clock.now < self._back_at:
            raise OperationalError("connection refused")


def test_a_restart_is_waited_out() -> None:
    clock = Clock()
    postgres = Postgres(clock, back_at=clock.now + PATIENCE_SECONDS / 2)

    CircuitBreaker(clock=clock, sleep=clock.sleep).wait_out(postgres.connect)

    assert postgres.asked > 2
    assert clock.now < 10.0 + PATIENCE_SECONDS


def test_who_waited_in_vain_speaks_for_all_who_come_in_the_next_moment() -> None:
    clock = Clock()
    postgres = Postgres(clock, back_at=10.0 + PATIENCE_SECONDS + BELIEVED_SECONDS)
    known = CircuitBreaker(clock=clock, sleep=clock.sleep)

    with pytest.raises(OperationalError, match="connection refused"):
        known.wait_out(postgres.connect)
    assert clock.now < 10.0 + PATIENCE_SECONDS + 2 * LOOK_SECONDS
    asked = postgres.asked
    with pytest.raises(OperationalError, match="a moment ago"):
        known.wait_out(postgres.connect)
    assert postgres.asked == asked

    clock.now += BELIEVED_SECONDS
    known.wait_out(postgres.connect)
    assert postgres.asked == asked + 1


def test_one_who_was_answered_speaks_for_all_too() -> None:
    clock = Clock()
    postgres = Postgres(clock, back_at=10.0 + PATIENCE_SECONDS + BELIEVED_SECONDS / 2)
    known = CircuitBreaker(clock=clock, sleep=clock.sleep)
    with pytest.raises(OperationalError):
        known.wait_out(postgres.connect)
    clock.now += BELIEVED_SECONDS / 2

    known.is_over()

    known.wait_out(postgres.connect)


@pytest.mark.parametrize("path", ["/fwdbwd", "/api/v1/forward_backward_async", "/v1/completions"])
def test_meanwhile_requests_are_answered_503_with_a_time_to_come_back(
    api: ApiClient, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    monkeypatch.setattr(circuit_breaker.circuit_breaker, "_believed_until", float("inf"))
    gone = SimpleNamespace(connection=None, ensure_connection=None)
    monkeypatch.setattr(async_view, "connection", gone)
    answer = api.post(path, model_id="m", model="m", prompt="hi", data=[])
    assert answer.status_code == 503
    assert int(answer["Retry-After"]) > 0
    assert api.get("/healthz").status_code == 200


def test_who_has_a_connection_that_works_goes_on(
    api: ApiClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(circuit_breaker.circuit_breaker, "_believed_until", float("inf"))

    assert api.post("/cancel_future", request_id="unknown").status_code == 404
