"""A directory on disk that is complete or absent, with a readable ``meta.json`` of checksums.

Files are written into a temporary sibling, fsynced, and the sibling is renamed. The caller decides
the contents of the files.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from training.errors import CheckpointExists, CheckpointNotFound, StorageFailed, StorageFull

META_NAME = "meta.json"
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@contextmanager
def new_directory(directory: Path) -> Iterator[Path]:
    """Yield a temporary directory that becomes ``directory`` when the block ends without an error.

    If the block raises, nothing is left behind. Parent directories are made.

    Raises:
        CheckpointExists: ``directory`` exists; it is not touched.
        StorageFull: The disk or the quota is full.
        StorageFailed: It cannot be written for another reason.
    """
    if directory.exists():
        raise CheckpointExists(f"{directory.name} already exists.")
    temporary = None
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
        yield temporary
        for path in [*temporary.iterdir(), temporary]:
            _fsync(path)
        os.rename(temporary, directory)
        _fsync(directory.parent)
    except OSError as error:
        if error.errno in NO_SPACE:
            raise StorageFull from error
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            raise CheckpointExists(f"{directory.name} already exists.") from error
        raise StorageFailed(f"The data folder cannot be written: {error.strerror}.") from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def write_meta(directory: Path, meta: Mapping[str, Any]) -> int:
    """Write ``meta.json``: ``meta``, and the SHA-256 of it and of every file there already.

    Returns:
        Bytes of all files in the directory.
    """
    files = sorted(path for path in directory.iterdir() if path.is_file())
    digests = {META_NAME: _meta_sha256(meta), **{path.name: _sha256(path) for path in files}}
    content = {**meta, "sha256": digests}
    (directory / META_NAME).write_text(json.dumps(content, indent=2) + "\n")
    return sum(path.stat().st_size for path in directory.iterdir())


def read_meta(directory: Path) -> dict[str, Any]:
    """``meta.json`` of a directory, after checking that every file is unchanged.

    Raises:
        CheckpointNotFound: The directory does not exist or cannot be read, or a checksum does
            not match.
    """
    try:
        meta: dict[str, Any] = json.loads((directory / META_NAME).read_text())
        for name, digest in meta["sha256"].items():
            if name == META_NAME:
                found = _meta_sha256({key: meta[key] for key in meta if key != "sha256"})
            else:
                found = _sha256(directory / name)
            if found != digest:
                raise CheckpointNotFound(f"{directory.name}/{name} is damaged: checksum differs.")
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CheckpointNotFound(f"No checkpoint at {directory.name}.") from error
    except OSError as error:
        raise CheckpointNotFound(f"{directory.name} cannot be read: {error.strerror}.") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointNotFound(f"{directory.name}/{META_NAME} is damaged.") from error
    return meta


def _meta_sha256(meta: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
