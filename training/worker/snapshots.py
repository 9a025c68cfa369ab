"""Snapshots on disk: written by a thread beside other work, recorded in a row once complete.

A snapshot is a run's state that the server keeps for itself, so that a crash need not repeat the
whole log. No client waits for it: the state is captured first, between two batches, and the
run continues to train. At most one is being written. Its row is committed after its folder
has its name, by the thread that also commits the work, so a row is always true; a crash in
between leaves a folder that no row refers to.

Writing only reads the trainer's memory. A failure affects the snapshot only.
"""

from __future__ import annotations

import time
from collections.abc import Collection
from concurrent.futures import Future as Writing
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field

from django.db import transaction

from futures.leases import lease_is_held
from futures.models import Worker
from training.engine.interface import CapturedAdapter, Trainer
from training.models import Run, Snapshot
from training.storage.chosen import storage
from training.storage.interface import SNAPSHOTS, new_name

KEPT = 2  # for each run: the newest may be unreadable


class SnapshotFailed(Exception):
    """A snapshot could not be written; the run is unchanged."""


@dataclass(frozen=True, kw_only=True)
class Begun:
    """A snapshot that is being written."""

    run_id: str
    seq_id: int
    step: int
    directory: str
    """Its name in the storage."""
    writing: Writing[tuple[int, float]]
    """Bytes and seconds."""
    begun_at: float = field(default_factory=time.monotonic)


class SnapshotWriter:
    """Writes the snapshots of one trainer's runs, one at a time."""

    def __init__(self, trainer: Trainer, worker: Worker) -> None:
        self._trainer = trainer
        self._worker = worker
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="snapshot")
        self.begun: Begun | None = None
        self._is_unwanted = False
        """Whether the run whose snapshot is being written has been removed."""

    def begin(self, run: Run) -> None:
        """Capture the run's committed state, and start to write it.

        Call it between a commit and the run's next operation, with a fresh row, while nothing
        else is being written.

        Raises:
            SnapshotFailed: It could not be captured.
        """
        directory = new_name(SNAPSHOTS)
        try:
            captured = self._trainer.capture_adapter(run.id)
        except Exception as error:
            raise SnapshotFailed(str(error)) from error
        self._is_unwanted = False
        self.begun = Begun(
            run_id=run.id,
            seq_id=run.applied_seq_id,
            step=run.step,
            directory=directory,
            writing=self._thread.submit(_timed, [captured], directory),
        )

    def is_over(self) -> bool:
        """Whether ``finish`` need not wait."""
        return self.begun is not None and self.begun.writing.done()

    def wait(self, seconds: float | None = None) -> None:
        """Wait for the snapshot that is being written, if any.

        Args:
            seconds: Since it was begun; None waits as long as it takes.
        """
        if self.begun is not None:
            left = None
            if seconds is not None:
                left = max(self.begun.begun_at + seconds - time.monotonic(), 0.0)
            wait([self.begun.writing], timeout=left)

    def finish(self, *, unreadable: Collection[int] = ()) -> float:
        """Record the written snapshot in a row, and delete those that it replaces.

        A snapshot of a run that was removed meanwhile is deleted. If the database does not
        answer, the call may be repeated.

        Args:
            unreadable: Older snapshots found unreadable; they do not count as kept.

        Returns:
            The seconds it took to write.

        Raises:
            SnapshotFailed: It could not be written, or the run is not leased to this worker any
                more: another one may have changed it since.
        """
        begun = self.begun
        if begun is None:
            raise RuntimeError("no snapshot was begun")
        try:
            size, seconds = begun.writing.result()
        except Exception as error:
            self.begun = None
            raise SnapshotFailed(str(error)) from error
        run = Run.objects.live().filter(id=begun.run_id).first()
        is_wanted = run is not None and not self._is_unwanted
        is_named = is_wanted and self._name(begun, size, seconds)
        if run is not None and is_named:
            self.delete(run, keep=KEPT, unreadable=unreadable)
        else:
            storage().delete(begun.directory)
        self.begun = None
        if is_wanted and not is_named:
            raise SnapshotFailed("the run is not leased to this worker any more")
        return seconds

    def _name(self, begun: Begun, size: int, seconds: float) -> bool:
        """Write the row, replacing an unreadable one of the same seq id, if there is one; return
        False instead if the run is not leased to this worker."""
        with transaction.atomic():
            if not lease_is_held(worker=self._worker, lane_id=begun.run_id):
                return False
            old = Snapshot.objects.filter(run_id=begun.run_id, seq_id=begun.seq_id)
            replaced = set(old.values_list("directory", flat=True)) - {begun.directory}
            old.delete()
            Snapshot.objects.create(
                run_id=begun.run_id,
                seq_id=begun.seq_id,
                step=begun.step,
                directory=begun.directory,
                size_bytes=size,
                write_seconds=seconds,
                epoch=self._worker.pk,
            )
        for directory in replaced:
            storage().delete(directory)
        return True

    def delete_all(self, run: Run) -> None:
        """Delete the snapshots of a run that was removed, including the one that is being
        written."""
        if self.begun is not None and self.begun.run_id == run.id:
            self._is_unwanted = True
        self.delete(run, keep=0)

    def delete(self, run: Run, *, keep: int, unreadable: Collection[int] = ()) -> None:
        """Delete all but the run's newest readable snapshots, files after rows: a crash in
        between leaves files that no row refers to."""
        rows = list(run.snapshots.order_by("-seq_id"))
        readable = [row for row in rows if row.pk not in unreadable]
        for old in set(rows) - set(readable[:keep]):
            old.delete()
            storage().delete(old.directory)


def _timed(captured: list[CapturedAdapter], directory: str) -> tuple[int, float]:
    """Store a captured state, whose memory is let go of before it is uploaded."""
    begin = time.monotonic()
    staged = storage().stage(directory, captured.pop().write)
    staged.store()
    return staged.value, time.monotonic() - begin
