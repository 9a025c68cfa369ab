"""What a storage of folders does."""

from __future__ import annotations

import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Generic, TypeVar

T = TypeVar("T")

CHECKPOINTS, SNAPSHOTS = "checkpoints", "snapshots"
AREAS = (CHECKPOINTS, SNAPSHOTS)
"""The first part of each folder's name."""


INSTALLATION = "installation"
"""The file or object beside the areas whose content is the installation's id."""


def new_name(area: str) -> str:
    """A name for a new folder, never given before: ``checkpoints/<32 hex digits>``."""
    return f"{area}/{uuid.uuid4().hex}"


@dataclass(frozen=True, slots=True)
class StoredFolder:
    """A folder in the storage, named by a row or not."""

    directory: str
    """Its name, as rows have it."""
    size_bytes: int
    changed_at: float
    """Seconds since 1970."""


class StoredFile(ABC):
    """A file of a stored folder, open for reading; close it, or use it in a ``with``.

    What it reads is complete even if its folder is deleted meanwhile, or reading fails.
    """

    def __init__(self, name: str, size_bytes: int) -> None:
        self.name = name
        """Without its folder."""
        self.size_bytes = size_bytes

    @abstractmethod
    def read(self, begin: int, length: int) -> bytes:
        """Exactly ``length`` bytes from ``begin`` on, both within the file. Any thread may call it.

        Raises:
            StorageFailed: They cannot be read.
        """

    @abstractmethod
    def close(self) -> None:
        """Let go of it."""

    def __enter__(self) -> StoredFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class Staged(Generic[T]):
    """A folder that is complete on this machine, and perhaps not in the storage yet."""

    def __init__(self, value: T, *, is_stored: bool = True) -> None:
        self.value = value
        """What making it returned."""
        self.is_stored = is_stored

    def store(self) -> None:
        """Bring it to the storage, which may take long; any thread may do it. Once.

        Raises:
            StorageFull, StorageFailed: Nothing is left on this machine, and nothing in the storage
                that would be taken for a complete folder.
        """

    def discard(self) -> None:
        """Remove it from this machine, instead of storing it."""


class Storage(ABC):
    """Folders of files under names such as ``checkpoints/<id>``.

    All processes of an installation use one storage. Any thread may call any method.
    """

    @property
    @abstractmethod
    def location(self) -> str:
        """Where it is, for people."""

    @property
    def is_remote(self) -> bool:
        """Whether folders come and go over a network, so that a caller should not wait for it while
        others wait for the caller."""
        return False

    @abstractmethod
    def stage(self, directory: str, make: Callable[[Path], T]) -> Staged[T]:
        """Make a new folder on this machine's disk.

        Args:
            make: Called with a path that does not exist; makes a complete folder there or raises
                (``training.atomic_directory``). It may use hidden siblings of that path.

        Raises:
            StorageFull, StorageFailed: Nothing is left behind.
        """

    def write(self, directory: str, make: Callable[[Path], T]) -> T:
        """Make a new folder and store it; return what ``make`` returned. See ``stage``."""
        staged = self.stage(directory, make)
        staged.store()
        return staged.value

    @abstractmethod
    def local(self, directory: str) -> AbstractContextManager[Path]:
        """The folder as one on this machine's disk, inside a ``with``. Nothing may change it, and
        after the block it may be gone.

        Raises:
            CheckpointNotFound: There is no such folder. A storage on a disk does not look: reading
                its files finds it.
            StorageFull: This machine has no room for it.
            StorageFailed: The storage does not answer.
        """

    def bring(self, directory: str) -> None:
        """Do now what makes ``local`` slow, and raise what it raises."""
        with self.local(directory):
            pass

    def is_here(self, directory: str) -> bool:
        """Whether ``local`` is quick."""
        return True

    @abstractmethod
    def files(self, directory: str) -> list[str]:
        """The names of a folder's files, in order.

        Raises:
            CheckpointNotFound, StorageFailed: See ``local``.
        """

    @abstractmethod
    def open_all(self, directory: str) -> list[StoredFile]:
        """Open all files of a folder, in the order of their names.

        Raises:
            CheckpointNotFound, StorageFailed: See ``local``.
        """

    @abstractmethod
    def open(self, directory: str, name: str) -> StoredFile:
        """Open a file of a folder.

        Raises:
            CheckpointNotFound, StorageFailed: See ``local``.
        """

    @abstractmethod
    def copy(self, source: str, target: str) -> None:
        """Give a folder's content a second name; either may be deleted without the other.

        Raises:
            CheckpointNotFound, StorageFull, StorageFailed: Nothing is left under the new name.
        """

    @abstractmethod
    def delete(self, directory: str) -> None:
        """Delete a folder that no row names any more. Never fails: what cannot be deleted is found
        by ``folders`` later."""

    @abstractmethod
    def folders(self, area: str) -> Iterator[StoredFolder]:
        """All folders of an area, also unfinished ones.

        Raises:
            StorageFailed: The storage does not answer.
        """

    @abstractmethod
    def purge(self, directory: str) -> None:
        """Delete a folder that ``folders`` found, and wait for it. Never fails."""

    def problem(self) -> str | None:
        """Why it cannot be used, as a sentence for the operator, after writing, reading and
        deleting an object; None if it can."""
        return None

    @abstractmethod
    def installation_id(self, *, make: str | None = None) -> str | None:
        """The id of the installation that this storage belongs to.

        Args:
            make: The one to write if there is none; of several at once, one is first.

        Returns:
            The one that is there now; None if there is none and none is to be made.

        Raises:
            StorageFailed: The storage does not answer.
        """
