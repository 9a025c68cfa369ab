"""Takes named files out of an archive that a stranger made: .zip, .tar or .tar.gz.

Nothing is written but the wanted files, under their own names. Every byte that is read or unpacked
counts towards a limit, and so do the members, so an archive that unpacks to more than it should is
refused before it fills memory or disk. A member whose path leaves the archive is refused, whether
it is wanted or not.
"""

from __future__ import annotations

import gzip
import io
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import IO, cast

from tinkerapi.api.bodies.bounded import PIECE_BYTES, copy_bounded
from training.errors import InvalidRequest, LimitExceeded

ARCHIVE_TYPES = ("application/zip", "application/gzip", "application/x-gzip", "application/x-tar")
"""Content types of archives; what an archive is, its first bytes decide."""

MAX_MEMBERS = 500
MAX_DIRECTORY_BYTES = 1024 * 1024
"""Of a zip's list of members, which is read at once."""
_ZIP, _ZIP_EMPTY, _GZIP = b"PK\x03\x04", b"PK\x05\x06", b"\x1f\x8b"


def take_files(
    archive: IO[bytes], names: Sequence[str], directory: Path, *, max_bytes: int, field: str
) -> None:
    """Write the archive's files of these names into a folder.

    They may lie in one folder of the archive; files of other names are not written.

    Args:
        archive: Seekable, at its beginning.
        max_bytes: Limit of all unpacked bytes.
        field: The sender's name of the archive.

    Raises:
        InvalidRequest: It is no such archive, is damaged, or has a name twice. (400)
        LimitExceeded: It unpacks to more. (400)
    """
    begin = archive.read(4)
    archive.seek(0)
    try:
        if begin in (_ZIP, _ZIP_EMPTY):
            members = _zip_members(archive, names, field)
        else:
            is_gzip = begin[:2] == _GZIP
            stream = cast(IO[bytes], gzip.GzipFile(fileobj=archive)) if is_gzip else archive
            members = _tar_members(
                cast(IO[bytes], _Bounded(stream, max_bytes, field)), names, field
            )
        taken: dict[str, str] = {}
        left = max_bytes
        for path, content in members:
            name = path.name
            if name in taken:
                raise InvalidRequest(
                    f"{field}: holds {taken[name]!r} and {str(path)!r:.200}; send one adapter"
                )
            taken[name] = str(path)[:200]
            left -= _copy(content, directory / name, left, field)
    except (
        tarfile.TarError,
        zipfile.BadZipFile,
        zlib.error,
        EOFError,
        gzip.BadGzipFile,
        NotImplementedError,
        RecursionError,
        ValueError,
    ) as error:
        raise InvalidRequest(
            f"{field}: expected a .zip, .tar or .tar.gz file that is complete: {str(error)[:100]}"
        ) from None


def _zip_members(
    archive: IO[bytes], names: Sequence[str], field: str
) -> Iterator[tuple[PurePosixPath, IO[bytes]]]:
    _check_zip_directory(archive, field)
    with zipfile.ZipFile(archive) as unpacked:
        for info in unpacked.infolist():
            path = _checked_path(info.filename, field)
            if path.name not in names or info.is_dir():
                continue
            mode = info.external_attr >> 16
            if mode and not stat.S_ISREG(mode) and stat.S_IFMT(mode):
                raise _not_a_file(info.filename, field)
            if info.flag_bits & 1:
                raise InvalidRequest(f"{field}: {info.filename[:200]!r} is encrypted")
            if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise InvalidRequest(
                    f"{field}: {info.filename[:200]!r} is compressed in a way that is not read "
                    "here; expected deflate"
                )
            with unpacked.open(info) as content:
                yield path, content


def _check_zip_directory(archive: IO[bytes], field: str) -> None:
    """Refuse a long list of members before it is read into memory."""
    size = archive.seek(0, io.SEEK_END)
    archive.seek(max(0, size - 65557))  # the end record, behind a comment of up to 65535 bytes
    tail = archive.read()
    archive.seek(0)
    at = tail.rfind(_ZIP_EMPTY)
    if at < 0 or len(tail) - at < 22:
        raise zipfile.BadZipFile("it has no list of members")
    members = int.from_bytes(tail[at + 10 : at + 12], "little")
    directory_bytes = int.from_bytes(tail[at + 12 : at + 16], "little")
    if tail[max(0, at - 20) : at].startswith(b"PK\x06\x07"):
        raise InvalidRequest(f"{field}: is a zip of more than 4 GB, which is not read here")
    if members > MAX_MEMBERS or directory_bytes > MAX_DIRECTORY_BYTES:
        raise LimitExceeded(f"{field}: has more than {MAX_MEMBERS} members")


def _tar_members(
    stream: IO[bytes], names: Sequence[str], field: str
) -> Iterator[tuple[PurePosixPath, IO[bytes]]]:
    with tarfile.open(fileobj=stream, mode="r:") as unpacked:
        for number, info in enumerate(unpacked):
            if number >= MAX_MEMBERS:
                raise LimitExceeded(f"{field}: has more than {MAX_MEMBERS} members")
            path = _checked_path(info.name, field)
            if path.name not in names or info.isdir():
                continue
            content = unpacked.extractfile(info) if info.isreg() and not info.sparse else None
            if content is None:
                raise _not_a_file(info.name, field)
            yield path, content


def _checked_path(name: str, field: str) -> PurePosixPath:
    path = PurePosixPath(name.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts:
        raise InvalidRequest(f"{field}: {name[:200]!r} leaves the archive")
    return path


def _not_a_file(name: str, field: str) -> InvalidRequest:
    return InvalidRequest(f"{field}: {name[:200]!r} is a link or a device; expected a file")


def _copy(content: IO[bytes], path: Path, left: int, field: str) -> int:
    """Write the content; return its bytes, at most ``left``."""
    with path.open("wb") as file:
        return copy_bounded(content, file, max_bytes=left, too_large=partial(_too_much, field))


def _too_much(field: str) -> LimitExceeded:
    return LimitExceeded(
        f"{field}: unpacks to more than this server takes (TINKERAPI_MAX_IMPORT_BYTES)"
    )


class _Bounded(io.RawIOBase):
    """A stream that is read forwards, in small parts, up to a limit.

    ``tarfile`` reads the extended header of a member at once, whatever its size, and keeps it.
    """

    def __init__(self, stream: IO[bytes], limit: int, field: str) -> None:
        super().__init__()
        self._stream = stream
        self._left = limit
        self._field = field
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= 2 * PIECE_BYTES:
            raise InvalidRequest(f"{self._field}: a member has an oversized header")
        piece = self._stream.read(size)
        self._at += len(piece)
        self._left -= len(piece)
        if self._left < 0:
            raise _too_much(self._field)
        return piece

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        if whence != io.SEEK_SET or offset < self._at:
            raise tarfile.ReadError("it is not a tar")
        while self._at < offset:
            if not self.read(min(PIECE_BYTES, offset - self._at)):
                raise tarfile.ReadError("it is cut off")
        return self._at
