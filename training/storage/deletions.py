"""Deletes folders beside other work: nobody waits for a deletion."""

from __future__ import annotations

import atexit
import threading
from collections.abc import Callable
from queue import Empty, SimpleQueue
from threading import Lock

LAST_SECONDS = 10.0
"""Longest wait, at the end of a process, for folders to be deleted."""


class Deletions:
    """Deletes folders one after another, in a thread that starts with the first."""

    def __init__(self, delete: Callable[[str], None]) -> None:
        self._delete = delete
        self._waiting: SimpleQueue[str] = SimpleQueue()
        self._lock = Lock()
        self._thread: threading.Thread | None = None
        atexit.register(self.finish)

    def add(self, directory: str) -> None:
        with self._lock:
            self._waiting.put(directory)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="deletions", daemon=True)
                self._thread.start()

    def _run(self) -> None:
        while True:
            try:
                directory = self._waiting.get_nowait()
            except Empty:
                with self._lock:
                    if self._waiting.empty():
                        self._thread = None
                        return
                continue
            self._delete(directory)

    def finish(self) -> None:
        """Wait for those that were added, but not long."""
        thread = self._thread
        if thread is not None:
            thread.join(LAST_SECONDS)
