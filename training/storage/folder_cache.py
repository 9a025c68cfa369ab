"""Folders of a remote storage on this machine's disk, the least recently used deleted first.

Several processes share the cache. A lock (flock) on the folder itself tells others that it is in
use, and ends with its process, however that ends:

- a reader holds a shared lock, so a folder that is read is not deleted;
- a folder gets its name by a rename when it is complete;
- what a process assembles is in a working folder that it has locked, so one that can be locked by
  others was left behind by a process that has died, and is deleted.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from training.storage.interface import AREAS

WORK = "work"
YOUNG_SECONDS = 60.0
"""A working folder may be this young without its lock: it was made a moment ago."""


class WorkFolder:
    """A locked folder to assemble a folder in."""

    def __init__(self, parent: Path) -> None:
        parent.mkdir(parents=True, exist_ok=True)
        self.path = Path(tempfile.mkdtemp(dir=parent))
        self._descriptor = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
        fcntl.flock(self._descriptor, fcntl.LOCK_SH)

    def remove(self) -> None:
        """Delete it with all that is left in it."""
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._descriptor)


class FolderCache:
    """The cache at one path, with a limit of bytes that only folders in use exceed."""

    def __init__(self, root: Path, limit_bytes: int) -> None:
        self._root = root
        self._limit_bytes = limit_bytes

    def work_folder(self) -> WorkFolder:
        """An empty folder on the cache's disk; remove it."""
        return WorkFolder(self._root / WORK)

    def has(self, directory: str) -> bool:
        """Whether the folder is here now."""
        return (self._root / directory).is_dir()

    @contextmanager
    def reading(self, directory: str) -> Iterator[Path | None]:
        """The folder, which stays until the end of the block; None if it is not here."""
        path = self._root / directory
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:
            yield None
            return
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH)
            if _is_at(descriptor, path):
                os.utime(path)
                yield path
            else:
                yield None  # it was deleted before it could be locked
        finally:
            os.close(descriptor)

    def adopt(self, folder: Path, directory: str) -> None:
        """Move a complete folder into the cache, unless another process was faster."""
        target = self._root / directory
        target.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileExistsError, OSError):
            folder.rename(target)

    def drop(self, directory: str) -> None:
        """Delete a folder, unless it is being read."""
        self._delete(self._root / directory)

    def trim(self) -> None:
        """Delete what exceeds the limit, and what dead processes have left."""
        for path in _listing(self._root / WORK):
            with suppress(FileNotFoundError):
                if path.stat().st_mtime < time.time() - YOUNG_SECONDS:
                    self._delete(path)
        folders = [path for area in AREAS for path in _listing(self._root / area)]
        sizes: dict[Path, tuple[float, int]] = {}
        for path in folders:
            with suppress(FileNotFoundError):
                used_at = path.stat().st_mtime
                sizes[path] = used_at, sum(file.stat().st_size for file in path.iterdir())
        total = sum(size for _, size in sizes.values())
        for path, (_, size) in sorted(sizes.items(), key=lambda item: item[1][0]):
            if total <= self._limit_bytes:
                return
            if self._delete(path):
                total -= size

    def _delete(self, path: Path) -> bool:
        """Delete a folder that nobody has locked; return whether it is gone."""
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
        except FileNotFoundError:
            return True
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not _is_at(descriptor, path):
                return True
            work = self.work_folder()
            try:
                path.rename(work.path / "deleted")
            finally:
                work.remove()
        except BlockingIOError:
            return False
        finally:
            os.close(descriptor)
        return True


def _listing(parent: Path) -> list[Path]:
    return list(parent.iterdir()) if parent.is_dir() else []


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether the open folder is still the one at this path."""
    try:
        there = path.stat()
    except FileNotFoundError:
        return False
    here = os.fstat(descriptor)
    return (here.st_dev, here.st_ino) == (there.st_dev, there.st_ino)
