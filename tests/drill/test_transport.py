"""A client repeats a request until it is answered."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Callable, Iterator

import pytest

from tinkerapi.drill import transport
from tinkerapi.drill.transport import Connection, GivenUp, Progress

Serve = Callable[[list[int]], Connection]


@pytest.fixture
def progress() -> Progress:
    return Progress()


@pytest.fixture
def serve(progress: Progress, monkeypatch: pytest.MonkeyPatch) -> Iterator[Serve]:
    """``serve([0, 503, 200])``: hang up, then these answers; a connection to that server."""
    monkeypatch.setattr(transport, "PAUSES_SECONDS", (0.0,))
    script: list[int] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            status = script.pop(0)
            if not status:
                self.close_connection = True
                return
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Log nothing."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    serving = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    serving.start()
    connections: list[Connection] = []

    def begin(statuses: list[int]) -> Connection:
        script.extend(statuses)
        connections.append(Connection(server.server_address[1], {}, progress))
        return connections[-1]

    yield begin
    for connection in connections:
        connection.close()
    server.shutdown()
    serving.join()
    server.server_close()


@pytest.mark.parametrize("status", [200, 400, 404, 500])
def test_an_answer_is_taken_whatever_it_says(serve: Serve, progress: Progress, status: int) -> None:
    assert serve([status]).post("/path", {"a": 1}) == (status, {"a": 1})
    assert progress.resent == 0


def test_what_was_not_answered_is_sent_again(serve: Serve, progress: Progress) -> None:
    assert serve([0, 503, 429, 0, 502, 200]).post("/path", {"a": 1}) == (200, {"a": 1})
    assert progress.resent == 5


def test_patience_ends(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport, "PATIENCE_SECONDS", -1.0)
    with pytest.raises(GivenUp, match="/path: 503"):
        serve([503]).post("/path", {})
