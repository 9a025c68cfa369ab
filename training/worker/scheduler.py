"""Forms engine batches from claimed futures. Pure Python, no rows are written here.

The worker holds claimed futures in one queue per lane, in order. A batch takes from every lane
the futures that may run now:

- consecutive futures that only read the weights (forward, forward_backward, sample), and
- the barrier after them, if all of them fit and no sample of the lane is running: a
  sample must see the weights of its place in the order, even if it is repeated after a crash.

So the forward_backwards of many runs share a pass over the base model, consecutive ones of
one run are merged, and none crosses an optim_step, a save or a load of its own run. A batch
is one commit; its size is bounded by a budget of tokens so that no commit waits for long. Tokens do
not measure the time of a client's own loss, so a batch has at most one request with such a loss of
an owner: others wait for one graph's time limit at most.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Set
from dataclasses import dataclass, field

from futures.models import Future
from training.kinds import REQUESTS, Order
from training.loss_fns import CUSTOM


@dataclass(frozen=True)
class Batch:
    """Futures that run together and are committed together. Barriers run last."""

    passes: list[Future] = field(default_factory=list)
    """forward and forward_backward, in lane order."""
    samples: list[Future] = field(default_factory=list)
    """Admitted to the sampler now; each is committed when it is finished."""
    barriers: list[Future] = field(default_factory=list)
    """At most one of each lane."""

    def __bool__(self) -> bool:
        return bool(self.passes or self.samples or self.barriers)


class Scheduler:
    """The futures that this worker holds and has not begun, and the waiting lanes."""

    def __init__(
        self,
        *,
        batch_cost: int,
        batch_bytes: int,
        lane_bytes: Callable[[str], int] = lambda lane_id: 0,
        is_ready: Callable[[Future], bool] = lambda future: True,
        needs_files: Callable[[Future], bool] | None = None,
    ) -> None:
        """Start without futures.

        Args:
            batch_cost: Tokens that one batch may hold; one future alone may exceed it.
            batch_bytes: Memory limit of one batch's adapters, because all must be in
                memory; one alone may exceed it.
            lane_bytes: The size of a lane's adapter.
            is_ready: Whether a future may run; if not, it and later futures of its lane wait.
            needs_files: Whether files must come or go before the first future of a lane may run;
                None: never.
        """
        self._needs_files = needs_files
        self._batch_cost = batch_cost
        self._batch_bytes = batch_bytes
        self._lane_bytes = lane_bytes
        self._is_ready = is_ready
        self._lanes: dict[str, deque[Future]] = {}
        self._sampling: dict[str, set[str]] = {}
        self._storing: set[str] = set()
        """Lanes whose last barrier has no outcome yet, because its files are being stored."""

    def add(self, futures: Iterable[Future]) -> None:
        """Add claimed futures: each lane's in order, after those it has."""
        for future in futures:
            # A future without a lane counts as a separate lane.
            self._lanes.setdefault(future.lane_id or future.id, deque()).append(future)

    def next_batch(self) -> Batch:
        """Take the next batch out of the lanes, one future of each in turn; empty if none may
        run."""
        batch, cost = Batch(), 0
        barred: set[str] = set()
        graph_owners: set[int | None] = set()
        touched: dict[str, int] = {}
        progress = True
        while progress:
            progress = False
            for lane, queue in list(self._lanes.items()):
                if lane in barred:
                    continue
                future = queue[0]
                if (
                    not self._is_ready(future)
                    or self._waits_for_files(lane)
                    or not self._fits(lane, touched)
                ):
                    barred.add(lane)
                    continue
                order = REQUESTS[future.kind].order
                if order is Order.BARRIER:
                    barred.add(lane)
                    if lane in self._sampling:
                        continue
                    batch.barriers.append(future)
                elif (batch and cost + future.cost > self._batch_cost) or (
                    has_custom_loss(future) and future.owner_id in graph_owners
                ):
                    # Later futures of this lane may not overtake it.
                    barred.add(lane)
                    continue
                elif order is Order.SAMPLE:
                    batch.samples.append(future)
                    self._sampling.setdefault(lane, set()).add(future.id)
                else:
                    batch.passes.append(future)
                    if has_custom_loss(future):
                        graph_owners.add(future.owner_id)
                if lane not in touched:
                    touched[lane] = self._bytes(lane)
                cost += future.cost
                progress = True
                queue.popleft()
                if not queue:
                    del self._lanes[lane]
        return batch

    def _fits(self, lane: str, touched: Mapping[str, int]) -> bool:
        """Whether the lane's adapter may be in memory beside those of the lanes touched so far."""
        if lane in touched or not touched:
            return True
        return sum(touched.values()) + self._bytes(lane) <= self._batch_bytes

    def _waits_for_files(self, lane: str) -> bool:
        """Whether nothing of the lane may run until files have been stored or have arrived."""
        if lane in self._storing:
            return True
        return self._needs_files is not None and self._needs_files(self._lanes[lane][0])

    def barrier_put_back(self, future: Future) -> None:
        """Put back a barrier that was in a batch and did not begin."""
        self._lanes.setdefault(future.lane_id or future.id, deque()).appendleft(future)

    def barrier_waits(self, future: Future) -> None:
        """Record that a barrier of the last batch has no outcome yet: its lane waits."""
        self._storing.add(future.lane_id or future.id)

    def barrier_finished(self, future: Future) -> None:
        """Record that it has one."""
        self._storing.discard(future.lane_id or future.id)

    def full_owners(self) -> set[int]:
        """Owners of whom much is held that waits for files."""
        if self._needs_files is None and not self._storing:
            return set()
        costs: dict[int, int] = {}
        for lane, queue in self._lanes.items():
            owner_id = queue[0].owner_id
            if self._waits_for_files(lane):
                costs[owner_id] = costs.get(owner_id, 0) + sum(future.cost for future in queue)
        return {owner_id for owner_id, cost in costs.items() if cost > self._batch_cost}

    def _bytes(self, lane: str) -> int:
        lane_id = self._lanes[lane][0].lane_id
        return 0 if lane_id is None else self._lane_bytes(lane_id)

    def put_back(self, future: Future) -> None:
        """Put back a sample that was in a batch and could not begin yet."""
        self.sample_finished(future)
        self._lanes.setdefault(future.lane_id or future.id, deque()).appendleft(future)

    def sample_finished(self, future: Future) -> None:
        """Record that a sample left the sampler, so that its lane's next barrier may run."""
        lane = future.lane_id or future.id
        ids = self._sampling[lane]
        ids.discard(future.id)
        if not ids:
            del self._sampling[lane]

    def withdraw(self, request_ids: Set[str]) -> None:
        """Drop futures that were cancelled before they began; other ids are ignored."""
        for lane, queue in list(self._lanes.items()):
            kept = deque(future for future in queue if future.id not in request_ids)
            if kept:
                self._lanes[lane] = kept
            else:
                del self._lanes[lane]

    def held(self) -> list[Future]:
        """All futures that are claimed and not begun."""
        return [future for queue in self._lanes.values() for future in queue]

    @property
    def is_delayable(self) -> bool:
        """Whether there are futures and all of them may wait for batch-mates."""
        held = self.held()
        return bool(held) and all(future.delayable for future in held)

    @property
    def held_cost(self) -> int:
        """Tokens claimed, not begun and ready to run; futures that wait for their text or for files
        do not count."""
        held = [
            future
            for lane, queue in self._lanes.items()
            if not self._waits_for_files(lane)
            for future in queue
        ]
        return sum(future.cost for future in held if self._is_ready(future))


def has_custom_loss(future: Future) -> bool:
    """Whether the request is computed with a loss that its client wrote."""
    return bool(future.summary.get("loss_fn") == CUSTOM)
