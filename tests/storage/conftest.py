"""A bucket on an S3 server of this machine, as the storage of the settings."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from pytest_django import Settings

from tests.faults.conftest import owner, train
from tests.storage.faulty_proxy import FaultyProxy, faulty_proxy
from tests.storage.s3_server import KEYS, S3Server, s3_server
from training.storage import bucket, remote
from training.storage.chosen import storage
from training.storage.remote import RemoteFolders

__all__ = ["owner", "train"]


@pytest.fixture(scope="session")
def server() -> Iterator[S3Server]:
    with s3_server() as server:
        yield server


@pytest.fixture
def line(server: S3Server) -> Iterator[FaultyProxy]:
    """The line to the server."""
    with faulty_proxy(server.port) as proxy:
        yield proxy


@pytest.fixture
def keys(line: FaultyProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Credentials, and the server's address."""
    for name, value in {**KEYS, "AWS_ENDPOINT_URL": line.url}.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def place(
    server: S3Server, keys: None, settings: Settings, tmp_path: Path
) -> Iterator[RemoteFolders]:
    """The storage of the settings: a new bucket."""
    name = f"bucket-{uuid.uuid4().hex}"
    server.make_bucket(name)
    settings.STORAGE = f"s3://{name}/some/prefix"
    settings.DATA_DIR = tmp_path / "data"
    settings.DATA_DIR.mkdir()
    chosen = storage()
    assert isinstance(chosen, RemoteFolders)
    yield chosen
    chosen.close()


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short limits of time, for tests of a server that does not answer."""
    monkeypatch.setattr(bucket, "CALL_SECONDS", 3.0)
    monkeypatch.setattr(bucket, "PART_SECONDS", 3.0)
    monkeypatch.setattr(bucket, "PAUSES", (0.0,))
    monkeypatch.setattr(remote, "FAILED_SECONDS", 0.0)


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of the smallest size that S3 takes."""
    monkeypatch.setattr(bucket, "PART_BYTES", 5 * 2**20)


@pytest.fixture
def another_machine(settings: Settings, tmp_path: Path) -> Callable[[], None]:
    """``another_machine()``: from now on this process is one with an empty data folder."""

    def move() -> None:
        settings.DATA_DIR = tmp_path / uuid.uuid4().hex
        settings.DATA_DIR.mkdir()

    return move
