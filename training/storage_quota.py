"""The storage that one user takes on disk and in the database, and its limit.

``TINKERAPI_USER_STORAGE_BYTES`` limits checkpoints, snapshots, and stored requests:
payloads and results, custom losses, recorded samples. The sizes of files are summed at each check,
from two indexed tables. The size of requests needs all of a user's rows, so a process sums it at
most once a minute (and never spends more than a twentieth of its time on it), and adds the requests
that it accepts meanwhile. So a user may exceed the limit by requests that other processes accept in
a minute, and by results of running requests.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from threading import Lock

from django.conf import settings
from django.db.models import Sum
from django.template.defaultfilters import filesizeformat

from futures.database import execute
from futures.models import Future
from futures.payload import EncodedPayload
from training.errors import StorageQuotaExceeded
from training.models import Checkpoint, Snapshot

COUNT_AGAIN_SECONDS = 60.0
TIMES_ITS_COST = 20

# Postgres knows the length of a value that is stored out of line without reading it.
_REQUEST_BYTES = """
SELECT (
    SELECT coalesce(sum(coalesce(octet_length(payload), 0) + coalesce(octet_length(result), 0)), 0)
    FROM futures_future WHERE owner_id = %(owner_id)s
) + (
    SELECT coalesce(sum(octet_length(data)), 0)
    FROM training_recordedsample JOIN training_session AS s ON s.id = session_id
    WHERE s.owner_id = %(owner_id)s
) + (
    SELECT coalesce(sum(pg_column_size(graph)), 0)
    FROM training_customloss JOIN training_session AS s ON s.id = session_id
    WHERE s.owner_id = %(owner_id)s
)
"""


@dataclass(frozen=True)
class StorageUse:
    """Bytes by kind of object."""

    checkpoints: int
    snapshots: int
    requests: int
    """Requests with their results, custom losses and recorded samples."""

    @property
    def total(self) -> int:
        return self.checkpoints + self.snapshots + self.requests

    def __str__(self) -> str:
        return (
            f"{_size(self.total)}: checkpoints {_size(self.checkpoints)}, snapshots of models "
            f"{_size(self.snapshots)}, requests with their results {_size(self.requests)}"
        )


def storage_use(owner_id: int) -> StorageUse:
    """A user's current storage; requests as last counted by this process."""
    checkpoints = Checkpoint.objects.filter(owner_id=owner_id)
    snapshots = Snapshot.objects.filter(run__owner_id=owner_id)
    return StorageUse(
        checkpoints=checkpoints.aggregate(size=Sum("size_bytes"))["size"] or 0,
        snapshots=snapshots.aggregate(size=Sum("size_bytes"))["size"] or 0,
        requests=_counts.get(owner_id),
    )


def storage_check(*, owner_id: int, more_bytes: int, freed_bytes: int = 0) -> None:
    """Refuse data that would exceed the owner's limit, if there is one.

    Args:
        more_bytes: The bytes to be stored.
        freed_bytes: The bytes that are freed by it.

    Raises:
        StorageQuotaExceeded: The message says what uses how much, and what to do. (413)
    """
    limit = settings.USER_STORAGE_BYTES
    if not limit:
        return
    use = storage_use(owner_id)
    if use.total - freed_bytes + more_bytes <= limit:
        return
    raise StorageQuotaExceeded(
        f"this takes {_size(more_bytes)}, and of the {_size(limit)} that one user may take you "
        f"take {use}. Delete "
        "checkpoints, or remove models; requests go after "
        f"{settings.KEEP_RESULTS_DAYS} days, when the server's owner prunes them."
    )


def storage_reserve(*, owner_id: int, more_bytes: int) -> None:
    """Refuse requests of this size if they would exceed the owner's limit; else count them.

    Raises:
        StorageQuotaExceeded: (413)
    """
    storage_check(owner_id=owner_id, more_bytes=more_bytes)
    _counts.add(owner_id, more_bytes)


def storage_admit(
    encoded: EncodedPayload,
    *,
    owner_id: int,
    lane_id: str | None,
    seq_id: int | None,
    idempotency_key: str | None,
) -> None:
    """Refuse a request that would exceed the owner's limit, unless it was accepted before.

    Raises:
        StorageQuotaExceeded: (413)
    """
    if not settings.USER_STORAGE_BYTES:
        return
    try:
        storage_check(owner_id=owner_id, more_bytes=len(encoded.data))
    except StorageQuotaExceeded:
        of_owner = Future.objects.filter(owner_id=owner_id)
        is_numbered = seq_id is not None and lane_id is not None
        if is_numbered and of_owner.filter(lane_id=lane_id, seq_id=seq_id).exists():
            return
        if idempotency_key and of_owner.filter(idempotency_key=idempotency_key).exists():
            return
        raise
    _counts.add(owner_id, len(encoded.data))


class _RequestBytes:
    """The sums of this process, shared by its threads."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._known: dict[int, tuple[int, float]] = {}
        """Owner to bytes, and the time until which they are valid."""

    def get(self, owner_id: int) -> int:
        with self._lock:
            known = self._known.get(owner_id)
        if known is not None and time.monotonic() < known[1]:
            return known[0]
        begin = time.monotonic()
        [(counted,)] = execute(_REQUEST_BYTES, {"owner_id": owner_id})
        now = time.monotonic()
        until = now + max(COUNT_AGAIN_SECONDS, TIMES_ITS_COST * (now - begin))
        with self._lock:
            self._known[owner_id] = (int(counted), until)
        return int(counted)

    def add(self, owner_id: int, size_bytes: int) -> None:
        with self._lock:
            if owner_id in self._known:
                known, until = self._known[owner_id]
                self._known[owner_id] = (known + size_bytes, until)

    def clear(self) -> None:
        with self._lock:
            self._known.clear()


_counts = _RequestBytes()


def forget_counts() -> None:
    """Count again at the next check."""
    _counts.clear()


def _size(size_bytes: int) -> str:
    return filesizeformat(size_bytes).replace("\xa0", " ")
