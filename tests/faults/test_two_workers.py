"""A worker that was thought dead comes to itself while another does its work: nothing changes."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from futures.errors import Fenced
from futures.models import Future
from tests.conftest import InProcessWorker
from tests.faults.conftest import assert_all_ready, assert_same, state_of
from tinkerapi.api.quickref.render_results import result_body
from training.engine.fake.engine import fake_engine
from training.kinds import stored_result
from training.models import Run

Start = Callable[..., InProcessWorker]
Train = Callable[..., list[Future]]


@pytest.mark.parametrize("verb", ["create_adapter", "forward_backward", "optim_step"])
def test_what_was_computed_twice_counts_once(start_worker: Start, train: Train, verb: str) -> None:
    unbroken = start_worker()
    expected = train("unbroken", 3)
    unbroken()

    others: list[InProcessWorker] = []

    def another_takes_over(name: str, adapter_names: tuple[str, ...]) -> None:
        if name == verb and not others:
            others.append(start_worker())
            others[0]()

    old = start_worker(fake_engine(before_verb=another_takes_over))
    futures = train("m", 3)
    with pytest.raises(Fenced):
        old()
    [new] = others
    assert_all_ready(futures)
    assert_same(state_of(new, "m"), state_of(unbroken, "unbroken"))
    assert Run.objects.get(name="m").step == 3
    for future, twin in zip(futures, expected, strict=True):
        future.refresh_from_db()
        assert future.worker_id == new.worker.pk
        twin.refresh_from_db()
        ours, theirs = (
            result_body(stored_result(row.kind, bytes(row.result or b"")))["metrics"]
            for row in (future, twin)
        )
        assert ours == theirs

    more = train("m", 1, first=3)
    with pytest.raises(Fenced):
        old()
    new()
    assert_all_ready(more)
