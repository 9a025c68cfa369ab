"""The worst moments for a kill, and how to detect them from outside.

Just after a submission or an answer; during the commit of results, as Postgres's list of
running statements shows; while a snapshot or a checkpoint is half written, as its folder shows, or,
with a bucket, the one in which it is assembled; and during the recovery from the previous kill.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import psycopg

from tinkerapi.drill.server import connect
from tinkerapi.drill.transport import Progress
from training.storage.chosen import CACHE_FOLDER

Moment = Literal["anytime", "submission", "answer", "commit", "snapshot", "checkpoint", "recovery"]

MOMENTS: dict[Moment, float] = {
    "anytime": 0.3,
    "submission": 0.02,
    "answer": 0.01,
    "commit": 0.002,
    "snapshot": 0.002,
    "checkpoint": 0.002,
    "recovery": 5.0,
}
"""Longest time from the moment to the kill, in seconds."""

FOLDERS: dict[Moment, str] = {"snapshot": "snapshots", "checkpoint": "checkpoints"}
WAIT_SECONDS = 5.0  # longest wait for a moment
LOOK_SECONDS = 0.001

# The two statements of a worker's commit that take long enough to be observed.
_COMMITTING = """
SELECT count(*) FROM pg_stat_activity
WHERE datname = current_database() AND state <> 'idle' AND pid <> pg_backend_pid()
AND (query LIKE '%UPDATE futures_future AS f%' OR query LIKE '%UPDATE training_run AS r%')
"""


class Aim:
    """Waits for moments on one server."""

    def __init__(self, data_dir: Path, progress: Progress) -> None:
        self._data_dir = data_dir
        self._progress = progress

    def wait_for(self, moment: Moment) -> bool:
        """Wait for the moment, for a limited time; return whether it came."""
        progress = self._progress
        if moment == "submission":
            submitted = progress.submitted
            return progress.wait_for(lambda: progress.submitted > submitted, WAIT_SECONDS)
        if moment == "answer":
            answered = progress.answered
            return progress.wait_for(lambda: progress.answered > answered, WAIT_SECONDS)
        if moment in FOLDERS:
            folders = (self._data_dir / FOLDERS[moment], self._data_dir / CACHE_FOLDER / "work")
            known = {folder: _names(folder) for folder in folders}
            return self._look(lambda: any(_names(folder) - known[folder] for folder in folders))
        if moment == "commit":
            return self._wait_for_commit()
        return True

    def _wait_for_commit(self) -> bool:
        try:
            with connect(self._data_dir) as connection:
                return self._look(lambda: connection.execute(_COMMITTING).fetchone() != (0,))
        except psycopg.OperationalError:  # Postgres is down; the kill is carried out anyway
            return False

    def _look(self, is_there: Callable[[], bool]) -> bool:
        deadline = time.monotonic() + WAIT_SECONDS
        while time.monotonic() < deadline and not self._progress.is_over:
            if is_there():
                return True
            time.sleep(LOOK_SECONDS)
        return False


def _names(folder: Path) -> set[str]:
    try:
        return set(os.listdir(folder))
    except FileNotFoundError:  # nothing was written yet
        return set()
