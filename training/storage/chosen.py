"""The storage that the settings name."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from django.conf import settings

from training.storage.data_folder import DataFolder
from training.storage.interface import Storage


def storage() -> Storage:
    """The installation's storage."""
    return _storage(Path(settings.DATA_DIR))


@cache
def _storage(data_dir: Path) -> Storage:
    return DataFolder(data_dir)
