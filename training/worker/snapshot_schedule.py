"""When snapshots of the adapters in memory are written.

A snapshot saves time, not data: while none can be written, runs continue, and the work that a crash
would repeat grows until one can be written again.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass

from django.conf import settings

from futures.log_fields import about
from training.models import Run
from training.storage.chosen import storage
from training.worker.snapshots import SnapshotFailed, SnapshotWriter

logger = logging.getLogger(__name__)

WRITE_COST_FACTOR = 10  # snapshots may take at most a tenth of the time
PAUSE_SECONDS = 60.0  # after a snapshot that could not be written
REMOTE_SECONDS = 10.0
"""Longest wait of the working thread for one snapshot in a remote storage."""
REMOTE_STOP_SECONDS = 60.0
"""The same at a stop, when nothing else is to be done."""


@dataclass
class CachedAdapter:
    """The worker's record of one adapter in memory."""

    snapshot_seq_id: int = -1
    """Last request in the newest snapshot; -1 without one."""
    debt_seconds: float = 0.0
    """Work since then, which a crash would repeat; infinite if a repeat is impossible."""
    captured_seconds: float = 0.0
    """The part of that work that the snapshot being written contains."""
    write_seconds: float = 0.0
    """The duration of the last snapshot."""
    weights_bytes: int = 0
    """The part of its memory that a sampler still uses after an eviction."""
    unreadable: tuple[int, ...] = ()
    """Unreadable snapshots, to be deleted once there is a newer one."""


class SnapshotSchedule:
    """Writes the snapshots that are due, the most urgent first."""

    def __init__(self, snapshots: SnapshotWriter, cached: Mapping[str, CachedAdapter]) -> None:
        """
        Args:
            cached: The adapters in memory, by run; the caller adds and removes them.
        """
        self._snapshots = snapshots
        self._cached = cached
        self._paused_until = 0.0

    def keep_up(self) -> None:
        """Record the snapshot that was written meanwhile, and begin the most urgent one.

        If a run could not be rebuilt after a crash, this waits for its snapshot.
        """
        if self._snapshots.is_over():
            self._finish()
        due = [run_id for run_id in self._cached if self._is_due(run_id)]
        for run_id in sorted(due, key=lambda run_id: -self._cached[run_id].debt_seconds):
            if time.monotonic() < self._paused_until:
                return
            if math.isinf(self._cached[run_id].debt_seconds):
                self.write_now(run_id)
            elif self._snapshots.begun is None:
                self._begin(run_id)

    def settle(self, *, at_a_stop: bool = False) -> None:
        """Wait for the snapshot that is being written, and record it.

        A remote storage may be slow: then it is recorded later, by ``keep_up``.
        """
        seconds = REMOTE_STOP_SECONDS if at_a_stop else REMOTE_SECONDS
        seconds = min(seconds, settings.HANG_SECONDS / 2)  # it must not be taken for a hung worker
        self._snapshots.wait(seconds if storage().is_remote else None)
        if self._snapshots.is_over():
            self._finish()

    def write_now(self, run_id: str, *, at_a_stop: bool = False) -> None:
        """Write the run's state and wait for it; see ``settle``.

        While another one is still being written after that wait, nothing is done.
        """
        self.settle(at_a_stop=at_a_stop)
        if self._snapshots.begun is None:
            self._begin(run_id)
            self.settle(at_a_stop=at_a_stop)

    def _is_due(self, run_id: str) -> bool:
        """Whether the work since the last snapshot justifies writing one."""
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
        resident = self._cached.get(begun.run_id, CachedAdapter())  # it may have been evicted
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
        logger.warning(
            "run %s: no snapshot, a crash would repeat more: %s",
            run_id,
            error,
            extra=about(run=run_id),
        )
