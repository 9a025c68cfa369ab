"""Fetches files from a remote storage before a future needs them, while others run.

A future waits, and with it its lane, until the folders that it reads are on this machine: the
checkpoint that it loads or samples from, or the newest snapshot of a run that is not in memory. If
the storage does not answer, this tries again for PATIENCE_SECONDS, and then lets the future run,
and fail.

Few folders are fetched at once, and few of one owner, so that many do not take all memory, nor push
each other out of the cache, and no owner waits for another one's.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from futures.models import Future
from training.errors import StorageFailed, StorageFull, TrainingError
from training.kinds import CreateRun, Kind, LoadWeights, Sample
from training.models import Checkpoint, Snapshot
from training.storage.chosen import storage
from training.worker.requests import request_of

logger = logging.getLogger(__name__)

PATIENCE_SECONDS = 300.0
AGAIN_SECONDS = 5.0
"""Between two tries."""
FAILED_SECONDS = 60.0
"""How long a folder that could not be fetched is not asked for again."""
MOST, MOST_OF_OWNER = 16, 4
"""Folders that are being fetched, or have arrived and were not used yet."""
UNUSED_SECONDS = 60.0
"""After this, a folder that has arrived does not count as one: its future was cancelled."""
KNOWN_FUTURES = 10_000


@dataclass(eq=False)
class _Fetch:
    """The tries to fetch one folder."""

    owner_id: int
    begun_at: float
    over: threading.Event
    error: TrainingError | None = None
    again_at: float = 0.0

    def is_left(self) -> bool:
        """Whether nobody has asked for it since it was over."""
        return self.over.is_set() and time.monotonic() > self.again_at + UNUSED_SECONDS


class Fetches:
    """The fetches of a worker."""

    def __init__(self, is_resident: Callable[[str], bool]) -> None:
        """``is_resident``: whether a run's adapter, or a version of weights, is in memory."""
        self._is_resident = is_resident
        self._fetches: dict[str, _Fetch] = {}
        self._needed: dict[str, list[str]] = {}
        """The folders of each future that was asked about."""

    def are_needed(self, future: Future) -> bool:
        """Whether the future must wait for files; begins to fetch them."""
        if not storage().is_remote:
            return False
        if len(self._needed) >= KNOWN_FUTURES:
            self._needed.clear()
        if future.id not in self._needed:
            self._needed[future.id] = self._folders_of(future)
        awaited = [self._is_awaited(name, future.owner_id) for name in self._needed[future.id]]
        return any(awaited)

    @property
    def are_pending(self) -> bool:
        """Whether something is being fetched, or will be tried again."""
        asked_since = time.monotonic() - 2 * AGAIN_SECONDS
        return any(
            self._is_pending(fetch)
            for fetch in self._fetches.values()
            if not fetch.over.is_set() or fetch.again_at > asked_since
        )

    def _folders_of(self, future: Future) -> list[str]:
        if future.lane_id is not None and self._is_resident(future.lane_id):
            snapshots = []
        else:
            newest = Snapshot.objects.filter(run_id=future.lane_id).order_by("-seq_id")
            snapshots = list(newest.values_list("directory", flat=True)[:1])
        checkpoint = None
        if future.kind in (Kind.CREATE_RUN, Kind.LOAD_WEIGHTS, Kind.SAMPLE):
            checkpoint = _checkpoint_of(future)
        if checkpoint is None or self._is_resident(f"checkpoint:{checkpoint}"):
            return snapshots
        rows = Checkpoint.objects.filter(pk=checkpoint)
        return [*snapshots, *rows.values_list("directory", flat=True)]

    def _is_awaited(self, directory: str, owner_id: int) -> bool:
        fetch = self._fetches.get(directory)
        if fetch is None:
            if storage().is_here(directory):
                return False
            if self._may_begin(owner_id):
                fetch = _Fetch(owner_id, time.monotonic(), threading.Event())
                self._fetches[directory] = fetch
                self._begin(directory, fetch)
            return True
        if not self._is_pending(fetch):
            if fetch.error is None or time.monotonic() > fetch.again_at + FAILED_SECONDS:
                del self._fetches[directory]
            return False
        if fetch.over.is_set() and time.monotonic() >= fetch.again_at:
            fetch.over.clear()
            self._begin(directory, fetch)
        return True

    def _may_begin(self, owner_id: int) -> bool:
        for directory, fetch in list(self._fetches.items()):
            if fetch.is_left():
                del self._fetches[directory]
        owners = [fetch.owner_id for fetch in self._fetches.values()]
        return len(owners) < MOST and owners.count(owner_id) < MOST_OF_OWNER

    def _is_pending(self, fetch: _Fetch) -> bool:
        if not fetch.over.is_set():
            return True
        may_pass = isinstance(fetch.error, StorageFailed | StorageFull)
        return may_pass and time.monotonic() < fetch.begun_at + PATIENCE_SECONDS

    def _begin(self, directory: str, fetch: _Fetch) -> None:
        def bring() -> None:
            fetch.error = None
            try:
                storage().bring(directory)
            except TrainingError as error:
                fetch.error = error
            except Exception:  # the working thread meets it again, and decides
                logger.exception("%s could not be fetched", directory)
            fetch.again_at = time.monotonic() + AGAIN_SECONDS
            fetch.over.set()

        threading.Thread(target=bring, name=f"fetch {directory}", daemon=True).start()


def _checkpoint_of(future: Future) -> int | None:
    """The checkpoint whose files the future reads."""
    request = request_of(future)
    if isinstance(request, Sample | LoadWeights):
        return request.checkpoint
    if isinstance(request, CreateRun):
        return request.upload if request.source is None else request.source.checkpoint
    return None
