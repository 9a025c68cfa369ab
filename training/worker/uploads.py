"""Saves whose files are on their way to a remote storage.

A save is a barrier: its files are made between two batches, and the outcome is committed when they
are stored. The working thread does not wait for that. Only the save's own lane does, because a
repetition after a crash must save the same state; all others continue. An owner has two
uploads at a time, so their further ones wait for those, and nobody else's do. An owner's further
saves begin when few of theirs are on this machine's disk.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue

from futures.finishing import Outcome
from futures.models import Future
from training.worker.effects import Effects

OF_OWNER = 2
"""Uploads of one owner at a time."""
WAITING_OF_OWNER = 4
"""Saves of one owner whose files are on this machine."""
AT_ONCE = 16
"""Uploads at a time: each takes up to 32 MiB of memory."""


@dataclass(frozen=True)
class Later:
    """An outcome that is known when something else is done, which may take long."""

    work: Callable[[], None]
    """Called in another thread, without a database. A domain error becomes the failure."""
    finish: Callable[[Effects], Outcome]
    """Called after that in the working thread; records the effects that are committed with the
    outcome. A domain error becomes the failure."""


@dataclass(eq=False)
class Upload:
    """One future's ``Later`` in its thread."""

    future: Future
    later: Later
    error: BaseException | None = None
    is_over: threading.Event = field(default_factory=threading.Event)

    def outcome(self, effects: Effects) -> Outcome:
        """The outcome, once it is over; see ``Later``."""
        if self.error is not None:
            raise self.error
        return self.later.finish(effects)


class Uploads:
    """The uploads of a worker."""

    def __init__(self) -> None:
        self._held: dict[str, Upload] = {}
        self._over: SimpleQueue[Upload] = SimpleQueue()
        self._turns: dict[int, threading.Semaphore] = {}
        self._slots = threading.Semaphore(AT_ONCE)

    def __len__(self) -> int:
        return len(self._held)

    @property
    def futures(self) -> list[Future]:
        """Those that are not finished."""
        return [upload.future for upload in self._held.values()]

    def is_full(self, owner_id: int) -> bool:
        """Whether the owner's next save must wait for an earlier one's upload."""
        held = [upload.future.owner_id for upload in self._held.values()]
        return held.count(owner_id) >= WAITING_OF_OWNER

    def begin(self, future: Future, later: Later) -> None:
        """Begin the work of a future."""
        upload = Upload(future, later)
        self._held[future.id] = upload
        turn = self._turns.setdefault(future.owner_id, threading.Semaphore(OF_OWNER))
        # A daemon: the end of the process does not wait for it, and its future is run again.
        threading.Thread(
            target=self._run, args=(upload, turn), name=f"upload {future.id}", daemon=True
        ).start()

    def _run(self, upload: Upload, turn: threading.Semaphore) -> None:
        with turn, self._slots:
            try:
                upload.later.work()
            except BaseException as error:
                upload.error = error
        self._over.put(upload)
        upload.is_over.set()

    def finished(self) -> list[Upload]:
        """Those whose work is done, each once."""
        finished = []
        while True:
            try:
                upload = self._over.get_nowait()
            except Empty:
                break
            if self._held.pop(upload.future.id, None) is not None:
                finished.append(upload)
        if not self._held:
            self._turns.clear()
        return finished

    def wait(self, seconds: float, *, for_all: bool = False) -> None:
        """Wait until one is done, or all are, but not longer than this."""
        deadline = time.monotonic() + seconds
        for upload in list(self._held.values()):
            upload.is_over.wait(max(deadline - time.monotonic(), 0.0))
            if not for_all:
                return

    def withdraw(self) -> list[Future]:
        """Forget all of them, for another worker to run again; return their futures."""
        futures = self.futures
        self._held.clear()
        return futures
