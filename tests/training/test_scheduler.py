"""Which futures may share a batch, which must wait; none is lost or overtaken."""

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from futures.models import Future
from training.kinds import Kind
from training.worker.scheduler import Batch, Scheduler

KINDS = [
    Kind.FORWARD,
    Kind.FORWARD_BACKWARD,
    Kind.SAMPLE,
    Kind.OPTIM_STEP,
    Kind.SAVE_WEIGHTS,
    Kind.LOAD_WEIGHTS,
]


def future(lane: str | None, seq_id: int, kind: str, cost: int = 1) -> Future:
    return Future(
        id=f"{lane}-{seq_id}", lane_id=lane, seq_id=seq_id if lane else None, kind=kind, cost=cost
    )


def lane_of(name: str, kinds: Sequence[str], cost: int = 1) -> list[Future]:
    return [future(name, seq_id, kind, cost) for seq_id, kind in enumerate(kinds, start=1)]


def everything(batch: Batch) -> list[Future]:
    return [*batch.passes, *batch.samples, *batch.barriers]


def ids(futures: Sequence[Future]) -> set[str]:
    return {item.id for item in futures}


def test_neighbouring_passes_of_many_lanes_share_a_batch_with_their_barriers() -> None:
    scheduler = Scheduler(batch_cost=100, batch_bytes=9)
    for name in ("a", "b"):
        scheduler.add(lane_of(name, ["forward_backward", "forward", "optim_step", "forward"]))
    batch = scheduler.next_batch()
    assert ids(batch.passes) == {"a-1", "a-2", "b-1", "b-2"}
    assert ids(batch.barriers) == {"a-3", "b-3"}
    assert ids(scheduler.next_batch().passes) == {"a-4", "b-4"}
    assert not scheduler.next_batch()


def test_a_barrier_waits_for_the_sample_before_it_and_not_for_other_lanes() -> None:
    scheduler = Scheduler(batch_cost=100, batch_bytes=9)
    scheduler.add(lane_of("a", ["sample", "optim_step"]) + lane_of("b", ["optim_step"]))
    first = scheduler.next_batch()
    assert ids(first.samples) == {"a-1"}
    assert ids(first.barriers) == {"b-1"}
    assert not scheduler.next_batch()
    scheduler.sample_finished(first.samples[0])
    assert ids(scheduler.next_batch().barriers) == {"a-2"}


def test_passes_behind_a_running_sample_need_not_wait() -> None:
    scheduler = Scheduler(batch_cost=100, batch_bytes=9)
    scheduler.add(lane_of("a", ["sample"]))
    scheduler.next_batch()
    scheduler.add([future("a", 2, "forward_backward")])
    assert ids(scheduler.next_batch().passes) == {"a-2"}


def test_a_batch_keeps_to_its_budget_and_takes_from_each_lane_in_turn() -> None:
    scheduler = Scheduler(batch_cost=4, batch_bytes=9)
    scheduler.add(lane_of("a", ["forward"] * 4, cost=1) + lane_of("b", ["forward"] * 4, cost=1))
    assert ids(scheduler.next_batch().passes) == {"a-1", "b-1", "a-2", "b-2"}


def test_a_future_larger_than_the_budget_runs_alone() -> None:
    scheduler = Scheduler(batch_cost=4, batch_bytes=9)
    scheduler.add([future("a", 1, "forward", cost=50), future("b", 1, "forward", cost=1)])
    assert ids(scheduler.next_batch().passes) == {"a-1"}
    assert ids(scheduler.next_batch().passes) == {"b-1"}


def test_a_batch_touches_no_more_lanes_than_adapters_fit_in_memory() -> None:
    scheduler = Scheduler(batch_cost=100, batch_bytes=2, lane_bytes=lambda lane_id: 1)
    for name in ("a", "b", "c"):
        scheduler.add(lane_of(name, ["forward", "optim_step"]))
    assert ids(everything(scheduler.next_batch())) == {"a-1", "a-2", "b-1", "b-2"}
    assert ids(everything(scheduler.next_batch())) == {"c-1", "c-2"}


def test_futures_without_a_lane_do_not_order_each_other() -> None:
    scheduler = Scheduler(batch_cost=100, batch_bytes=9)
    first, second = future(None, 0, "sample"), future(None, 0, "sample")
    first.id, second.id = "x", "y"
    scheduler.add([first, second])
    assert ids(scheduler.next_batch().samples) == {"x", "y"}


@given(
    lanes=st.lists(
        st.lists(st.tuples(st.sampled_from(KINDS), st.integers(1, 9)), max_size=8), max_size=4
    ),
    batch_cost=st.integers(1, 20),
    finish_late=st.booleans(),
)
def test_every_future_runs_once_in_order_and_never_across_a_barrier(
    lanes: list[list[tuple[str, int]]], batch_cost: int, finish_late: bool
) -> None:
    scheduler = Scheduler(batch_cost=batch_cost, batch_bytes=9)
    claimed = [
        future(f"lane{number}", seq_id, kind, cost)
        for number, lane in enumerate(lanes)
        for seq_id, (kind, cost) in enumerate(lane, start=1)
    ]
    scheduler.add(claimed)
    ran: dict[str, list[Future]] = {}
    sampling: list[Future] = []
    for _ in range(10 * len(claimed) + 10):
        batch = scheduler.next_batch()
        for barrier in batch.barriers:
            # All before it in its lane have run, and none of its samples is under way.
            before = ran.get(barrier.lane_id or "", []) + [
                f for f in everything(batch) if f.lane_id == barrier.lane_id and f is not barrier
            ]
            assert len(before) == (barrier.seq_id or 0) - 1
            assert not [f for f in sampling + batch.samples if f.lane_id == barrier.lane_id]
        taken = everything(batch)
        if len(taken) > len(batch.barriers) + 1:
            # The budget bounds the requests of one pass; barriers cost almost nothing.
            assert sum(f.cost for f in batch.passes + batch.samples) <= batch_cost
        for item in sorted(taken, key=lambda f: (f.lane_id or "", f.seq_id or 0)):
            ran.setdefault(item.lane_id or "", []).append(item)
        sampling += batch.samples
        if sampling and (not finish_late or not batch):
            scheduler.sample_finished(sampling.pop())
    for number, lane in enumerate(lanes):
        order = [f.seq_id for f in ran.get(f"lane{number}", [])]
        assert order == list(range(1, len(lane) + 1))
    assert scheduler.held() == []


def test_a_batch_has_one_custom_loss_of_an_owner() -> None:
    """Tokens do not measure a client's own loss, so others wait for at most one of them."""
    scheduler = Scheduler(batch_cost=100, batch_bytes=9)
    for name, owner_id in (("a", 1), ("b", 1), ("c", 2)):
        futures = lane_of(name, ["forward_backward", "forward_backward", "optim_step"])
        for item in futures[:2]:
            item.owner_id = owner_id
            item.summary = {"datums": 1, "loss_fn": "custom"}
        scheduler.add(futures)
    scheduler.add(lane_of("d", ["forward_backward"] * 3))

    first, second = scheduler.next_batch(), scheduler.next_batch()
    assert ids(first.passes) == {"a-1", "c-1", "d-1", "d-2", "d-3"}
    assert not first.barriers
    assert ids(second.passes) == {"a-2", "c-2"}
    assert ids(second.barriers) == {"a-3", "c-3"}
    assert [ids(scheduler.next_batch().passes) for _ in range(3)] == [{"b-1"}, {"b-2"}, set()]
