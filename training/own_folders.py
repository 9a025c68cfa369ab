"""Folders that belong to one process while it lives, and those that dead processes have left.

The file ``lock`` of such a folder is locked (flock) by its process, and the lock ends with the
process, however that ends. So whoever can lock the file knows that the folder is a leftover. A
folder without the file belongs to somebody else, and is left alone.
"""

from __future__ import annotations

import fcntl
import logging
import os
import secrets
import shutil
import stat
import tempfile
import time
from functools import cache
from multiprocessing.util import Finalize
from pathlib import Path

logger = logging.getLogger(__name__)

LOCK_NAME = "lock"
PREFIX = "tinkerapi-process-"
"""Begins the names of processes' temporary folders."""
YOUNG_SECONDS = 60.0
"""A hidden folder may be this young without its lock: it was made a moment ago."""


LAST = -1000
"""Among what multiprocessing does at the end of the process."""


class OwnFolder:
    """A new folder that is locked while this process lives."""

    def __init__(self, root: Path, name: str, *, mode: int = 0o700) -> None:
        """
        Args:
            root: Made if missing.
            name: Never used there before.
            mode: Who may read it; default: its user only.
        """
        self.path = root / name
        hidden = root / f".{name}"  # until it is locked, others would take it for a leftover
        root.mkdir(parents=True, exist_ok=True)
        hidden.mkdir(mode=mode)
        self._lock = _locked(hidden / LOCK_NAME, flags=os.O_RDWR | os.O_CREAT)
        hidden.rename(self.path)

    def unlock(self) -> None:
        """Leave it to others, as the end of the process does."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def remove(self) -> None:
        """Delete it with all that is in it."""
        shutil.rmtree(self.path, ignore_errors=True)
        self.unlock()


def left_behind(root: Path, prefix: str = "") -> list[Path]:
    """The folders of this user's processes that live no more, with names that begin so."""
    return [
        path
        for path in root.iterdir()
        if path.name.removeprefix(".").startswith(prefix) and _is_left(path)
    ]


@cache
def process_folder() -> Path:
    """This process's own temporary folder, which is removed at its end.

    The first call also removes those that killed processes have left.
    """
    root = Path(tempfile.gettempdir())
    folder = OwnFolder(root, f"{PREFIX}{secrets.token_hex(8)}")
    # After multiprocessing has removed its own folder, which may be in this one.
    Finalize(None, folder.remove, exitpriority=LAST)
    for leftover in left_behind(root, PREFIX):
        shutil.rmtree(leftover, ignore_errors=True)
    return folder.path


def _is_left(path: Path) -> bool:
    try:
        state = path.lstat()
    except FileNotFoundError:
        return False
    if not stat.S_ISDIR(state.st_mode) or state.st_uid != os.geteuid():
        return False
    if path.name.startswith(".") and state.st_mtime > time.time() - YOUNG_SECONDS:
        return False
    lock = _locked(path / LOCK_NAME, flags=os.O_RDWR)
    if lock is None:
        return False
    os.close(lock)
    return True


def _locked(path: Path, *, flags: int) -> int | None:
    """The descriptor of a file that this process has locked; None if another has, or if there is
    none, or if it cannot be asked."""
    try:
        descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except FileNotFoundError:
        return None
    except OSError as error:
        logger.warning("%s: %s", path, error.strerror)
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor
