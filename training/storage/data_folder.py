"""Folders below the data folder: written beside their place, fsynced, renamed."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, TypeVar

from training.errors import CheckpointNotFound, StorageFailed
from training.storage.interface import INSTALLATION, Staged, Storage, StoredFile, StoredFolder

T = TypeVar("T")


class DataFolder(Storage):
    """A folder of a file system that all processes of the installation see."""

    def __init__(self, root: Path) -> None:
        self._root = root

    @property
    def location(self) -> str:
        return str(self._root)

    def stage(self, directory: str, make: Callable[[Path], T]) -> Staged[T]:
        return Staged(make(self._root / directory))

    @contextmanager
    def local(self, directory: str) -> Iterator[Path]:
        yield self._root / directory

    def files(self, directory: str) -> list[str]:
        try:
            return sorted(path.name for path in (self._root / directory).iterdir())
        except FileNotFoundError:
            raise CheckpointNotFound from None

    def open_all(self, directory: str) -> list[StoredFile]:
        with ExitStack() as opened:
            files = [
                opened.enter_context(self.open(directory, name)) for name in self.files(directory)
            ]
            opened.pop_all()
            return files

    def open(self, directory: str, name: str) -> StoredFile:
        try:
            return _LocalFile(name, (self._root / directory / name).open("rb"))
        except FileNotFoundError:
            raise CheckpointNotFound from None

    def copy(self, source: str, target: str) -> None:
        """Hard-link its files, or copy them where the disk has no links."""
        try:
            shutil.copytree(self._root / source, self._root / target, copy_function=_link_or_copy)
        except (FileNotFoundError, shutil.Error) as error:
            self.delete(target)
            raise CheckpointNotFound from error

    def delete(self, directory: str) -> None:
        shutil.rmtree(self._root / directory, ignore_errors=True)

    def purge(self, directory: str) -> None:
        self.delete(directory)

    def folders(self, area: str) -> Iterator[StoredFolder]:
        parent = self._root / area
        for path in sorted(parent.iterdir()) if parent.is_dir() else []:
            with suppress(FileNotFoundError):  # it was deleted meanwhile
                yield StoredFolder(
                    directory=f"{area}/{path.name}",
                    size_bytes=sum(p.stat().st_size for p in path.rglob("*") if p.is_file()),
                    changed_at=path.stat().st_mtime,
                )

    def installation_id(self, *, make: str | None = None) -> str | None:
        path = self._root / INSTALLATION
        if make is not None and not path.exists():
            temporary = path.with_name(f".{INSTALLATION}.{secrets.token_hex(8)}")
            temporary.write_text(make + "\n")
            try:
                path.hardlink_to(temporary)  # fails if another process was faster
            except FileExistsError:
                pass
            finally:
                temporary.unlink()
        try:
            return path.read_text().strip()
        except FileNotFoundError:
            return None


class _LocalFile(StoredFile):
    """Open from the beginning, so it can be read to its end even if it is deleted meanwhile."""

    def __init__(self, name: str, file: BinaryIO) -> None:
        super().__init__(name, os.fstat(file.fileno()).st_size)
        self._file = file

    def read(self, begin: int, length: int) -> bytes:
        try:
            piece = os.pread(self._file.fileno(), length, begin)
        except OSError as error:
            raise StorageFailed(f"{self.name} cannot be read: {error.strerror}.") from error
        if len(piece) != length:  # a short read of a disk's file means that it was cut
            raise StorageFailed(f"{self.name} is damaged: it ends at byte {begin + len(piece)}.")
        return piece

    def close(self) -> None:
        self._file.close()


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except PermissionError:  # a disk without hard links
        shutil.copyfile(source, target)
