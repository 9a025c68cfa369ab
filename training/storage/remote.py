"""Folders in an S3 bucket.

A folder's files are objects below its name. The last object written is its table of contents
(``FILES``), with the size and the SHA-256 of each file: without it, the folder does not exist.
Object stores cannot rename, so a new folder is made on this machine first, then uploaded under its
final name, which was never used before, then listed to see that all is there. A folder that is read
is downloaded whole, checked against its table, and kept for a while (``folder_cache``).

Folders are deleted by a thread, so nobody waits for it. What a crash leaves behind is found by
``folders``.
"""

from __future__ import annotations

import hashlib
import json
import logging
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TypeVar

from training.atomic_directory import NO_SPACE, new_directory
from training.errors import CheckpointNotFound, StorageFailed, StorageFull
from training.storage.bucket import FOLDER_SECONDS, Bucket
from training.storage.deletions import Deletions
from training.storage.folder_cache import FolderCache, WorkFolder
from training.storage.interface import INSTALLATION, Staged, Storage, StoredFile, StoredFolder
from training.storage.remote_file import RemoteFile
from training.storage.s3_errors import BucketError, ObjectMissing

logger = logging.getLogger(__name__)

T = TypeVar("T")

FILES = "files.json"
PROBES = "probes"
LOCAL_SECONDS = 60.0
"""Longest wait of ``local`` for a folder that nobody has brought before."""
FAILED_SECONDS = 30.0
"""How long ``local`` repeats the error of the last download, instead of trying again."""
KNOWN_FAILURES = 1000
MISSES = 3
"""How often a folder may leave the cache between its download and its use."""


