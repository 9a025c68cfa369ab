"""Files as answers: streamed from the storage in parts, whole or a range, never loaded into memory.

The parts are read in threads, so a slow client blocks nobody. A file is opened before
the answer begins: on a disk, deleting it meanwhile does not break the download. If the storage
breaks it, the connection ends before the announced length is reached, so the client sees it.
"""

from __future__ import annotations

import asyncio
import re
import tarfile
from collections.abc import AsyncIterator, Sequence

from django.http import HttpResponse, HttpResponseBase, StreamingHttpResponse
from rest_framework.request import Request

from tinkerapi.api.threads import storage_executor
from training.storage.interface import StoredFile

PIECE_BYTES = 1024 * 1024

_RANGE = re.compile(r"bytes=(\d*)-(\d*)")


def file_response(request: Request, file: StoredFile, *, etag: str) -> HttpResponseBase:
    """The file, or the requested range of it; it is closed at the end.

    Several ranges at once are answered with the whole file, as RFC 9110 allows.

    Args:
        etag: Names the content; it must change whenever the content does.
    """
    quoted = f'"{etag}"'
    if quoted in request.headers.get("If-None-Match", ""):
        file.close()
        return _with_headers(HttpResponse(status=304), quoted)
    size = file.size_bytes
    begin, end = 0, size
    response: HttpResponseBase
    asked = request.headers.get("Range", "")
    if asked and request.headers.get("If-Range", quoted) == quoted:
        try:
            begin, end = _range(asked, size)
        except ValueError:
            file.close()
            response = HttpResponse(status=416)
            response["Content-Range"] = f"bytes */{size}"
            return _with_headers(response, quoted)
    if request.method == "HEAD":
        file.close()
        response = HttpResponse()
    else:
        response = StreamingHttpResponse(_pieces(file, begin, end - begin))
    if end - begin < size:
        response.status_code = 206
        response["Content-Range"] = f"bytes {begin}-{end - 1}/{size}"
    response["Content-Length"] = str(end - begin)
    return _with_headers(response, quoted)


def tar_response(request: Request, files: Sequence[StoredFile]) -> HttpResponseBase:
    """The files, by their bare names, in one uncompressed tar that is made as it is sent; they are
    closed at the end."""
    members = []
    for file in files:
        entry = tarfile.TarInfo(file.name)
        entry.size = file.size_bytes
        members.append((file, entry.tobuf(), -entry.size % tarfile.BLOCKSIZE))
    end = bytes(2 * tarfile.BLOCKSIZE)

    async def pieces() -> AsyncIterator[bytes]:
        for file, header, padding in members:
            yield header
            async for piece in _pieces(file, 0, file.size_bytes):
                yield piece
            yield bytes(padding)
        yield end

    response: HttpResponseBase
    if request.method == "HEAD":
        for file in files:
            file.close()
        response = HttpResponse()
    else:
        response = StreamingHttpResponse(pieces())
    response["Content-Type"] = "application/x-tar"
    response["Content-Length"] = str(
        sum(len(header) + file.size_bytes + padding for file, header, padding in members) + len(end)
    )
    return response


def _range(asked: str, size: int) -> tuple[int, int]:
    """Begin and end of the requested range; the whole file for an unsupported range.

    Raises:
        ValueError: It lies outside the file.
    """
    match = _RANGE.fullmatch(asked.strip())
    if match is None or match.groups() == ("", ""):
        return 0, size
    first, last = match.groups()
    if first == "":  # a suffix: the number of last bytes
        begin, end = max(size - int(last), 0), size
    else:
        begin, end = int(first), min(int(last) + 1, size) if last else size
    if begin >= end:
        raise ValueError(asked)
    return begin, end


async def _pieces(file: StoredFile, begin: int, length: int) -> AsyncIterator[bytes]:
    loop = asyncio.get_running_loop()
    with file:
        end = begin + length
        while begin < end:
            length = min(PIECE_BYTES, end - begin)
            piece = await loop.run_in_executor(storage_executor, file.read, begin, length)
            begin += len(piece)
            yield piece


def _with_headers(response: HttpResponseBase, etag: str) -> HttpResponseBase:
    response["ETag"] = etag
    response["Accept-Ranges"] = "bytes"
    if "Content-Type" not in response or response.status_code in (200, 206):
        response["Content-Type"] = "application/octet-stream"
    return response
