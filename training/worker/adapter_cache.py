"""Keeps adapters in memory, and rebuilds one from its last snapshot and its log.

A run's log is its futures of the kinds that change it (``LOGGED``), in the order of their
seq ids, and the failed steps that dropped its gradient. An adapter in memory always equals the
result of the run's committed futures; the caller drops it if an operation was not committed. So
memory is a cache, with a budget in bytes: adapters are evicted to their snapshot and loaded again
on use, first those whose client has left, then the least recently used.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Collection, Container, Iterable, Sequence

from futures.log_fields import about
from futures.models import Future, Worker
from training.engine.interface import Sampler, Trainer
from training.errors import (
    CheckpointNotFound,
    OutOfMemory,
    RunLost,
    StorageFailed,
    TrainingError,
)
from training.models import Checkpoint, Run
from training.selectors import lanes_without_client, run_log
from training.services.runs import run_lora_config
from training.storage.chosen import storage
from training.worker.adapter_memory import AdapterMemory
from training.worker.run_versions import RunVersions
from training.worker.snapshot_schedule import CachedAdapter, SnapshotSchedule
from training.worker.snapshots import SnapshotWriter

logger = logging.getLogger(__name__)

STUCK = (
    "the adapters in this worker's memory leave no room, and cannot leave until snapshots can be "
    "written again; try again later"
)
KNOWN_LANES = 10_000  # lanes whose adapters' sizes are remembered


class NoRoomYet(Exception):
    """Running samples use the memory that this one needs, so it has to wait."""


class AdapterCache:
    """The adapters of one trainer, by run, and the checkpoints that its sampler has."""

    def __init__(
        self,
        trainer: Trainer,
        sampler: Sampler,
        worker: Worker,
        *,
        budget_bytes: int,
        replay: Callable[[Run, Sequence[Future]], None],
        on_turn: Callable[[], None] = lambda: None,
    ) -> None:
        """Start with nothing in memory.

        Args:
            budget_bytes: The memory limit of all of them together.
            replay: Applies a run's log to its adapter; see ``training.worker.replay``.
            on_turn: Called at each step of writing them all.
        """
        self._on_turn = on_turn
        self._trainer = trainer
        self._sampler = sampler
        self._versions = RunVersions(trainer, sampler)
        self._replay = replay
        self._worker = worker
        self._cached: dict[str, CachedAdapter] = {}
        self._memory = AdapterMemory(budget_bytes)
        """Of the runs' adapters, and of versions: those of checkpoints, and those of runs that have
        left and are still sampled from."""
        self._leaving: set[str] = set()
        """Of the latter, those of runs."""
        self._lane_bytes: dict[str, int] = {}
        self._first_to_wait: str | None = None
        """The request whose checkpoint does not fit yet."""
        self._pinned: frozenset[str] = frozenset()
        self._snapshots = SnapshotWriter(trainer, worker)
        self._schedule = SnapshotSchedule(self._snapshots, self._cached)

    def pin(self, run_ids: Iterable[str]) -> None:
        """Keep these runs in memory until the next call: a batch changes them, and uncommitted
        changes must not be snapshotted."""
        self._pinned = frozenset(run_ids)

    def bring_run(self, run: Run) -> str:
        """Make the run's adapter resident; return its name in the trainer.

        Raises:
            RunLost: Neither a snapshot nor the log can rebuild it. (failed future)
            OutOfMemory: There is not enough memory to rebuild it now. (failed future)
        """
        if run.id not in self._cached:
            self.make_room(run)
            self._cached[run.id] = self._rebuild(run)
            self._hold(run)
        self._memory.use(run.id, lane_id=run.id)
        return run.id

    def publish_run(self, run: Run) -> str:
        """Publish the run's current weights to the sampler; return their version.

        Raises:
            RunLost: Neither a snapshot nor the log can rebuild it. (failed future)
            OutOfMemory: There is not enough memory to rebuild it now. (failed future)
        """
        self.bring_run(run)
        return self._versions.publish(run)

    def moved_on(self, runs: Iterable[Run]) -> None:
        """Record that operations of these runs are committed, so their weights may have changed."""
        self._versions.moved_on(runs)

    def publish_checkpoint(self, checkpoint_id: int, future: Future) -> str:
        """Publish the weights of a sample's checkpoint to the sampler; return their
        version.

        Raises:
            NoRoomYet: Try again when samples have finished. Other samples of checkpoints wait until
                this one has started, so that it is not delayed forever.
            CheckpointNotFound: It was deleted or damaged since. (failed future)
            InvalidRequest: It was made for a base model of another shape. (failed future)
            OutOfMemory: It can never fit. (failed future)
        """
        if self._first_to_wait not in (None, future.id):
            raise NoRoomYet
        self._first_to_wait = None
        version = f"checkpoint:{checkpoint_id}"
        lane_id = future.lane_id or ""
        if version not in self._memory:
            checkpoint = Checkpoint.objects.filter(pk=checkpoint_id).select_related("run").first()
            if checkpoint is None:
                raise CheckpointNotFound("the checkpoint was deleted before its turn came")
            config = run_lora_config(checkpoint.run)
            num_bytes = self._trainer.adapter_bytes(config, with_optimizer=False)
            if not self._make_room(num_bytes):
                if not self._pinned and not any(self._sampler.versions.values()):
                    raise OutOfMemory(STUCK)
                self._first_to_wait = future.id
                raise NoRoomYet
            with storage().local(checkpoint.directory) as folder:
                self._sampler.publish(version, folder)
            self._memory.hold(version, num_bytes, lane_id=lane_id)
        self._memory.use(version, lane_id=lane_id)
        return version

    def no_longer_wait(self, request_ids: Container[str]) -> None:
        """Record that requests were cancelled, one of which may have waited for memory."""
        if self._first_to_wait is not None and self._first_to_wait in request_ids:
            self._first_to_wait = None

    def created(self, run: Run) -> None:
        """Record that the run's adapter was just made in the trainer."""
        self._cached[run.id] = CachedAdapter()
        self._hold(run)

    def holds(self, name: str) -> bool:
        """Whether a run's adapter, or a version of weights, is in memory."""
        return name in self._memory

    def lanes_without_adapter(self) -> set[str]:
        """The lanes that this worker leases without having anything of them in memory."""
        return self._worker.leases - self._cached.keys()

    def hand_over(self, *, but: Collection[str]) -> str | None:
        """Write the snapshot of the run that was not used for the longest time, and evict it, so
        that another worker can continue it; return it.

        Call it between batches.

        Args:
            but: Runs that stay.

        Returns:
            None if there is no run to give, or its snapshot could not be written.
        """
        self.pin(())
        for name in self._memory.in_order_of_leaving(()):
            if name in self._cached and name not in but:
                run = Run.objects.live().filter(id=name).first()
                if run is not None and self.snapshot(run):
                    self.drop_run(name)
                    return name
                return None
        return None

    def drop_borrowed(self) -> None:
        """Drop the adapters of runs that are not leased to this worker, and were only read: the
        holder of the lease changes them from now on."""
        for run_id in self._cached.keys() - self._worker.leases:
            self.drop_run(run_id)

    def drop_run(self, run_id: str) -> None:
        """Drop a run's adapter: it was removed, or memory is ahead of the committed state."""
        resident = self._cached.pop(run_id, None)
        version = self._versions.retire(run_id)
        self._trainer.drop_adapter(run_id)
        self._memory.release(run_id)
        if resident is not None and version is not None and version in self._sampler.versions:
            self._memory.hold(version, resident.weights_bytes, lane_id="")
            self._leaving.add(version)

    def remove_run(self, run: Run) -> None:
        """Free a removed run's memory and snapshots."""
        self.drop_run(run.id)
        self._snapshots.delete_all(run)

    def worked(self, run_id: str, seconds: float) -> None:
        """Add to the work that a crash would repeat for this run, if it is still resident."""
        if run_id in self._cached:
            self._cached[run_id].debt_seconds += seconds

    def keep_up(self) -> None:
        """Record the snapshot that was written meanwhile, and begin the most urgent one.

        If a run could not be rebuilt after a crash, this waits for its snapshot. Call
        this between batches, when memory equals the committed state.
        """
        self._schedule.keep_up()

    def snapshot(self, run: Run, *, at_a_stop: bool = False) -> bool:
        """Write the run's state now and wait for it; return whether it is stored.

        Call it between a commit and the run's next operation, with a fresh row.
        """
        self._schedule.write_now(run.id, at_a_stop=at_a_stop)
        return self._cached[run.id].snapshot_seq_id == run.applied_seq_id

    def settle(self) -> None:
        """Wait for the snapshot that is being written, and record it."""
        self._schedule.settle()

    def snapshot_all(self, *, then: Callable[[Run], object] = lambda run: None) -> None:
        """Write all state that is not on disk yet, so that the next worker need not repeat it.

        Args:
            then: Called with each run after that.
        """
        for run in Run.objects.live().filter(id__in=self._cached):
            self.snapshot(run, at_a_stop=True)
            then(run)
            self._on_turn()

    def make_room(self, run: Run) -> None:
        """Evict adapters until the run's fits, as far as possible.

        Raises:
            OutOfMemory: It does not fit into this worker, even alone. (failed future)
        """
        self._make_room(self._trainer.adapter_bytes(run_lora_config(run)))

    def _hold(self, run: Run) -> None:
        """Count an adapter that is in memory now."""
        config = run_lora_config(run)
        weights_bytes = self._trainer.adapter_bytes(config, with_optimizer=False)
        self._cached[run.id].weights_bytes = weights_bytes
        self._memory.hold(run.id, self._trainer.adapter_bytes(config), lane_id=run.id)

    @property
    def budget_bytes(self) -> int:
        """The memory limit of all of them together."""
        return self._memory.budget_bytes

    def lane_bytes(self, lane_id: str) -> int:
        """The size of a lane's adapter, in memory or not; 0 for a lane without one."""
        if lane_id not in self._lane_bytes:
            if len(self._lane_bytes) >= KNOWN_LANES:
                self._lane_bytes.clear()
            run = Run.objects.filter(id=lane_id).first()
            try:
                self._lane_bytes[lane_id] = (
                    0 if run is None else self._trainer.adapter_bytes(run_lora_config(run))
                )
            except TrainingError:  # its creation will report that
                self._lane_bytes[lane_id] = 0
        return self._lane_bytes[lane_id]

    def figures(self) -> dict[str, int]:
        """The figures that the worker reports about its adapters."""
        return {
            "resident_adapters": len(self._memory),
            "adapter_bytes": self._memory.held_bytes,
            "adapter_cache_bytes": self._memory.budget_bytes,
        }

    def let_go(self) -> bool:
        """Evict one item that only departed clients used; return whether there was one.

        For an idle worker: one at a time, because unsaved state is written first.
        """
        self.pin(())
        self._count_versions()
        lanes = lanes_without_client(self._memory.lanes())
        return any(self._evict(name) for name in self._memory.of_lanes(lanes))

    def _make_room(self, num_bytes: int) -> bool:
        """Evict adapters until this many bytes fit; return whether they do."""
        self._memory.check(num_bytes)
        self._count_versions()
        if self._memory.fits(num_bytes):
            return True
        lanes = lanes_without_client(self._memory.lanes())
        for name in self._memory.in_order_of_leaving(lanes):
            self._evict(name)
            if self._memory.fits(num_bytes):
                return True
        return False

    def _count_versions(self) -> None:
        """Stop counting versions that are retired and no longer used."""
        for name in self._leaving - self._sampler.versions.keys():
            self._memory.release(name)
            self._leaving.discard(name)

    def _evict(self, name: str) -> bool:
        """Evict an item unless it is needed; return whether it was evicted.

        If no snapshot can be written, a run is evicted without one if its log can rebuild it.
        """
        if name in self._cached:
            if name in self._pinned:
                return False
            run = Run.objects.get(id=name)
            is_safe = run.deleted_at is not None or self.snapshot(run)
            if not is_safe and math.isinf(self._cached[name].debt_seconds):
                return False
            self.drop_run(name)
            return True
        if name in self._leaving or self._sampler.versions.get(name):
            return False  # a sample uses it
        self._memory.release(name)
        self._sampler.retire(name)
        return True

    def _rebuild(self, run: Run) -> CachedAdapter:
        resident = CachedAdapter()
        for snapshot in run.snapshots.order_by("-seq_id"):
            try:
                with storage().local(snapshot.directory) as folder:
                    self._trainer.load_adapter(run.id, folder)
            except CheckpointNotFound as error:
                logger.warning(
                    "run %s: snapshot at %s is unreadable: %s",
                    run.id,
                    snapshot.seq_id,
                    error,
                    extra=about(run=run.id, owner=run.owner_id),
                )
                resident.unreadable += (snapshot.pk,)
                continue
            resident.snapshot_seq_id = snapshot.seq_id
            resident.write_seconds = snapshot.write_seconds
            break
        begin = time.monotonic()
        try:
            log = run_log(run, after_seq_id=resident.snapshot_seq_id)
            if log:
                whose = about(run=run.id, owner=run.owner_id)
                logger.info("run %s: replaying %d requests", run.id, len(log), extra=whose)
            self._replay(run, log)
        except (OutOfMemory, StorageFailed):  # later there may be enough memory, or an answer
            self._trainer.drop_adapter(run.id)
            raise
        except TrainingError as error:
            self._trainer.drop_adapter(run.id)
            raise RunLost(
                f"model {run.name!r} cannot be rebuilt after a restart: {error}"
            ) from error
        if log:
            resident.debt_seconds = time.monotonic() - begin
        return resident
