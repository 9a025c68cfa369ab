"""The free space of the data folder's disk over the last days, and when it will be full.

``up`` notes the free bytes every hour in a file of the data folder, so the history needs no
database and survives restarts. The forecast uses the median growth of 24 hours: one for each note
of the last week that has a note of a day before. A single large download, or a clean-up, is in a
seventh of them, so it does not move the median far.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from statistics import median

FILE = "disk_history"
EVERY_SECONDS = 3600.0
KEPT_SECONDS = 8 * 86400.0
COUNTED_SECONDS = 7 * 86400.0
"""Older notes do not count."""
DAY_SECONDS = 86400.0
LONGEST_DAY_SECONDS = 2 * DAY_SECONDS
"""Notes further apart, because the server was off, say nothing of a day."""
FARTHEST = timedelta(days=365)


@dataclass(frozen=True)
class Note:
    """The disk at one time."""

    at: float
    """Seconds since 1970."""
    free_bytes: int


def disk_note(folder: Path, *, now: float | None = None) -> None:
    """Note the free bytes if the last note is an hour old. Errors are ignored: a full disk takes no
    notes."""
    now = time.time() if now is None else now
    file = folder / FILE
    try:
        notes = [note for note in disk_history(folder) if 0 <= now - note.at < KEPT_SECONDS]
        if notes and now - notes[-1].at < EVERY_SECONDS:
            return
        notes.append(Note(now, shutil.disk_usage(folder).free))
        new = file.with_name(f"{FILE}.new")
        new.write_text("".join(f"{note.at:.0f} {note.free_bytes}\n" for note in notes))
        new.replace(file)
    except OSError:
        return


def disk_history(folder: Path) -> list[Note]:
    """The notes, the oldest first; without those that cannot be read."""
    try:
        lines = (folder / FILE).read_text(errors="replace").splitlines()
    except OSError:
        return []
    found = []
    for line in lines:
        at, _, free = line.partition(" ")
        if at.isdecimal() and free.isdecimal():
            found.append(Note(float(at), int(free)))
    return sorted(found, key=lambda note: note.at)


def full_in(notes: Sequence[Note], *, free_bytes: int, now: float) -> timedelta | None:
    """The time until the disk is full at the growth of the last week.

    Args:
        notes: The oldest first.
        free_bytes: Now.

    Returns:
        None if no two notes are a day apart, if the use does not grow, and if it would take
        more than a year.
    """
    counted = [note for note in notes if 0 <= now - note.at <= COUNTED_SECONDS]
    growth, place = [], 0
    for late in counted:
        while place + 1 < len(counted) and late.at - counted[place + 1].at >= DAY_SECONDS:
            place += 1
        early = counted[place]
        if DAY_SECONDS <= late.at - early.at <= LONGEST_DAY_SECONDS:
            growth.append((early.free_bytes - late.free_bytes) / (late.at - early.at))
    per_second = median(growth) if growth else 0.0
    if per_second <= 0 or free_bytes / per_second > FARTHEST.total_seconds():
        return None
    return timedelta(seconds=free_bytes / per_second)
