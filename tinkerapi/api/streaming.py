"""Files as answers: streamed from disk in parts, whole or a range, never loaded into memory.

The parts are read in threads, so a slow client blocks nobody. A file is opened before
the answer begins: deleting it meanwhile does not break the download.
"""

from __future__ import annotations

import asyncio
import re
import tarfile
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import BinaryIO

from django.http import HttpResponse, HttpResponseBase, StreamingHttpResponse
from rest_framework.request import Request

PIECE_BYTES = 1024 * 1024

_RANGE = re.compile(r"bytes=(\d*)-(\d*)")


def file_response(request: Request, path: Path, *, etag: str) -> HttpResponseBase:
    """The file, or the requested range of it.

    Several ranges at once are answered with the whole file, as RFC 9110 allows.

    Args:
        etag: Names the content; it must change whenever the content does.

    Raises:
        FileNotFoundError: There is no such file.
    """
    quoted = f'"{etag}"'
    if quoted in request.headers.get("If-None-Match", ""):
        return _with_headers(HttpResponse(status=304), quoted)
    file = path.open("rb")
    size = path.stat().st_size
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


def tar_response(request: Request, paths: Sequence[Path]) -> HttpResponseBase:
    """The files, by their bare names, in one uncompressed tar that is made as it is sent.

    Raises:
        FileNotFoundError: One of them does not exist.
    """
    members = []
    for path in paths:
        entry = tarfile.TarInfo(path.name)
        entry.size = path.stat().st_size
        members.append((path, entry.tobuf(), entry.size, -entry.size % tarfile.BLOCKSIZE))
    end = bytes(2 * tarfile.BLOCKSIZE)

    async def pieces(files: Sequence[BinaryIO]) -> AsyncIterator[bytes]:
        for file, (_, header, size, padding) in zip(files, members, strict=True):
            yield header
            async for piece in _pieces(file, 0, size):
                yield piece
            yield bytes(padding)
        yield end

    response: HttpResponseBase
    if request.method == "HEAD":
        response = HttpResponse()
    else:
        response = StreamingHttpResponse(pieces([path.open("rb") for path in paths]))
    response["Content-Type"] = "application/x-tar"
    response["Content-Length"] = str(
        sum(len(header) + size + padding for _, header, size, padding in members) + len(end)
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


async def _pieces(file: BinaryIO, begin: int, length: int) -> AsyncIterator[bytes]:
    with file:
        file.seek(begin)
        while length > 0:
            piece = await asyncio.to_thread(file.read, min(PIECE_BYTES, length))
            if not piece:
                return  # truncated on disk: the client sees that Content-Length is not reached
            length -= len(piece)
            yield piece


def _with_headers(response: HttpResponseBase, etag: str) -> HttpResponseBase:
    response["ETag"] = etag
    response["Accept-Ranges"] = "bytes"
    if "Content-Type" not in response or response.status_code in (200, 206):
        response["Content-Type"] = "application/octet-stream"
    return response
