"""Protects the data folder from other users of the machine: it has prompts, weights and keys.

New files are private because every process of ours has a umask (``settings``). Files that an older
version left readable are made private here, once, by the next ``up``.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

OTHERS = stat.S_IRWXG | stat.S_IRWXO

OURS = frozenset(
    (
        *("checkpoints", "crashes", "installation", "logs", "models", "postgres", "secret_key"),
        *("snapshots", "static", "storage_cache"),
    )
)
"""The contents of a data folder; hidden files and ``up.*`` too."""


def folder_close(data_dir: Path) -> str | None:
    """Make our files in the data folder private to this user; return a remark if that
    changed anything or is not possible.

    The folder itself is only closed if it has no other files: it may be a home folder, or /tmp.
    Symbolic links are not followed, and Postgres protects its own cluster.
    """
    try:
        entries = sorted(data_dir.iterdir())
        changed = 0
        for entry in entries:
            # The top folder comes last, so that the next call repeats an interrupted one.
            if _is_ours(entry) and _is_open(entry):
                changed += sum(map(_close, [*_below(entry), entry]))
        if not _is_open(data_dir):
            return _changes(changed, data_dir)
        if not all(map(_is_ours, entries)):
            return f"{data_dir} has other files too, so its list of names stays readable"
        return _changes(changed + _close(data_dir), data_dir)
    except OSError as error:
        return f"{error.filename} can be read by other users of this machine: {error.strerror}"


def _changes(changed: int, data_dir: Path) -> str | None:
    return f"{data_dir} is now closed to other users ({changed} changed)" if changed else None


def _is_ours(entry: Path) -> bool:
    return entry.name in OURS or entry.name.startswith((".", "up."))


def _is_open(path: Path) -> bool:
    mode = path.lstat().st_mode
    return not stat.S_ISLNK(mode) and bool(mode & OTHERS)


def _close(path: Path) -> int:
    """1 if that changed the permissions."""
    if not _is_open(path):
        return 0
    path.chmod(stat.S_IMODE(path.lstat().st_mode) & ~OTHERS)
    return 1


def _below(entry: Path) -> Iterator[Path]:
    """All files and folders below, contents before their folder."""
    if entry.is_symlink() or not entry.is_dir():
        return
    for folder, _, files in os.walk(entry, topdown=False):
        here = Path(folder)
        if entry.name == "postgres" and here != entry:
            continue
        yield from (here / name for name in files)
        if here != entry:
            yield here
