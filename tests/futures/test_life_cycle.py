"""Any order of submits, claims, commits, cancellations and crashes, against a dictionary.

The model is the promise in plain words: a lane takes effect in its order and each request of
it at most once, whoever dies when. The "engine" appends to a list of its lane in memory; a
crash forgets the list and the next worker rebuilds it from what was committed. Whatever becomes of
a row must be one of the moves that ``futures.transitions`` names.
"""

from __future__ import annotations

import itertools
from collections import defaultdict

import pytest
from django.contrib.auth import get_user_model
from django.db import connection, transaction
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from futures import claiming
from futures.cancelled import futures_cancelled
from futures.cancelling import future_cancel
from futures.claiming import future_claim
from futures.errors import FutureNotCancellable, SeqIdReused
from futures.finishing import Outcome, futures_finish, futures_release
from futures.lane_gaps import gaps_refuse
from futures.lost_workers import MAX_ATTEMPTS
from futures.models import Future, Lane, Worker
from futures.payload import decode, encode
from futures.services import future_submit, lane_create
from futures.transitions import MOVES
from futures.workers import worker_start, worker_stop
from tests.futures.conftest import QUEUE, kill

LANES = 3


class LifeCycle(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.atomic = transaction.atomic()
        self.atomic.__enter__()
        self.owner = get_user_model().objects.create(username="owner")
        for lane in range(LANES):
            lane_create(lane_id=f"lane {lane}", owner_id=self.owner.pk, queue=QUEUE)
        self.state: dict[str, str] = {}
        self.seen: dict[str, str] = {}
        """The rows' states before the last rule."""
        self.named: dict[tuple[int, int], tuple[str, int]] = {}
        """(lane, seq id) -> (request id, value)"""
        self.where: dict[str, tuple[int, int]] = {}
        self.attempts: dict[str, int] = defaultdict(int)
        self.interruptible: set[str] = set()
        self.effects: dict[int, list[int]] = defaultdict(list)
        """Lane -> seq ids whose result is committed, in the order of the commits."""
        self.held: list[Future] = []
        """By the worker, which has not heard yet what of it was cancelled."""
        self.worker: Worker = worker_start(queue=QUEUE, figures={})

    def teardown(self) -> None:
        kill(self.worker)
        transaction.set_rollback(True)
        self.atomic.__exit__(None, None, None)

    @rule(
        lane=st.integers(0, LANES - 1),
        seq_id=st.integers(1, 6),
        value=st.integers(0, 1),
        interruptible=st.booleans(),
    )
    def submit(self, lane: int, seq_id: int, value: int, interruptible: bool) -> None:
        first = self.named.get((lane, seq_id))
        try:
            future = future_submit(
                owner_id=self.owner.pk,
                queue=QUEUE,
                kind="append",
                payload={"value": value},
                lane_id=f"lane {lane}",
                seq_id=seq_id,
                interruptible=interruptible,
            )
        except SeqIdReused:
            assert first is not None
            assert first[1] != value
            return
        if first is not None:
            assert first == (future.pk, value)
            return
        self.named[lane, seq_id] = (future.pk, value)
        self.where[future.pk] = (lane, seq_id)
        self.state[future.pk] = "pending"
        if interruptible:
            self.interruptible.add(future.pk)

    @rule(lane=st.integers(0, LANES - 1), count=st.integers(1, 4), interruptible=st.booleans())
    def submit_the_next(self, lane: int, count: int, interruptible: bool) -> None:
        """Fills the lane's first gaps, because random numbers would seldom let a future run."""
        missing = (n for n in itertools.count(1) if (lane, n) not in self.named)
        for seq_id in list(itertools.islice(missing, count)):
            self.submit(lane=lane, seq_id=seq_id, value=1, interruptible=interruptible)

    @precondition(lambda self: self.state)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        # By position: request ids are random, and a run must be repeatable.
        request_id = list(self.state)[data.draw(st.integers(0, len(self.state) - 1))]
        may_be = self.state[request_id] in ("pending", "cancelled") or (
            self.state[request_id] == "running" and request_id in self.interruptible
        )
        try:
            future_cancel(request_id=request_id, owner_id=self.owner.pk)
        except FutureNotCancellable:
            assert not may_be
        else:
            assert may_be
            self.state[request_id] = "cancelled"

    @precondition(lambda self: self.held)
    @rule()
    def hear(self) -> None:
        """The worker drops cancelled futures."""
        held = [future.pk for future in self.held]
        cancelled = futures_cancelled(worker=self.worker, request_ids=held)
        assert cancelled == {pk for pk in held if self.state[pk] == "cancelled"}
        self.held = [future for future in self.held if future.pk not in cancelled]

    @precondition(lambda self: self.state)
    @rule(max_futures=st.integers(1, 5))
    def claim(self, max_futures: int) -> None:
        claimed = future_claim(worker=self.worker, max_futures=max_futures, max_cost=10**6)
        runnable = self.runnable()
        suspects = [request_id for request_id in runnable if self.attempts[request_id]]
        for future in claimed:
            assert self.state[future.pk] == "pending"
            assert future.pk in runnable
        held = self.running(self.held)
        if suspects or any(self.attempts[future.pk] for future in held):
            assert len(claimed) == (0 if held else 1)
        else:
            assert len(claimed) == min(max_futures, len(runnable))
        for future in claimed:
            self.state[future.pk] = "running"
            lane, seq_id = self.where[future.pk]
            earlier = [self.state[self.named[lane, n][0]] for n in range(1, seq_id)]
            assert "pending" not in earlier
        self.held += claimed

    def runnable(self) -> set[str]:
        """Pending, with a row for every lower number of their lane."""
        found = set()
        for request_id, (lane, seq_id) in self.where.items():
            complete = all((lane, n) in self.named for n in range(1, seq_id))
            if complete and self.state[request_id] == "pending":
                found.add(request_id)
        return found

    @precondition(lambda self: self.held)
    @rule(count=st.integers(1, 5), fails=st.booleans())
    def finish(self, count: int, fails: bool) -> None:
        """The engine runs the first of its futures, then commits."""
        batch, self.held = self.held[:count], self.held[count:]
        outcomes = []
        for future in batch:
            lane, seq_id = self.where[future.pk]
            assert decode(bytes(future.payload)) == {"value": self.named[lane, seq_id][1]}
            was_cancelled = self.state[future.pk] == "cancelled"
            if fails:
                outcomes.append(Outcome(request_id=future.pk, error="bad", category="user"))
            else:
                outcomes.append(Outcome(request_id=future.pk, result=encode(seq_id)))
                if not was_cancelled:
                    self.effects[lane].append(seq_id)
            if not was_cancelled:
                self.state[future.pk] = "failed" if fails else "ready"
        with transaction.atomic():
            futures_finish(worker=self.worker, outcomes=outcomes, batch=1)

    @precondition(lambda self: self.held)
    @rule(kept=st.integers(0, 4))
    def release(self, kept: int) -> None:
        released, self.held = self.held[kept:], self.held[:kept]
        futures_release(worker=self.worker, request_ids=[future.pk for future in released])
        for future in self.running(released):
            self.state[future.pk] = "pending"

    @rule()
    def refuse(self) -> None:
        """After a claim has reached a gap, no future waits behind it any longer."""
        begins = dict(Lane.objects.values_list("pk", "next_seq_id"))
        for request_id, (lane, seq_id) in self.where.items():
            begin = begins[f"lane {lane}"]
            behind_a_gap = begin < seq_id and (lane, begin) not in self.named
            if behind_a_gap and self.state[request_id] == "pending":
                assert request_id not in self.runnable()
                self.state[request_id] = "failed"
        gaps_refuse(queue=QUEUE, patience_seconds=0)

    @precondition(lambda self: self.held)
    @rule()
    def crash(self) -> None:
        kill(self.worker)
        for future in (running := self.running(self.held)):
            # With several, the cause is unknown.
            alone = len(running) == 1
            self.attempts[future.pk] += 1
            spent = alone and self.attempts[future.pk] >= MAX_ATTEMPTS
            self.state[future.pk] = "failed" if spent else "pending"
        self.held = []
        self.worker = worker_start(queue=QUEUE, figures={})

    @precondition(lambda self: self.held)
    @rule()
    def stop_and_start(self) -> None:
        worker_stop(self.worker)
        for future in self.running(self.held):
            self.state[future.pk] = "pending"
        self.held = []
        self.worker = worker_start(queue=QUEUE, figures={})

    def running(self, held: list[Future]) -> list[Future]:
        """The futures that the worker holds and that are not cancelled."""
        return [future for future in held if self.state[future.pk] == "running"]

    @invariant()
    def the_rows_are_as_the_model_says(self) -> None:
        rows = Future.objects.values_list("pk", "state", "attempts")
        assert {pk: state for pk, state, _ in rows} == self.state
        assert all(attempts == self.attempts[pk] for pk, _, attempts in rows)

    @invariant()
    def every_change_is_a_move(self) -> None:
        before, self.seen = self.seen, dict(Future.objects.values_list("pk", "state"))
        changes = {(before.get(pk, state), state) for pk, state in self.seen.items()}
        assert {change for change in changes if change[0] != change[1]} <= set(MOVES.values())

    @invariant()
    def each_lane_took_effect_in_order_and_once(self) -> None:
        for effects in self.effects.values():
            assert effects == sorted(set(effects))


@pytest.mark.django_db(transaction=True)
def test_no_life_of_a_queue_breaks_the_promise(monkeypatch: pytest.MonkeyPatch) -> None:
    assert connection.get_autocommit()
    monkeypatch.setattr(claiming, "SUSPECT_SECONDS", 3600)  # however slow the machine is
    run_state_machine_as_test(
        LifeCycle,
        settings=settings(
            max_examples=10,
            stateful_step_count=50,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
