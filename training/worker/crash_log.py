"""What a worker leaves for the next one to judge its end by: did a request do it, or not?

An exception that nobody planned and a fatal signal write into a file of this life. So an empty
file means that nothing in the process went wrong before it was gone: somebody killed it, or the
machine. Only the kernel kills without a word for what a process did itself, when memory is
used up, and it counts that. A database that is away is no request's fault either.
"""

from __future__ import annotations

import faulthandler
import logging
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from django.conf import settings
from django.db import InterfaceError, OperationalError

from futures.errors import Fenced
from futures.models import Worker

logger = logging.getLogger(__name__)

FOLDER = Path("crashes")
"""Below the data folder."""
VMSTAT = Path("/proc/vmstat")
BLAMELESS = (OperationalError, InterfaceError, Fenced)
"""Exceptions that say something of the database and nothing of the requests that ran."""


class CrashLog:
    """This life's file; make it once the worker has its epoch."""

    def __init__(self, worker: Worker) -> None:
        self._path = _path(worker)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        for former in self._path.parent.glob(f"{worker.queue}.*"):
            former.unlink()
        self._file = self._path.open("w")
        faulthandler.enable(self._file)

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Write down what escapes from the block, unless it is no request's fault."""
        try:
            yield
        except BLAMELESS:
            raise
        except BaseException:
            self._file.write(traceback.format_exc())
            self._file.flush()
            raise

    def close(self) -> None:
        """Nothing more to say: the worker ends well."""
        faulthandler.enable()
        self._file.close()
        self._path.unlink()


def crashed(before: Worker) -> bool:
    """Whether the last worker may have ended by what it did; also if there is nothing to tell."""
    try:
        words = _path(before).read_text(errors="replace").strip()
    except OSError:
        return True
    if words:
        logger.error("%s crashed:\n%s", before, words)
        return True
    return bool(before.figures.get("oom_kills") != oom_kills())


def oom_kills() -> int | None:
    """Processes that the kernel has killed for want of memory; None where it does not say."""
    try:
        lines = VMSTAT.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), None)


def _path(worker: Worker) -> Path:
    return Path(settings.DATA_DIR) / FOLDER / f"{worker.queue}.{worker.pk}"
