"""An S3 server that refuses, stalls, breaks off or forgets: the error is said, no half remains."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from pytest_django import Settings

from tests.storage.faulty_proxy import FaultyProxy
from tests.storage.s3_server import S3Server
from tests.storage.test_folders import empty_the_cache, folder_of, read_all
from training.errors import CheckpointNotFound, StorageFailed, StorageFull
from training.storage import bucket
from training.storage.chosen import storage
from training.storage.interface import CHECKPOINTS, new_name
from training.storage.remote import FILES, RemoteFolders

LARGE = {"weights": bytes(range(256)) * 48 * 1024, "other": b"x" * 3000}
"""Of 12 MiB: two parts of 5 and one of 2."""


def left(place: RemoteFolders) -> list[str]:
    """The folders that count as written, after what is to be deleted was."""
    place.close()
    return [folder.directory for folder in place.folders(CHECKPOINTS)]


def test_a_large_file_goes_in_parts_and_comes_back(
    place: RemoteFolders, small_parts: None, settings: Settings
) -> None:
    directory = new_name(CHECKPOINTS)
    place.write(directory, folder_of(LARGE))
    empty_the_cache(settings)
    assert read_all(place, directory) == LARGE
    with place.open(directory, "weights") as file:
        assert file.read(11 * 2**20, 2**20) == LARGE["weights"][11 * 2**20 :]


@pytest.mark.parametrize("fault", ["refuse", "stall", "cut"])
def test_an_upload_that_breaks_fails_and_leaves_no_folder(
    place: RemoteFolders, line: FaultyProxy, small_parts: None, hasty: None, fault: str
) -> None:
    staged = place.stage(new_name(CHECKPOINTS), folder_of(LARGE))
    if fault == "refuse":
        line.refuse()
    elif fault == "stall":
        line.stall("up", after_bytes=4 * 2**20)
    else:
        line.cut("up", after_bytes=4 * 2**20)
    with pytest.raises(StorageFailed, match="nothing was stored; send the request again"):
        staged.store()
    assert line.faults
    assert not staged.is_stored
    line.recover()
    assert left(place) == []


def test_an_upload_that_breaks_once_is_repeated(
    place: RemoteFolders,
    line: FaultyProxy,
    small_parts: None,
    monkeypatch: pytest.MonkeyPatch,
    settings: Settings,
) -> None:
    monkeypatch.setattr(bucket, "PAUSES", (0.0, 0.0))
    staged = place.stage(directory := new_name(CHECKPOINTS), folder_of(LARGE))
    cuts = iter([True, False])
    allowed = line._allowed

    def cut_once(direction: str, size: int) -> int:
        if direction == "up" and size > 30_000 and next(cuts, False):
            return 100
        return allowed(direction, size)

    monkeypatch.setattr(line, "_allowed", cut_once)
    staged.store()
    assert line.faults == 1
    empty_the_cache(settings)
    assert read_all(place, directory) == LARGE


@pytest.mark.parametrize("fault", ["refuse", "stall", "cut"])
def test_a_download_that_breaks_fails_and_a_repeat_succeeds(
    place: RemoteFolders,
    line: FaultyProxy,
    small_parts: None,
    hasty: None,
    settings: Settings,
    fault: str,
) -> None:
    place.write(directory := new_name(CHECKPOINTS), folder_of(LARGE))
    empty_the_cache(settings)
    file = place.open(directory, "weights")
    if fault == "refuse":
        line.refuse()
    elif fault == "stall":
        line.stall("down", after_bytes=2 * 2**20)
    else:
        line.cut("down", after_bytes=2 * 2**20)
    with pytest.raises(StorageFailed), place.local(directory):
        pass
    with pytest.raises(StorageFailed):
        file.read(0, 2**20)
    assert not place.is_here(directory)
    line.recover()
    assert read_all(place, directory) == LARGE


def test_a_damaged_or_missing_object_is_not_taken_for_the_file(
    place: RemoteFolders, settings: Settings, hasty: None
) -> None:
    for damage in ("changed", "shorter", "missing", "no table", "bad table"):
        place.write(directory := new_name(CHECKPOINTS), folder_of(LARGE))
        empty_the_cache(settings)
        objects = place._bucket
        if damage == "changed":
            objects.write(f"{directory}/other", b"y" * 3000)
        elif damage == "shorter":
            objects.write(f"{directory}/other", b"x" * 2999)
        elif damage == "missing":
            objects.remove(f"{directory}/other")
        elif damage == "no table":
            objects.remove(f"{directory}/{FILES}")
        else:
            objects.write(f"{directory}/{FILES}", b"[]")
        with pytest.raises(CheckpointNotFound), place.local(directory):
            pass
        assert not place.is_here(directory)


def test_a_copy_that_was_damaged_on_this_machine_is_downloaded_again(
    place: RemoteFolders,
) -> None:
    place.write(directory := new_name(CHECKPOINTS), folder_of(LARGE))

    def read() -> None:
        with place.local(directory) as folder:
            if (folder / "other").read_bytes() != LARGE["other"]:
                raise CheckpointNotFound("damaged")

    with place.local(directory) as folder:
        (folder / "other").write_bytes(b"")
    with pytest.raises(CheckpointNotFound, match="damaged"):
        read()
    read()


def test_a_reader_of_a_deleted_file_is_told(place: RemoteFolders) -> None:
    place.write(directory := new_name(CHECKPOINTS), folder_of(LARGE))
    file = place.open(directory, "weights")
    assert file.read(0, 10) == LARGE["weights"][:10]
    place.purge(directory)
    with pytest.raises(StorageFailed, match="was deleted while it was read"):
        file.read(10 * 2**20, 10)


def test_each_fault_at_the_start_has_its_sentence(
    place: RemoteFolders,
    line: FaultyProxy,
    server: S3Server,
    hasty: None,
    settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert place.problem() is None
    assert list(place._bucket.find("probes")) == []
    bucket_name = settings.STORAGE.split("/")[2]

    settings.STORAGE = "s3://no-such-bucket/prefix"
    assert (
        storage().problem()
        == f"s3://no-such-bucket/prefix: {line.url} has no bucket 'no-such-bucket'; make it, or "
        "correct TINKERAPI_STORAGE"
    )
    settings.STORAGE = f"s3://{bucket_name}/other"
    line.refuse()
    assert "does not answer" in (storage().problem() or "")
    line.recover()
    line.stall()
    assert "does not answer" in (storage().problem() or "")
    line.recover()
    server.check_credentials(check=True)
    try:
        assert "refuses the credentials (InvalidAccessKeyId)" in (storage().problem() or "")
    finally:
        server.check_credentials(check=False)
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    settings.STORAGE = f"s3://{bucket_name}/third"
    assert "there are no credentials" in (storage().problem() or "")


def test_without_the_extra_the_sentence_says_how_to_install_it(
    place: RemoteFolders, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings.STORAGE += "/again"
    monkeypatch.setitem(__import__("sys").modules, "s3fs", None)
    assert storage().problem() == (
        "the package s3fs is missing; install the extra: pip install 'tinkerapi[s3]'"
    )


def test_a_kill_in_the_middle_of_an_upload_leaves_what_is_no_folder(
    place: RemoteFolders, tmp_path: Path
) -> None:
    directory = new_name(CHECKPOINTS)
    place._bucket.write(f"{directory}/weights", b"half")
    with pytest.raises(CheckpointNotFound):
        place.files(directory)
    with pytest.raises(CheckpointNotFound), place.local(directory):
        pass
    assert [folder.directory for folder in place.folders(CHECKPOINTS)] == [directory]
    place.purge(directory)
    assert list(place.folders(CHECKPOINTS)) == []


class Refusing(BaseHTTPRequestHandler):
    """Refuses every object with one of S3's errors."""

    protocol_version = "HTTP/1.1"
    code, status = "", 0

    def do_PUT(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def do_DELETE(self) -> None:
        self.answer()

    def answer(self) -> None:
        text = f"<Error><Code>{self.code}</Code><Message>no</Message></Error>"
        content = text.encode() if self.code else b""
        self.send_response(self.status)
        self.send_header("Content-Type", "application/xml")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


@pytest.fixture
def refusing_place(
    keys: None, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[[str, int], RemoteFolders]]:
    """``refusing_place(code, status)``: a storage whose server always answers so."""
    settings.DATA_DIR = tmp_path / "data"
    settings.DATA_DIR.mkdir()
    with ExitStack() as ends:

        def make(code: str, status: int) -> RemoteFolders:
            handler = type("Handler", (Refusing,), {"code": code, "status": status})
            server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
            ends.callback(server.server_close)
            ends.callback(server.shutdown)
            Thread(target=server.serve_forever, daemon=True).start()
            monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{server.server_port}")
            settings.STORAGE = f"s3://full-{uuid.uuid4().hex}/x"
            made = storage()
            assert isinstance(made, RemoteFolders)
            ends.callback(made.close)
            return made

        yield make


@pytest.mark.parametrize(
    ("code", "status"), [("XMinioStorageFull", 507), ("QuotaExceeded", 403), ("", 507)]
)
def test_a_full_bucket_is_said_to_be_full(
    refusing_place: Callable[[str, int], RemoteFolders], code: str, status: int
) -> None:
    place = refusing_place(code, status)
    with pytest.raises(StorageFull, match="The server's storage is full; delete checkpoints"):
        place.write(new_name(CHECKPOINTS), folder_of({"a": b"b"}))
    assert "has no room left" in (place.problem() or "")


def test_a_wrong_clock_is_not_taken_for_wrong_credentials(
    refusing_place: Callable[[str, int], RemoteFolders],
) -> None:
    place = refusing_place("RequestTimeTooSkewed", 403)
    problem = place.problem() or ""
    assert "refuses this machine's clock (RequestTimeTooSkewed)" in problem
    assert "credentials" not in problem


def test_objects_that_are_not_files_of_a_folder_are_nobodys_leftovers(
    place: RemoteFolders,
) -> None:
    """As those of a server whose prefix lies inside this one's."""
    place._bucket.write(f"{CHECKPOINTS}/{CHECKPOINTS}/{'a' * 32}/weights", b"of another server")
    place._bucket.write(f"{CHECKPOINTS}/note", b"an operator's")
    assert list(place.folders(CHECKPOINTS)) == []
