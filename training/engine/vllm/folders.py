"""The folders of one sampler's versions, and those that dead samplers have left.

vLLM's engine dies if it needs an adapter whose files are gone: it drops the least recently used one
from memory and reads it again when a request names it. So a folder is written once, under a path
and a name that are never used again, and is deleted only when no request can name it any more
(``server_link``). Several samplers may use one server; each owns a folder, holds its lock as long
as it lives, and deletes nothing of others that live.
"""

from __future__ import annotations

import secrets
import shutil
from itertools import count
from pathlib import Path

from training.own_folders import OwnFolder, left_behind


class VersionFolders:
    """One sampler's folders, in a folder that is locked while the process lives."""

    def __init__(self, root: Path) -> None:
        """``root``: of all samplers of a base model; made if missing."""
        self.owner = secrets.token_hex(6)
        """Part of every name that this sampler gives to a server."""
        self._root = root
        self._own = OwnFolder(root, self.owner, mode=0o755)  # a server may have another user
        self._numbers = count(1)

    def new(self) -> Path:
        """A path that does not exist and was never given out. Its ``name`` names the adapter at the
        server, too."""
        return self._own.path / f"{self.owner}-{next(self._numbers)}"

    def remove(self, folder: Path) -> None:
        """Delete a version's folder, with what there is of it."""
        shutil.rmtree(folder, ignore_errors=True)

    def abandoned(self) -> list[Path]:
        """The folders of samplers that live no more."""
        return left_behind(self._root)

    def unlock(self) -> None:
        """Leave the folders to others, as the end of the process does: the server may still have
        requests that need them."""
        self._own.unlock()
