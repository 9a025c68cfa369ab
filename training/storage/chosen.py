"""The storage that the settings name."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

from django.conf import settings

from training.storage.data_folder import DataFolder
from training.storage.interface import Storage

CACHE_FOLDER = "storage_cache"
"""Below the data folder."""


def storage() -> Storage:
    """The installation's storage."""
    return storage_at(settings.STORAGE, Path(settings.DATA_DIR))


def storage_at(url: str, data_dir: Path) -> Storage:
    """The storage of an installation: its bucket, or without one its data folder."""
    return _storage(
        url,
        data_dir,
        settings.STORAGE_CACHE_BYTES,
        settings.HANG_SECONDS / 2,
        os.getpid(),
    )


@cache
def _storage(url: str, data_dir: Path, cache_bytes: int, most_wait: float, pid: int) -> Storage:
    """
    Args:
        most_wait: Seconds that the working thread may wait without being taken for hung.
        pid: A process does not use what another one has opened before it was forked.
    """
    if not url:
        return DataFolder(data_dir)
    from training.storage.folder_cache import FolderCache
    from training.storage.remote import RemoteFolders

    cache = FolderCache(data_dir / CACHE_FOLDER, cache_bytes)
    return RemoteFolders(url, cache, most_wait_seconds=most_wait)
