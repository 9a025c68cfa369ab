"""A worker's record of a crash, from which the next one decides whether a request caused its end.

An unexpected exception and a fatal signal are written to a file of this worker life. So an empty
file means that the process was ended from outside, by a person or the machine.
There is one exception: the kernel kills without a trace if the process used up
memory, and it counts those kills. A database that is down is no request's fault either.
"""

from __future__ import annotations

import faulthandler
import logging
import socket
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from django.conf import settings
from django.db import InterfaceError, OperationalError

from futures.errors import Fenced
from futures.lost_workers import OPEN
from futures.models import Worker
from training.storage.chosen import storage

logger = logging.getLogger(__name__)

FOLDER = Path("crashes")
"""Below the data folder."""
VMSTAT = Path("/proc/vmstat")
BLAMELESS = (OperationalError, InterfaceError, Fenced)
"""Exceptions that are about the database and not about the requests that ran."""


class CrashLog:
    """The file of this worker life; make it once the worker has its epoch."""

    def __init__(self, worker: Worker) -> None:
        self._path = crash_file(worker)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._path.open("w")
        faulthandler.enable(self._file)

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Record an exception that leaves the block, unless it is no request's fault."""
        try:
            yield
        except BLAMELESS:
            raise
        except BaseException:
            self._file.write(traceback.format_exc())
            self._file.flush()
            raise

    def close(self) -> None:
        """Close the log: the worker ends cleanly."""
        faulthandler.enable()
        self._file.close()
        self._path.unlink()


def crashed(before: Worker) -> bool:
    """Whether a worker that has ended may have crashed because of its work; True if unknown.

    A worker of another machine that wrote nothing, or whose data folder is its own, counts as ended
    from outside: if it crashed, its supervisor has judged it before.
    """
    is_elsewhere = before.hostname != socket.gethostname()
    try:
        words = crash_file(before).read_text(errors="replace").strip()
    except OSError:
        return not (is_elsewhere and storage().is_remote)
    if words:
        logger.error("%s crashed:\n%s", before, words)
        return True
    if is_elsewhere:  # whose kernel's count is unknown here
        return False
    return bool(before.figures.get("oom_kills") != oom_kills())


def oom_kills() -> int | None:
    """Processes that the kernel has killed for lack of memory; None if it does not report them."""
    try:
        lines = VMSTAT.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), None)


def crash_file(worker: Worker) -> Path:
    """The file of a worker's life; it exists while it lives, and until its end is judged."""
    return Path(settings.DATA_DIR) / FOLDER / f"{worker.queue}.{worker.pk}"


def remove_judged(queue: str) -> None:
    """Remove the files of the queue's workers whose lives are over; whoever ended them has read
    them."""
    living = Worker.objects.filter(queue=queue, state__in=OPEN)
    needed = {crash_file(worker) for worker in living}
    for path in (Path(settings.DATA_DIR) / FOLDER).glob(f"{queue}.*"):
        if path not in needed:
            path.unlink(missing_ok=True)