class RemoteFolders(Storage):
    """See the module's docstring."""

    def __init__(self, url: str, cache: FolderCache, *, most_wait_seconds: float) -> None:
        self._url = url
        self._bucket = Bucket(url)
        self._cache = cache
        self._local_seconds = min(LOCAL_SECONDS, most_wait_seconds)
        self._deletions = Deletions(self.purge)
        self._failures: dict[str, tuple[float, str]] = {}
        """When a folder could not be downloaded, and why."""

    @property
    def location(self) -> str:
        return self._url

    @property
    def is_remote(self) -> bool:
        return True

    def stage(self, directory: str, make: Callable[[Path], T]) -> Staged[T]:
        work = self._work_folder()
        try:
            value = make(work.path / "folder")
        except BaseException:
            work.remove()
            raise
        return _StagedFolder(value, work, lambda folder: self._upload(folder, directory))

    def _work_folder(self) -> WorkFolder:
        try:
            return self._cache.work_folder()
        except OSError as error:
            raise _of_disk(error) from error

    def _upload(self, folder: Path, directory: str) -> None:
        table = {
            path.name: {"size": path.stat().st_size, "sha256": _sha256(path)}
            for path in sorted(folder.iterdir())
        }
        content = json.dumps({"files": table}, indent=2).encode() + b"\n"
        try:
            with self._asking("stored"):
                self._bucket.put_folder(folder, directory, {FILES: content})
        except (StorageFailed, StorageFull):
            self.delete(directory)
            raise
        self._cache.adopt(folder, directory)
        self._cache.trim()

    @contextmanager
    def local(self, directory: str) -> Iterator[Path]:
        try:
            with self._reading(directory) as path:
                yield path
        except CheckpointNotFound:
            self._cache.drop(directory)  # if it is only damaged here, the next reader gets it again
            raise

    @contextmanager
    def _reading(self, directory: str) -> Iterator[Path]:
        for attempt in range(MISSES):
            with self._cache.reading(directory) as path:
                if path is not None:
                    if attempt:
                        self._cache.trim()  # now it is locked
                    yield path
                    return
            failed_at, failure = self._failures.get(directory, (0.0, ""))
            if failure and time.monotonic() < failed_at + FAILED_SECONDS:
                raise StorageFailed(failure)
            self._download(directory, self._local_seconds)
        raise StorageFailed("The storage's cache is too small for what is read at once.")

    def bring(self, directory: str) -> None:
        if not self._cache.has(directory):
            self._download(directory, FOLDER_SECONDS)
        with self._cache.reading(directory):
            self._cache.trim()

    def _download(self, directory: str, seconds: float) -> None:
        try:
            self._download_whole(directory, seconds)
        except StorageFailed as error:
            if len(self._failures) >= KNOWN_FAILURES:
                self._failures.clear()
            self._failures[directory] = time.monotonic(), str(error)
            raise
        self._failures.pop(directory, None)

    def _download_whole(self, directory: str, seconds: float) -> None:
        begin = time.monotonic()
        table = self._table(directory, seconds)
        work = self._work_folder()
        try:
            with new_directory(work.path / "folder") as folder:
                sizes = {name: size for name, (size, _) in table.items()}
                with self._asking("read"):
                    left = begin + seconds - time.monotonic()
                    self._bucket.get_folder(directory, sizes, folder, left)
                for name, (_, sha256) in table.items():
                    if _sha256(folder / name) != sha256:
                        raise CheckpointNotFound(f"{directory}/{name} is damaged.")
            self._cache.adopt(work.path / "folder", directory)
        except OSError as error:
            raise _of_disk(error) from error
        finally:
            work.remove()

    def is_here(self, directory: str) -> bool:
        return self._cache.has(directory)

    def _table(self, directory: str, seconds: float = FOLDER_SECONDS) -> dict[str, tuple[int, str]]:
        """The folder's files: size and SHA-256 by name, in order.

        Raises:
            CheckpointNotFound, StorageFailed: See ``local``.
        """
        with self._asking("read"):
            content = self._bucket.read(f"{directory}/{FILES}", seconds=seconds)
        try:
            table = json.loads(content)["files"]
            return {name: (int(table[name]["size"]), table[name]["sha256"]) for name in table}
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointNotFound(f"{directory}/{FILES} is damaged.") from error

    def files(self, directory: str) -> list[str]:
        return list(self._table(directory))

    def open_all(self, directory: str) -> list[StoredFile]:
        return [
            self._opened(directory, name, size)
            for name, (size, _) in self._table(directory).items()
        ]

    def open(self, directory: str, name: str) -> StoredFile:
        table = self._table(directory)
        if name not in table:
            raise CheckpointNotFound
        return self._opened(directory, name, table[name][0])

    def _opened(self, directory: str, name: str, size: int) -> StoredFile:
        return RemoteFile(name, size, partial(self._read, directory, name))

    def _read(self, directory: str, name: str, begin: int, length: int) -> bytes:
        try:
            with self._asking("read"):
                return self._bucket.read(f"{directory}/{name}", begin, length)
        except CheckpointNotFound as error:
            raise StorageFailed(f"{name} was deleted while it was read.") from error

    def copy(self, source: str, target: str) -> None:
        names = [*self._table(source), FILES]
        try:
            with self._asking("copied"):
                self._bucket.copy_folder(source, target, names)
        except (CheckpointNotFound, StorageFailed, StorageFull):
            self.delete(target)
            raise

    def delete(self, directory: str) -> None:
        self._cache.drop(directory)
        self._deletions.add(directory)

    def purge(self, directory: str) -> None:
        self._cache.drop(directory)
        try:
            self._bucket.remove(f"{directory}/{FILES}")  # from here on it does not exist
            for item in self._bucket.find(directory):
                self._bucket.remove(item.key)
        except (BucketError, ObjectMissing) as error:
            logger.warning("%s stays in the storage until sweepfiles: %s", directory, error)

    def folders(self, area: str) -> Iterator[StoredFolder]:
        with self._asking("listed"):
            found = self._bucket.find(area)
        sizes: dict[str, int] = {}
        changed: dict[str, float] = {}
        for item in found:
            *parts, _ = item.key.split("/")
            if len(parts) != 2:
                continue  # not ours: a folder has files only
            directory = "/".join(parts)
            sizes[directory] = sizes.get(directory, 0) + item.size_bytes
            changed[directory] = max(changed.get(directory, 0.0), item.changed_at)
        for directory in sizes:
            yield StoredFolder(directory, sizes[directory], changed[directory])

    def problem(self) -> str | None:
        key, content = f"{PROBES}/{secrets.token_hex(16)}", secrets.token_bytes(64)
        try:
            self._bucket.write(key, content)
            if self._bucket.read(key) != content:
                return f"{self._url}: what was written there reads differently"
            if [item.key for item in self._bucket.find(key)] != [key]:
                return f"{self._url}: what was written there is not listed"
            self._bucket.remove(key)
        except ObjectMissing:
            return f"{self._url}: what was written there cannot be found"
        except BucketError as error:
            return str(error)
        return None

    def installation_id(self, *, make: str | None = None) -> str | None:
        with self._asking("read"):
            for is_last in (False, True):
                with suppress(ObjectMissing):
                    return self._bucket.read(INSTALLATION).decode().strip()
                if is_last or make is None:
                    return None
                self._bucket.write_first(INSTALLATION, f"{make}\n".encode())
        return None

    def close(self) -> None:
        """Wait a while for the folders that are being deleted."""
        self._deletions.finish()

    @contextmanager
    def _asking(self, verb: str) -> Iterator[None]:
        """Errors of the bucket as those of a storage; what only concerns the operator is logged."""
        try:
            yield
        except ObjectMissing as error:
            raise CheckpointNotFound(f"The files are missing in the storage ({error}).") from error
        except BucketError as error:
            logger.warning("%s", error)
            if error.is_full:
                raise StorageFull(
                    "The server's storage is full; delete checkpoints, or ask its owner for room, "
                    "and send the request again."
                ) from error
            raise StorageFailed(
                f"The server's storage does not answer, so nothing was {verb}; send the request "
                "again."
            ) from error


class _StagedFolder(Staged[T]):
    def __init__(self, value: T, work: WorkFolder, upload: Callable[[Path], None]) -> None:
        super().__init__(value, is_stored=False)
        self._work = work
        self._upload = upload

    def store(self) -> None:
        try:
            self._upload(self._work.path / "folder")
        finally:
            self._work.remove()
        self.is_stored = True

    def discard(self) -> None:
        self._work.remove()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _of_disk(error: OSError) -> StorageFull | StorageFailed:
    if error.errno in NO_SPACE:
        return StorageFull()
    return StorageFailed(f"The data folder cannot be written: {error.strerror}.")
