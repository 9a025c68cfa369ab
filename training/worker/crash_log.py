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

logger = logging.getLogger(__name__)

FOLDER = Path("crashes")
"""Below the data folder."""
VMSTAT = Path("/proc/vmstat")
BLAMELESS = (OperationalError, InterfaceError, Fenced)
"""Exceptions that are about the database and not about the requests that ran."""


class CrashLog:
    """The file of this worker life; make it once the worker has its epoch."""

    def __init__(self, worker: Worker) -> None:
        self._path = _path(worker)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        _remove_old(worker)
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

    A worker of another machine that wrote nothing counts as ended from outside.
    """
    try:
        words = _path(before).read_text(errors="replace").strip()
    except OSError:
        return True
    if words:
        logger.error("%s crashed:\n%s", before, words)
        return True
    if before.hostname != socket.gethostname():  # whose kernel's count is unknown here
        return False
    return bool(before.figures.get("oom_kills") != oom_kills())


def oom_kills() -> int | None:
    """Processes that the kernel has killed for lack of memory; None if it does not report them."""
    try:
        lines = VMSTAT.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), None)


def _path(worker: Worker) -> Path:
    return Path(settings.DATA_DIR) / FOLDER / f"{worker.queue}.{worker.pk}"


def _remove_old(worker: Worker) -> None:
    """Remove the files of the queue's workers whose lives are over, and judged."""
    living = Worker.objects.filter(queue=worker.queue, state__in=OPEN)
    needed = {_path(other) for other in living}
    for path in _path(worker).parent.glob(f"{worker.queue}.*"):
        if path not in needed:
            path.unlink(missing_ok=True)
