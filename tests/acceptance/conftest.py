"""A whole server, started as its README says, on the real default model."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import requests

ROOT = Path(__file__).resolve().parents[2]
READY_SECONDS = 180.0  # the first start makes the model's folder

Json = dict[str, Any]


@dataclass
class Server:
    """``manage.py up`` in its own process."""

    data_dir: Path
    port: int
    environment: dict[str, str] = field(default_factory=dict)
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://localhost:{self.port}"

    def start(self) -> None:
        """Start and wait until a worker takes requests."""
        with (self.data_dir / "up.log").open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "manage.py", "up", "--port", str(self.port)],
                cwd=ROOT,
                env={
                    **{k: v for k, v in os.environ.items() if not k.startswith("TINKERAPI_")},
                    "DJANGO_SETTINGS_MODULE": "tinkerapi.settings",
                    "TINKERAPI_DATA_DIR": str(self.data_dir),
                    **self.environment,
                },
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        deadline = time.monotonic() + READY_SECONDS
        while not self.is_ready():
            if self.process.poll() is not None or time.monotonic() > deadline:
                pytest.fail(f"up did not get ready:\n{self.log()}")
            time.sleep(0.1)

    def is_ready(self) -> bool:
        try:
            return requests.get(f"{self.url}/readyz", timeout=5).status_code == 200
        except requests.ConnectionError:
            return False

    def stop(self) -> None:
        if self.process is not None:
            self.process.send_signal(signal.SIGTERM)
            self.process.wait(timeout=150)
            self.process = None

    def log(self) -> str:
        return (self.data_dir / "up.log").read_text(errors="replace")

    def worker_pid(self) -> int:
        """The process that holds the model, as its own heartbeat row says."""
        [worker] = requests.get(f"{self.url}/readyz", timeout=5).json()["workers"]
        return int(worker["pid"])

    def post(self, path: str, **body: Any) -> requests.Response:
        return requests.post(f"{self.url}{path}", json=body, timeout=120)

    def retrieve(self, request_id: str, *, seconds: float = 120.0) -> requests.Response:
        """Poll as the quick reference does, until the future is final."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            answer = self.post("/retrieve_future", request_id=request_id, wait=10)
            if answer.status_code != 202:
                return answer
        pytest.fail(f"{request_id} was not final after {seconds} s:\n{self.log()}")


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


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
