"""The broker: order of arrival, one claimant each, and a bell that is heard."""

from __future__ import annotations

import threading
import time
from functools import partial

import psycopg
import pytest
from django.db import OperationalError, connection, transaction
from django_q.brokers import get_broker
from django_q.models import OrmQ
from django_q.tasks import async_task

from futures.broker import PostgresBroker, bell_rang
from futures.database import dedicated_parameters
from tests.futures.conftest import QUEUE, SubmitFactory, race
from tests.waiting import LONG_SECONDS

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.fixture
def broker() -> PostgresBroker:
    return PostgresBroker(list_key=QUEUE)


def listen(broker: PostgresBroker) -> None:
    """The first wait of a connection begins to listen, and then says yes to be safe."""
    broker.wait(0)
    while broker.wait(0):
        pass


def test_django_q_uses_this_broker() -> None:
    assert isinstance(get_broker(QUEUE), PostgresBroker)


def test_tasks_are_claimed_in_order_of_arrival_and_once(broker: PostgresBroker) -> None:
    sent = [broker.enqueue(f"task {number}") for number in range(3)]

    claimed = [broker.claim() for _ in range(4)]

    assert claimed == [[(sent[0], "task 0")], [(sent[1], "task 1")], [(sent[2], "task 2")], []]
    assert broker.queue_size() == 0
    assert broker.lock_size() == 3


def test_an_acknowledged_task_is_gone_and_another_comes_back_after_its_lock(
    broker: PostgresBroker,
) -> None:
    first, second = broker.enqueue("a"), broker.enqueue("b")
    broker.claim()
    broker.claim()

    broker.acknowledge(first)
    OrmQ.objects.update(lock="2000-01-01T00:00Z")

    assert broker.claim() == [(second, "b")]
    assert broker.claim() == []


def test_queues_do_not_see_each_others_tasks(broker: PostgresBroker) -> None:
    PostgresBroker(list_key="other").enqueue("theirs")

    assert broker.claim() == []


def test_racing_clusters_share_no_task(broker: PostgresBroker) -> None:
    sent = {broker.enqueue(f"task {number}") for number in range(40)}

    def drain() -> list[int]:
        own = PostgresBroker(list_key=QUEUE)
        claimed = []
        while tasks := own.claim():
            claimed += [task_id for task_id, _ in tasks]
        return claimed

    shares = race(*[drain] * 3)

    claimed = [task_id for share in shares for task_id in share]
    assert sorted(claimed) == sorted(sent)


def test_an_async_task_wakes_a_waiting_broker(broker: PostgresBroker) -> None:
    listen(broker)
    woken: list[bool] = []
    submitter = threading.Thread(
        target=partial(race, partial(async_task, "math.sqrt", 4, cluster=QUEUE))
    )
    submitter.start()

    begun = time.monotonic()
    woken.append(broker.wait(LONG_SECONDS))
    assert time.monotonic() - begun < LONG_SECONDS / 2
    submitter.join()

    assert woken == [True]
    assert len(broker.claim()) == 1


def test_dequeue_returns_a_task_that_arrives_while_it_waits(broker: PostgresBroker) -> None:
    listen(broker)
    assert broker.claim() == []
    submitter = threading.Thread(target=partial(race, partial(broker_enqueue, "late")))
    submitter.start()

    [(_, task)] = broker.dequeue() or broker.dequeue()

    submitter.join()
    assert task == "late"


def broker_enqueue(task: str) -> int:
    return PostgresBroker(list_key=QUEUE).enqueue(task)


def test_a_submission_rings_only_when_its_outermost_transaction_commits(
    broker: PostgresBroker, submit: SubmitFactory
) -> None:
    listen(broker)
    rung: list[bool] = []

    def submit_and_look() -> None:
        with transaction.atomic():
            submit()
            rung.extend(race(partial(other_hears, 0.05)))

    heard_later = threading.Thread(target=partial(race, submit_and_look))
    heard_later.start()
    heard_later.join()

    assert rung == [False]
    assert broker.wait(LONG_SECONDS)


def other_hears(seconds: float) -> bool:
    """Whether another connection hears the bell within this time."""
    other = PostgresBroker(list_key=QUEUE)
    listen(other)
    return other.wait(seconds)


def test_bell_rang_says_once_that_the_bell_rang(
    broker: PostgresBroker, submit: SubmitFactory
) -> None:
    listen(broker)
    assert not bell_rang(QUEUE)

    race(submit)
    race(submit)

    # Postgres delivers within moments of the commit, not within it.
    deadline = time.monotonic() + LONG_SECONDS
    while not (heard := bell_rang(QUEUE)) and time.monotonic() < deadline:
        pass
    assert heard
    while broker.wait(0.05):
        pass
    assert not bell_rang(QUEUE)


def test_notifications_that_arrive_during_other_statements_are_kept(
    broker: PostgresBroker, submit: SubmitFactory
) -> None:
    listen(broker)
    race(submit)
    assert OrmQ.objects.count() == 1

    assert bell_rang(QUEUE)


def test_after_a_lost_connection_the_bell_counts_as_rung(broker: PostgresBroker) -> None:
    listen(broker)
    with psycopg.connect(**dedicated_parameters()) as other:
        pid = connection.connection.info.backend_pid
        other.execute("SELECT pg_terminate_backend(%s, 5000)", [pid])

    with pytest.raises(OperationalError):
        broker.wait(1)
    connection.close()

    assert broker.wait(0)
    assert not broker.wait(0)
    race(partial(broker_enqueue, "x"))
    assert broker.wait(LONG_SECONDS)
