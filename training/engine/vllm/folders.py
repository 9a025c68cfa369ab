"""The folders of one sampler's versions, and those that dead samplers have left.

vLLM's engine dies if it needs an adapter whose files are gone: it drops the least recently used one
from memory and reads it again when a request names it. So a folder is written once, under a path
and a name that are never used again, and is deleted only when no request can name it any more
(``server_link``). Several samplers may use one server; each owns a folder, holds its lock as long
as it lives, and deletes nothing of others that live.
"""

from __future__ import annotations

import fcntl
import logging
import os
import secrets
import shutil
from itertools import count
from pathlib import Path

logger = logging.getLogger(__name__)

LOCK_NAME = "lock"


class VersionFolders:
    """One sampler's folders, in a folder that is locked while the process lives."""

    def __init__(self, root: Path) -> None:
        """``root``: of all samplers of a base model; made if missing."""
        self.owner = secrets.token_hex(6)
        """Part of every name that this sampler gives to a server."""
        self._root = root
        self._own = root / self.owner
        hidden = root / f".{self.owner}"  # until it is locked, others would take it for abandoned
        hidden.mkdir(parents=True)
        self._lock = _locked(hidden / LOCK_NAME)
        hidden.rename(self._own)
        self._numbers = count(1)

    def new(self) -> Path:
        """A path that does not exist and was never given out. Its ``name`` names the adapter at the
        server, too."""
        return self._own / f"{self.owner}-{next(self._numbers)}"

    def remove(self, folder: Path) -> None:
        """Delete a version's folder, with what there is of it."""
        shutil.rmtree(folder, ignore_errors=True)

    def abandoned(self) -> list[Path]:
        """The folders of samplers that live no more."""
        found = []
        for folder in self._root.iterdir():
            if folder == self._own or folder.name.startswith(".") or not folder.is_dir():
                continue
            lock = _locked(folder / LOCK_NAME)
            if lock is not None:
                os.close(lock)
                found.append(folder)
        return found

    def unlock(self) -> None:
        """Leave the folders to others, as the end of the process does: the server may still have
        requests that need them."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def _locked(path: Path) -> int | None:
    """The descriptor of a file that this process has locked; None if another has, or if it cannot
    be asked."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        logger.warning("%s: %s", path, error.strerror)
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor
