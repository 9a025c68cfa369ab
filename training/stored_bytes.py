"""What is stored: bytes by kind, user, run and table of the database.

Sizes of files come from their rows, which are few. Of the database the tables' sizes are read,
which cost the same at any number of rows; whose rows take how much is ``training.storage_quota``'s.
"""

from __future__ import annotations

from dataclasses import dataclass

from django.contrib.auth import get_user_model
from django.db.models import Count, Sum

from futures.database import execute
from training.models import Checkpoint, Run, Snapshot

_FILES = """
WITH files AS (
    SELECT c.run_id, c.owner_id, c.size_bytes, 1 AS is_checkpoint FROM training_checkpoint AS c
    UNION ALL
    SELECT s.run_id, r.owner_id, s.size_bytes, 0
    FROM training_snapshot AS s JOIN training_run AS r ON r.id = s.run_id
)
SELECT {key}, coalesce(sum(size_bytes) FILTER (WHERE is_checkpoint = 1), 0)::bigint,
    coalesce(sum(size_bytes) FILTER (WHERE is_checkpoint = 0), 0)::bigint,
    sum(is_checkpoint)::bigint
FROM files WHERE %(owner_id)s::int IS NULL OR owner_id = %(owner_id)s
GROUP BY {key} ORDER BY sum(size_bytes) DESC, {key} LIMIT %(limit)s
"""

_TABLES = """
SELECT c.relname, pg_total_relation_size(c.oid)
FROM pg_class AS c JOIN pg_namespace AS n ON n.oid = c.relnamespace
WHERE c.relkind = 'r' AND n.nspname = current_schema()
ORDER BY 2 DESC LIMIT %(limit)s
"""


@dataclass(frozen=True, kw_only=True)
class Files:
    """The files of a user or a run."""

    checkpoints: int
    """Bytes, also of those without a path."""
    snapshots: int
    """Bytes."""
    count: int
    """Of checkpoints."""

    @property
    def total(self) -> int:
        return self.checkpoints + self.snapshots


def bytes_by_kind(owner_id: int | None) -> list[tuple[str, int, int]]:
    """Kind in words, number of objects, and bytes."""
    checkpoints, snapshots = Checkpoint.objects.all(), Snapshot.objects.all()
    if owner_id is not None:
        checkpoints = checkpoints.filter(owner_id=owner_id)
        snapshots = snapshots.filter(run__owner_id=owner_id)
    rows = checkpoints.order_by().values("ephemeral", "kind")
    found = {
        "frozen weights of sampling sessions" if ephemeral else f"{kind} checkpoints": (
            number,
            size,
        )
        for ephemeral, kind, number, size in rows.annotate(
            number=Count("pk"), size=Sum("size_bytes")
        ).values_list("ephemeral", "kind", "number", "size")
    }
    of_runs = snapshots.aggregate(number=Count("pk"), size=Sum("size_bytes"))
    found["snapshots of live models"] = of_runs["number"], of_runs["size"] or 0
    return sorted(
        ((kind, number, size) for kind, (number, size) in found.items()),
        key=lambda row: (-row[2], row[0]),
    )


def bytes_by_owner(*, limit: int) -> list[tuple[int, str, Files]]:
    """Id, name and files, the largest first."""
    rows = _files("owner_id", None, limit)
    users = get_user_model().objects.in_bulk([int(key) for key, _ in rows])
    return [(int(key), users[int(key)].get_username(), files) for key, files in rows]


def bytes_by_run(owner_id: int | None, *, limit: int) -> list[tuple[Run, Files]]:
    """Runs and their files, the largest first; removed ones too, whose checkpoints stay."""
    rows = _files("run_id", owner_id, limit)
    runs = Run.objects.select_related("owner", "session").in_bulk([str(key) for key, _ in rows])
    return [(runs[str(key)], files) for key, files in rows if str(key) in runs]


def _files(key: str, owner_id: int | None, limit: int) -> list[tuple[int | str, Files]]:
    rows = execute(_FILES.format(key=key), {"owner_id": owner_id, "limit": limit})
    return [
        (value, Files(checkpoints=int(saved), snapshots=int(taken), count=int(number)))
        for value, saved, taken, number in rows
    ]


def bytes_by_table(*, limit: int) -> list[tuple[str, int]]:
    """The largest tables of the database with their indexes."""
    return [(str(name), int(size)) for name, size in execute(_TABLES, {"limit": limit})]
