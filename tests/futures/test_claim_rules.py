"""Random queues: each claim follows the rules, until no future may run."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from typing import Any

import pytest
from django.db import transaction
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from futures.cancelling import future_cancel
from futures.models import Lane, Worker
from tests.futures.conftest import SubmitFactory
from tests.futures.test_claim import claim

pytestmark = pytest.mark.django_db


@dataclass(frozen=True)
class Request:
    """One row of a random queue."""

    owner: int
    lane: int | None
    seq_id: int | None
    cost: int
    cancelled: bool


lanes_of_requests = st.lists(
    st.tuples(
        st.integers(0, 2),  # owner
        st.sets(st.integers(1, 7), max_size=7),  # seq ids that have arrived
        st.sets(st.integers(1, 7), max_size=3),  # which of them were cancelled
    ),
    max_size=4,
)


@st.composite
def queues(draw: st.DrawFn) -> list[Request]:
    """Requests of several lanes and of none, in random order of arrival."""
    requests = [
        Request(owner, lane, seq_id, draw(st.integers(0, 5)), seq_id in cancelled)
        for lane, (owner, arrived, cancelled) in enumerate(draw(lanes_of_requests))
        for seq_id in sorted(arrived)
    ]
    requests += [
        Request(draw(st.integers(0, 2)), None, None, draw(st.integers(0, 5)), False)
        for _ in range(draw(st.integers(0, 4)))
    ]
    return draw(st.permutations(requests))


def expected_claim(
    waiting: list[Request],
    begins: dict[int, int],
    served: list[int],
    max_futures: int,
    max_cost: int,
) -> list[Request]:
    """The rules of the claim in plain words, for requests in their order of arrival.

    ``begins`` says where each lane goes on: at its first number neither claimed nor final.
    ``served`` lists the owners that were served, the least recently served first.
    """
    by_number = {(r.lane, r.seq_id): r for r in waiting if r.lane is not None}
    since: dict[Request, tuple[int, int, int]] = {}
    for position, request in enumerate(waiting):
        if request.lane is None:
            since[request] = (position, -1, position)
    for lane, begin in begins.items():
        seq_id, latest = begin, -1
        while (request := by_number.get((lane, seq_id))) is not None:
            latest = max(latest, waiting.index(request))
            if not request.cancelled:
                since[request] = (latest, lane, seq_id)
            seq_id += 1
    turns: dict[int, int] = defaultdict(int)
    order = []
    for request in sorted(since, key=since.__getitem__):
        turns[request.owner] += 1
        recently = served.index(request.owner) if request.owner in served else -1
        order.append((turns[request.owner], recently, since[request], request))
    taken: list[Request] = []
    spent = 0
    for *_, request in sorted(order, key=lambda item: item[:3]):
        spent += request.cost
        if len(taken) == max_futures or (taken and spent > max_cost):
            break
        taken.append(request)
    return taken


@settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(requests=queues(), max_futures=st.integers(1, 6), max_cost=st.integers(0, 12))
def test_claims_follow_the_rules_until_nothing_may_run(
    requests: list[Request],
    max_futures: int,
    max_cost: int,
    submit: SubmitFactory,
    lane_factory: Callable[..., Lane],
    owner_factory: Callable[[], Any],
    worker: Worker,
) -> None:
    with transaction.atomic():
        owners = [owner_factory() for _ in range(3)]
        lanes = {
            lane: lane_factory(owner_id=owners[owner].pk)
            for lane, owner in sorted({(r.lane, r.owner) for r in requests if r.lane is not None})
        }
        future_of = {}
        for request in dict.fromkeys(requests):
            future = submit(
                lanes.get(request.lane),
                owner_id=owners[request.owner].pk,
                seq_id=request.seq_id,
                cost=request.cost,
            )
            future_of[future.pk] = request
            if request.cancelled:
                future_cancel(request_id=future.pk, owner_id=future.owner_id)

        waiting = list(future_of.values())
        begins = dict.fromkeys(lanes, 1)
        served: list[int] = []
        worker.owners_served = ()
        more_waits = True
        while True:
            expected = expected_claim(waiting, begins, served, max_futures, max_cost)
            claimed = claim(worker, max_futures, max_cost)
            assert [future_of[future.pk] for future in claimed] == expected
            assert more_waits or not claimed
            more_waits = worker.more_waits
            if not claimed:
                break
            for owner in dict.fromkeys(request.owner for request in expected):
                served = [other for other in served if other != owner] + [owner]
            gone = {request for request in waiting if request.cancelled} | set(expected)
            for lane, begin in begins.items():
                passed = {request.seq_id for request in gone if request.lane == lane}
                begins[lane] = next(n for n in count(begin) if n not in passed)
            waiting = [r for r in waiting if r.lane is not None or r not in expected]
        transaction.set_rollback(True)
