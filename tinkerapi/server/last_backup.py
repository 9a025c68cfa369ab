"""When this data folder was backed up last: a file in it, so that it needs no database."""

from __future__ import annotations

from datetime import UTC, datetime

from django.conf import settings

FILE = "last_backup"


def last_backup_record(made_at: datetime) -> None:
    """Remember a complete backup. It is not part of a backup, so a restored folder has none."""
    file = settings.DATA_DIR / FILE
    new = file.with_name(f"{FILE}.new")
    new.write_text(made_at.astimezone(UTC).isoformat(timespec="seconds") + "\n")
    new.replace(file)


def last_backup_at() -> datetime | None:
    """When the last backup was made; None if there was none, or if the file cannot be read."""
    try:
        moment = datetime.fromisoformat((settings.DATA_DIR / FILE).read_text().strip())
    except (OSError, ValueError):
        return None
    return moment if moment.tzinfo is not None else None
