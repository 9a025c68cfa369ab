"""A whole server, started as its README says, on the real default model."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.server import ROOT, Json, Server, free_port
from tests.tiny_model import make_tiny_model

__all__ = ["ROOT", "Json", "Server"]


@pytest.fixture(scope="session")
def start_server(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Callable[..., Server]]:
    """``start_server(TINKERAPI_X="1")``: a fresh server with its own data folder."""
    servers: list[Server] = []

    def start(**environment: str) -> Server:
        server = Server(tmp_path_factory.mktemp("server"), free_port(), environment)
        servers.append(server)
        server.start()
        return server

    yield start
    for server in servers:
        server.stop()


@pytest.fixture(scope="session")
def server(start_server: Callable[..., Server]) -> Server:
    """One server on the real default model, shared by the tests that leave it as it is."""
    return start_server()


@pytest.fixture(scope="session")
def sdk_server(
    start_server: Callable[..., Server], tmp_path_factory: pytest.TempPathFactory
) -> Server:
    """One server on a tiny model, for the tinker SDK; a chunk holds two datums, so that a call of
    five has three, and keys are exchanged for tokens."""
    folder = make_tiny_model(tmp_path_factory.mktemp("base") / "tiny")
    return start_server(
        TINKERAPI_BASE_MODEL=str(folder),
        TINKERAPI_DTYPE="float32",
        TINKERAPI_NUM_THREADS="1",
        TINKERAPI_MAX_DATUMS="2",
        TINKERAPI_SDK_JWT="1",
    )
