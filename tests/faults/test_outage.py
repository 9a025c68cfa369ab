"""While Postgres is down one request waits for it, and the others are told at once."""

from __future__ import annotations

import pytest
from django.db import OperationalError
from psycopg_pool import PoolTimeout

from futures import outage
from futures.outage import BELIEVED_SECONDS, Outage
from tests.conftest import ApiClient


class Clock:
    now = 10.0

    def __call__(self) -> float:
        return self.now


def wait_in_vain() -> None:
    raise OperationalError("no connection") from PoolTimeout("after 4.00 sec")


def test_who_waited_in_vain_speaks_for_all_who_come_in_the_next_moment() -> None:
    clock = Clock()
    known = Outage(clock=clock)
    known.check()
    with pytest.raises(OperationalError, match="no connection"):
        known.noting(wait_in_vain)
    with pytest.raises(OperationalError, match="a moment ago"):
        known.check()
    clock.now += BELIEVED_SECONDS
    known.check()
    assert known.noting(lambda value: value, "found") == "found"


def test_an_error_of_one_statement_is_no_outage() -> None:
    known = Outage()

    def fail() -> None:
        raise OperationalError("deadlock detected")

    with pytest.raises(OperationalError):
        known.noting(fail)
    known.check()


@pytest.mark.parametrize("path", ["/fwdbwd", "/api/v1/forward_backward_async", "/v1/completions"])
def test_meanwhile_requests_are_answered_503_with_a_time_to_come_back(
    api: ApiClient, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    monkeypatch.setattr(outage.outage, "_believed_until", float("inf"))
    answer = api.post(path, model_id="m", model="m", prompt="hi", data=[])
    assert answer.status_code == 503
    assert int(answer["Retry-After"]) > 0
    assert api.get("/healthz").status_code == 200
