"""Objects below a prefix of an S3 bucket, by way of fsspec, with limits of time.

Every call is tried three times, each with a time limit, unless the error says that another try is
useless. Large files go in parts of 8 MiB, four at once, each with a limit of its own, so a
transfer of any size ends or goes on. Nothing here waits for longer than FOLDER_SECONDS.

fsspec runs all calls in one thread with an event loop; the calling threads wait for it.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any, TypeVar

from fsspec.asyn import sync

from training.storage.s3_errors import BucketError, ObjectMissing, expected_errors, sentence_of
from training.storage.s3_file_system import s3_file_system

logger = logging.getLogger(__name__)

T = TypeVar("T")

PART_BYTES = 8 * 2**20
CONCURRENCY = 4
ABORT_SECONDS = 5.0
CALL_SECONDS = 25.0
PART_SECONDS = 60.0
"""For one part: 140 KB a second are enough."""
FOLDER_SECONDS = 600.0
"""For one folder, with all repetitions."""
PAUSES = (0.5, 2.0)
"""Between the tries of one call."""
SMALL_BYTES = 2**20


@dataclass(frozen=True, slots=True)
class FoundObject:
    """An object of a listing."""

    key: str
    """Below the prefix."""
    size_bytes: int
    changed_at: float
    """Seconds since 1970."""


class Bucket:
    """The objects below ``s3://BUCKET/PREFIX``; keys here are relative to that.

    Errors of all methods:
        ObjectMissing: There is no such object.
        BucketError: The call failed; its text is a sentence for the operator.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self._root = url.removeprefix("s3://")
        self._lock = Lock()
        self._opened: Any = None

    def _run(self, work: Callable[[Any], Coroutine[Any, Any, T]]) -> T:
        """Run ``work(file system)`` in fsspec's event loop and wait for it."""
        with self._lock:
            if self._opened is None:
                self._opened = s3_file_system()
        result: T = sync(self._opened.loop, work, self._opened)
        return result

    def read(
        self,
        key: str,
        begin: int = 0,
        length: int = SMALL_BYTES,
        *,
        seconds: float = FOLDER_SECONDS,
    ) -> bytes:
        """Up to ``length`` bytes of an object, at least one."""
        return self._run(lambda files: _limited(self._read(files, key, begin, length), seconds))

    def write(self, key: str, content: bytes) -> None:
        """Write a small object."""
        self._run(lambda files: self._try(lambda: files._pipe_file(self._path(key), content)))

    def write_first(self, key: str, content: bytes) -> None:
        """Write a small object unless there is one."""

        async def write(files: Any) -> None:
            path = self._path(key)
            try:
                await self._try(lambda: files._pipe_file(path, content, mode="create"))
            except BucketError as error:
                if isinstance(error.__cause__, FileExistsError):
                    return
                if error.code != "NotImplemented":  # of a server that cannot do it
                    raise
                await self._try(lambda: files._pipe_file(path, content))

        self._run(write)

    def remove(self, key: str) -> None:
        """Delete an object; one that does not exist is no error."""
        self._run(lambda files: self._try(lambda: files._rm_file(self._path(key))))

    def find(self, prefix: str) -> list[FoundObject]:
        """All objects below a prefix that is a folder's name."""
        return self._run(lambda files: self._find(files, prefix))

    def put_folder(self, folder: Path, directory: str, last: Mapping[str, bytes]) -> None:
        """Upload a folder's files, then the small objects ``last``, and see that all are there."""
        paths = sorted(folder.iterdir())
        sizes = {path.name: path.stat().st_size for path in paths}
        sizes |= {name: len(content) for name, content in last.items()}

        async def put(files: Any) -> None:
            slots = asyncio.Semaphore(CONCURRENCY)
            await _together(
                self._put_file(files, slots, path, f"{directory}/{path.name}") for path in paths
            )
            for name, content in last.items():
                key = self._path(f"{directory}/{name}")
                await self._try(lambda: files._pipe_file(key, content))  # noqa: B023
            found = await self._find(files, directory)
            there = {item.key.removeprefix(f"{directory}/"): item.size_bytes for item in found}
            if there != sizes:
                raise BucketError(f"{directory} is incomplete after its upload: {there}")

        self._run(lambda files: _limited(put(files)))

    def get_folder(
        self, directory: str, sizes: Mapping[str, int], folder: Path, seconds: float
    ) -> None:
        """Download files of these sizes into an existing local folder."""

        async def get(files: Any) -> None:
            slots = asyncio.Semaphore(CONCURRENCY)
            await _together(
                self._get_file(files, slots, f"{directory}/{name}", size, folder / name)
                for name, size in sizes.items()
            )

        self._run(lambda files: _limited(get(files), seconds))

    def copy_folder(self, source: str, target: str, names: Iterable[str]) -> None:
        """Copy objects inside the bucket, one after another."""

        async def copy(files: Any) -> None:
            for name in names:
                pair = self._path(f"{source}/{name}"), self._path(f"{target}/{name}")
                await self._try(lambda: files._cp_file(*pair), FOLDER_SECONDS)  # noqa: B023

        self._run(lambda files: _limited(copy(files)))

    def _path(self, key: str) -> str:
        return f"{self._root}/{key}"

    async def _try(self, call: Callable[[], Awaitable[T]], seconds: float | None = None) -> T:
        for pause in (*PAUSES, None):
            try:
                return await asyncio.wait_for(call(), seconds or CALL_SECONDS)
            except FileNotFoundError as error:
                raise _missing(error, self.url) from error
            except expected_errors() as error:
                failure = sentence_of(error, self.url)
                if pause is None or not failure.may_pass:
                    raise failure from error
                logger.debug("%s: another try after: %s", self.url, error)
                await asyncio.sleep(pause)
        raise AssertionError("the last try returns or raises")

    async def _read(self, files: Any, key: str, begin: int, length: int) -> bytes:
        path = self._path(key)
        content: bytes = await self._try(
            lambda: files._cat_file(path, start=begin, end=begin + length), PART_SECONDS
        )
        return content

    async def _find(self, files: Any, prefix: str) -> list[FoundObject]:
        found = await self._try(
            lambda: files._find(self._path(prefix), detail=True), FOLDER_SECONDS
        )
        return [
            FoundObject(
                key=path.removeprefix(f"{self._root}/"),
                size_bytes=info["size"],
                changed_at=info["LastModified"].timestamp(),
            )
            for path, info in sorted(found.items())
        ]

    async def _put_file(self, files: Any, slots: asyncio.Semaphore, local: Path, key: str) -> None:
        path, size = self._path(key), local.stat().st_size
        with local.open("rb") as file:
            if size <= PART_BYTES:
                async with slots:
                    content = file.read()
                    await self._try(lambda: files._pipe_file(path, content), PART_SECONDS)
                return
            bucket, _, name = path.partition("/")
            begun = await self._try(
                lambda: files._call_s3("create_multipart_upload", Bucket=bucket, Key=name)
            )
            upload = {"Bucket": bucket, "Key": name, "UploadId": begun["UploadId"]}

            async def put_part(number: int) -> dict[str, Any]:
                async with slots:
                    part = os.pread(file.fileno(), PART_BYTES, (number - 1) * PART_BYTES)
                    answer = await self._try(
                        lambda: files._call_s3(
                            "upload_part", PartNumber=number, Body=part, **upload
                        ),
                        PART_SECONDS,
                    )
                return {"PartNumber": number, "ETag": answer["ETag"]}

            try:
                numbers = range(1, -(-size // PART_BYTES) + 1)
                parts = await _together(put_part(number) for number in numbers)
                # Missing: an earlier try did it. The listing at the end of the folder decides.
                with suppress(ObjectMissing):
                    await self._try(
                        lambda: files._call_s3(
                            "complete_multipart_upload",
                            MultipartUpload={"Parts": parts},
                            **upload,
                        ),
                        PART_SECONDS,
                    )
            except BaseException:
                with suppress(Exception):  # parts that stay are the bucket's lifecycle rule's
                    abort = files._call_s3("abort_multipart_upload", **upload)
                    await asyncio.wait_for(abort, ABORT_SECONDS)
                raise

    async def _get_file(
        self, files: Any, slots: asyncio.Semaphore, key: str, size: int, local: Path
    ) -> None:
        with local.open("wb") as file:

            async def get_part(begin: int) -> None:
                length = min(PART_BYTES, size - begin)
                async with slots:
                    part = await self._read(files, key, begin, length)
                if len(part) != length:
                    raise ObjectMissing(f"{key} is shorter than it was when it was written")
                os.pwrite(file.fileno(), part, begin)

            await _together(get_part(begin) for begin in range(0, size, PART_BYTES))


def _missing(error: FileNotFoundError, url: str) -> Exception:
    failure = sentence_of(error, url)
    return failure if failure.code == "NoSuchBucket" else ObjectMissing(str(error))


async def _together(works: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """The results of all, in order; the first error cancels the others."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(work) for work in works]
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return [task.result() for task in tasks]


async def _limited(work: Coroutine[Any, Any, T], seconds: float = FOLDER_SECONDS) -> T:
    try:
        return await asyncio.wait_for(work, seconds)
    except TimeoutError as error:
        raise BucketError(f"the transfer took longer than {seconds:.0f} seconds") from error
