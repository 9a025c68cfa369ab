"""Which adapters are in memory, and how one is rebuilt: its last snapshot plus its log.

A run's log is its futures of the kinds that change it (``LOGGED``), in the order of their
seq ids, and the failed steps that dropped its gradient. An adapter in memory always is what the
run's committed futures made it, and the caller drops it when an operation of it was not committed.
So memory is a cache: the least recently used adapters leave for their snapshot and come back on
use.

A snapshot saves time, not data: while the disk takes none, runs go on, and what a crash would
have to repeat grows until it takes one again.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from django.conf import settings

from futures.models import Future, Worker
from training.engine.interface import Sampler, Trainer
from training.errors import CheckpointNotFound, OutOfMemory, RunLost, TrainingError
from training.models import Checkpoint, Run
from training.selectors import run_log
from training.worker.run_versions import RunVersions
from training.worker.snapshots import SnapshotFailed, SnapshotWriter

logger = logging.getLogger(__name__)

WRITE_COST_FACTOR = 10  # snapshots may take a tenth of the time at most
PAUSE_SECONDS = 60.0  # after a snapshot that could not be written


@dataclass
class _CachedAdapter:
    """What the worker knows of one adapter in memory."""

    snapshot_seq_id: int = -1
    """Last request that the newest snapshot holds; -1 without one."""
    debt_seconds: float = 0.0
    """Work since then, which a crash would repeat; infinite if it could not."""
    captured_seconds: float = 0.0
    """Of that work, what the snapshot that is being written holds."""
    write_seconds: float = 0.0
    """What the last snapshot took."""
    used_at: float = 0.0
    unreadable: tuple[int, ...] = ()
    """Snapshots that could not be read, to be deleted once there is a newer one."""


class AdapterCache:
    """The adapters of one trainer, by run."""

    def __init__(
        self,
        trainer: Trainer,
        sampler: Sampler,
        worker: Worker,
        *,
        replay: Callable[[Run, Sequence[Future]], None],
        on_turn: Callable[[], None] = lambda: None,
    ) -> None:
        """Begin with nothing in memory.

        Args:
            replay: Applies a run's log to its adapter; see ``training.worker.replay``.
            on_turn: Called whenever writing them all has got on.
        """
        self._on_turn = on_turn
        self._trainer = trainer
        self._sampler = sampler
        self._versions = RunVersions(trainer, sampler)
        self._replay = replay
        self._worker = worker
        self._cached: dict[str, _CachedAdapter] = {}
        self._checkpoints: dict[str, float] = {}
        self._pinned: frozenset[str] = frozenset()
        self._snapshots = SnapshotWriter(trainer, worker)
        self._paused_until = 0.0

    def pin(self, run_ids: Iterable[str]) -> None:
        """Keep these runs in memory until the next call: a batch changes them, and what is not
        committed must not be snapshotted."""
        self._pinned = frozenset(run_ids)

    def bring_run(self, run: Run) -> str:
        """Make the run's adapter resident; return its name in the trainer.

        Raises:
            RunLost: Neither a snapshot nor the log can rebuild it. (failed future)
            OutOfMemory: There is no room to rebuild it now. (failed future)
        """
        resident = self._cached.get(run.id)
        if resident is None:
            self.make_room()
            resident = self._rebuild(run)
            self._cached[run.id] = resident
        resident.used_at = time.monotonic()
        return run.id

    def publish_run(self, run: Run) -> str:
        """Have the sampler know the run's weights as they are now; return their version.

        Raises:
            RunLost: Neither a snapshot nor the log can rebuild it. (failed future)
            OutOfMemory: There is no room to rebuild it now. (failed future)
        """
        self.bring_run(run)
        return self._versions.publish(run)

    def moved_on(self, runs: Iterable[Run]) -> None:
        """Say that operations of these runs are committed, so that their weights may be others."""
        self._versions.moved_on(runs)

    def publish_checkpoint(self, checkpoint_id: int) -> str:
        """Have the sampler know a checkpoint's weights; return their version.

        Raises:
            CheckpointNotFound: It was deleted or damaged since. (failed future)
            InvalidRequest: It was made for a base model of another shape. (failed future)
            OutOfMemory: There is no room for it now. (failed future)
        """
        name = f"checkpoint:{checkpoint_id}"
        if name not in self._checkpoints:
            checkpoint = Checkpoint.objects.filter(pk=checkpoint_id).first()
            if checkpoint is None:
                raise CheckpointNotFound("the checkpoint was deleted before its turn came")
            self.make_room()
            directory = settings.DATA_DIR / checkpoint.directory
            self._sampler.publish(name, directory)
        self._checkpoints[name] = time.monotonic()
        return name

    def created(self, run: Run) -> None:
        """Say that the run's adapter was just made in the trainer."""
        self._cached[run.id] = _CachedAdapter(used_at=time.monotonic())

    def drop_run(self, run_id: str) -> None:
        """Forget a run's adapter: it was removed, or memory is ahead of what is committed."""
        self._cached.pop(run_id, None)
        self._versions.retire(run_id)
        self._trainer.drop_adapter(run_id)

    def remove_run(self, run: Run) -> None:
        """Free all that a removed run holds: its memory and its snapshots."""
        self.drop_run(run.id)
        self._snapshots.delete_all(run)

    def worked(self, run_id: str, seconds: float) -> None:
        """Add to what a crash would have to repeat for this run, if it is still there."""
        if run_id in self._cached:
            self._cached[run_id].debt_seconds += seconds

    def keep_up(self) -> None:
        """Name the snapshot that was written meanwhile, and begin the one that is most due.

        What a crash could not repeat is not left to chance: its snapshot is waited for. Call
        this between batches, when memory is what is committed.
        """
        if self._snapshots.is_over():
            self._finish()
        due = [run_id for run_id in self._cached if self._is_due(run_id)]
        for run_id in sorted(due, key=lambda run_id: -self._cached[run_id].debt_seconds):
            if time.monotonic() < self._paused_until:
                return
            if math.isinf(self._cached[run_id].debt_seconds):
                self._write_now(run_id)
            elif self._snapshots.begun is None:
                self._begin(run_id)

    def _is_due(self, run_id: str) -> bool:
        """Whether the work since the last snapshot is worth more than writing one."""
        resident = self._cached[run_id]
        return resident.debt_seconds > max(
            settings.SNAPSHOT_SECONDS, WRITE_COST_FACTOR * resident.write_seconds
        )

    def _begin(self, run_id: str) -> None:
        resident = self._cached[run_id]
        run = Run.objects.live().filter(id=run_id).first()
        if run is None or run.applied_seq_id == resident.snapshot_seq_id:
            resident.debt_seconds = 0.0
            return
        try:
            self._snapshots.begin(run)
        except SnapshotFailed as error:
            self._failed(run_id, error)
            return
        resident.captured_seconds, resident.debt_seconds = resident.debt_seconds, 0.0

    def _finish(self) -> None:
        begun = self._snapshots.begun
        if begun is None:
            return
        resident = self._cached.get(begun.run_id, _CachedAdapter())  # it may have left
        try:
            resident.write_seconds = self._snapshots.finish(unreadable=resident.unreadable)
        except SnapshotFailed as error:
            resident.debt_seconds += resident.captured_seconds
            self._failed(begun.run_id, error)
        else:
            resident.snapshot_seq_id = begun.seq_id
            resident.unreadable = ()
        resident.captured_seconds = 0.0

    def _failed(self, run_id: str, error: SnapshotFailed) -> None:
        self._paused_until = time.monotonic() + PAUSE_SECONDS
        logger.warning("run %s: no snapshot, a crash would repeat more: %s", run_id, error)

    def snapshot(self, run: Run) -> bool:
        """Write the run's state now and wait for it; say whether it is on disk.

        Call it between a commit and the run's next operation, with a fresh row.
        """
        self._write_now(run.id)
        return self._cached[run.id].snapshot_seq_id == run.applied_seq_id

    def settle(self) -> None:
        """Wait for the snapshot that is being written, and name it."""
        self._snapshots.wait()
        self._finish()

    def _write_now(self, run_id: str) -> None:
        self.settle()
        self._begin(run_id)
        self.settle()

    def snapshot_all(self) -> None:
        """Write whatever is not on disk yet, so that the next worker need not repeat it."""
        for run in Run.objects.live().filter(id__in=self._cached):
            self.snapshot(run)
            self._on_turn()

    def make_room(self) -> None:
        """Evict the least recently used adapters until one more may be made.

        Where the disk takes no snapshot, one leaves without it if its log can rebuild it.
        """
        stay = set(self._pinned)
        while len(self._cached) + len(self._checkpoints) >= settings.RESIDENT_ADAPTERS:
            used = {key: resident.used_at for key, resident in self._cached.items()}
            used |= self._checkpoints
            evictable = used.keys() - stay
            if not evictable:
                return
            name = min(evictable, key=used.__getitem__)
            if name in self._checkpoints:
                del self._checkpoints[name]
                self._sampler.retire(name)
                continue
            run = Run.objects.get(id=name)
            is_safe = run.deleted_at is not None or self.snapshot(run)
            if is_safe or math.isfinite(self._cached[name].debt_seconds):
                self.drop_run(name)
            else:
                stay.add(name)

    def _rebuild(self, run: Run) -> _CachedAdapter:
        resident = _CachedAdapter()
        for snapshot in run.snapshots.order_by("-seq_id"):
            try:
                self._trainer.load_adapter(run.id, settings.DATA_DIR / snapshot.directory)
            except CheckpointNotFound as error:
                logger.warning(
                    "run %s: snapshot at %s is unreadable: %s", run.id, snapshot.seq_id, error
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
                logger.info("run %s: replaying %d requests", run.id, len(log))
            self._replay(run, log)
        except OutOfMemory:  # another time there may be room
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
