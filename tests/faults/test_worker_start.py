"""A worker that starts while Postgres is down waits for it, but not forever."""

from __future__ import annotations

import psycopg
import pytest
from django.db import OperationalError

from futures.errors import QueueTaken
from futures.models import Worker
from training.worker.process import LOOK_SECONDS, OUTAGE_SECONDS, when_postgres_answers

pytestmark = pytest.mark.django_db


class Postgres:
    """Down for this many simulated seconds."""

    def __init__(self, away_seconds: float, error: Exception) -> None:
        self.now = 0.0
        self.away_seconds = away_seconds
        self.error = error
        self.signs = 0

    def clock(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def start(self) -> Worker:
        if self.now < self.away_seconds:
            raise self.error
        return Worker(queue="q")

    def sign(self) -> None:
        self.signs += 1


def begin(postgres: Postgres) -> Worker:
    return when_postgres_answers(
        postgres.start, meanwhile=postgres.sign, clock=postgres.clock, sleep=postgres.sleep
    )


@pytest.mark.parametrize("error", [OperationalError("gone"), psycopg.OperationalError("gone")])
def test_it_starts_at_the_first_look_that_is_answered(
    error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    postgres = Postgres(60.0, error)
    assert begin(postgres).queue == "q"
    assert 60 <= postgres.now < 60 + LOOK_SECONDS
    assert postgres.signs == 60 / LOOK_SECONDS
    assert caplog.text.count("Postgres does not answer") == 1


def test_at_last_it_says_that_it_cannot_start() -> None:
    postgres = Postgres(float("inf"), OperationalError("gone"))
    with pytest.raises(OperationalError, match="gone"):
        begin(postgres)
    assert OUTAGE_SECONDS <= postgres.now <= OUTAGE_SECONDS + LOOK_SECONDS


def test_a_queue_that_is_taken_is_not_waited_for() -> None:
    postgres = Postgres(1.0, QueueTaken("taken"))
    with pytest.raises(QueueTaken):
        begin(postgres)
    assert postgres.now == 0
