"""Bodies on a real connection: those that do not arrive, that do not end, and that are not valid
HTTP."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.server import free_port
from tests.waiting import LONG_SECONDS

ROOT = Path(__file__).resolve().parents[2]
IDLE_SECONDS, SECONDS = 1, 3
JSON = b"Host: localhost\r\nContent-Type: application/json\r\n"


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """Only the web process, as ``up`` starts it; these tests need no database."""
    number = free_port()
    command = [sys.executable, "-m", "granian", "tinkerapi.asgi:application"]
    command += ["--interface", "asginl", "--http", "1", "--no-ws", "--port", str(number)]
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("TINKERAPI_")}
    environment = {
        **inherited,
        "DJANGO_SETTINGS_MODULE": "tinkerapi.settings",
        "TINKERAPI_ROLE": "web",
        "TINKERAPI_DATA_DIR": str(tmp_path_factory.mktemp("web")),
        "TINKERAPI_BODY_IDLE_SECONDS": str(IDLE_SECONDS),
        "TINKERAPI_BODY_SECONDS": str(SECONDS),
    }
    with subprocess.Popen(command, cwd=ROOT, env=environment) as process:
        try:
            deadline = time.monotonic() + LONG_SECONDS
            while time.monotonic() < deadline:
                assert process.poll() is None, "granian ended"
                try:
                    socket.create_connection(("127.0.0.1", number), 1).close()
                    break
                except OSError:
                    time.sleep(0.1)
            yield number
        finally:
            process.terminate()


class Wire:
    """A connection that is written to byte by byte."""

    def __init__(self, port: int, beginning: bytes) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=LONG_SECONDS)
        self.socket.sendall(beginning)

    def answer(self) -> tuple[int, bytes]:
        """Status and body; the server has closed the connection after them."""
        received = b""
        while piece := self.socket.recv(65536):
            received += piece
        self.socket.close()
        head, _, body = received.partition(b"\r\n\r\n")
        assert b"connection: close" in head.lower(), head
        return int(head.split()[1]), body

    def is_answered(self) -> bool:
        self.socket.settimeout(0.3)
        try:
            return bool(self.socket.recv(1, socket.MSG_PEEK))
        except TimeoutError:
            return False


def post(path: str, length: int) -> bytes:
    return b"POST %s HTTP/1.1\r\n%sContent-Length: %d\r\n\r\n" % (path.encode(), JSON, length)


@pytest.mark.parametrize("path", ["/fwdbwd", "/api/v1/forward", "/admin/login/", "/nothing"])
@pytest.mark.parametrize("part", [b"", b'{"model_id": '])
def test_a_body_that_stands_still_is_answered_408_and_its_connection_closed(
    port: int, path: str, part: bytes
) -> None:
    status, body = Wire(port, post(path, 1000) + part).answer()

    assert status == 408
    said = json.loads(body)
    assert said["error_code"] == "BodyTooSlow"
    assert f"pause for {IDLE_SECONDS} s" in said["detail"]
    assert "TINKERAPI_BODY_IDLE_SECONDS" in said["detail"]


def test_a_body_that_trickles_has_an_end_too(port: int) -> None:
    wire = Wire(port, post("/fwdbwd", 1000))
    sent = 0
    while not wire.is_answered():
        wire.socket.sendall(b" ")
        sent += 1

    # Fewer on a machine so busy that we paused; never more than the whole time has room for.
    assert 1 <= sent <= SECONDS / 0.3 + 5
    assert wire.answer()[0] == 408


def test_many_idle_bodies_are_gone_at_once_and_hold_nobody_up(port: int) -> None:
    wires = [Wire(port, post("/fwdbwd", 1000)) for _ in range(100)]
    with socket.create_connection(("127.0.0.1", port), timeout=LONG_SECONDS) as other:
        other.sendall(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert other.recv(12) == b"HTTP/1.1 200"

    assert {wire.answer()[0] for wire in wires} == {408}


@pytest.mark.parametrize("path", ["/docs/", "/admin/login/"])
@pytest.mark.parametrize("chunks", [b"zz\r\nhello\r\n", b"5\r\nhelloo\r\n", b"-1\r\n\r\n"])
def test_chunks_that_are_none_are_a_bad_request(port: int, path: str, chunks: bytes) -> None:
    beginning = f"POST {path} HTTP/1.1\r\n".encode() + JSON + b"Transfer-Encoding: chunked\r\n\r\n"
    status, body = Wire(port, beginning + chunks).answer()

    assert status == 400
    assert json.loads(body)["error_code"] == "BadRequest"


def test_chunks_without_end_are_cut_off_at_the_limit(port: int) -> None:
    beginning = b"POST /admin/login/ HTTP/1.1\r\n" + JSON + b"Transfer-Encoding: chunked\r\n\r\n"
    wire = Wire(port, beginning)
    sent = 0
    try:
        while sent < 64 and not wire.is_answered():
            wire.socket.sendall(b"10000\r\n" + b"x" * 2**16 + b"\r\n")
            sent += 1
    except ConnectionError:
        pass
    wire.socket.close()

    assert 4 <= sent < 10  # of 64 KiB each


def test_an_unknown_address_wants_no_large_body(port: int) -> None:
    status, _ = Wire(port, post("/nothing", 10**7)).answer()

    assert status == 404


def test_an_answer_reaches_a_client_that_is_still_sending(port: int) -> None:
    """A connection that is closed at once would lose the answer on its way."""
    wire = Wire(port, post("/nothing", 2**24))
    with contextlib.suppress(BrokenPipeError):  # the rest is discarded for some seconds only
        for _ in range(2**8):
            wire.socket.sendall(b"x" * 2**16)

    assert wire.answer()[0] == 404


def test_a_websocket_is_a_request_like_any_other(port: int) -> None:
    upgrade = b"Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
    key = b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
    wire = Wire(port, b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n" + upgrade + key)

    assert wire.socket.recv(12) == b"HTTP/1.1 200"
    wire.socket.close()
