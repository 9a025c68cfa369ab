"""A whole server, started as its README says, on the real default model."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.server import ROOT, Json, Server, free_port

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
