"""A line to an S3 server that can be cut, stalled or refused at any byte."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator


class FaultyProxy:
    """Forwards bytes to a port of this machine, until it is told to do something else."""

    def __init__(self, port: int) -> None:
        self._server_port = port
        self._lock = threading.Lock()
        self._connections: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self._flowing = threading.Event()
        self.recover()
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def recover(self) -> None:
        """Forward everything from now on, on new connections; stalled ones are closed."""
        self._flowing.set()
        self._refuses = False
        self._left: dict[str, int | None] = {"up": None, "down": None}
        self.faults = 0
        """Connections that were refused, cut or stalled."""

    def refuse(self) -> None:
        """Close every connection at once."""
        self._refuses = True
        self.close_connections()

    def stall(self, direction: str = "up", *, after_bytes: int = 0) -> None:
        """Forward this many more bytes to the server ("up") or from it ("down"), then nothing on
        any connection, which all stay open."""
        self._flowing.clear()
        self._left[direction] = after_bytes

    def cut(self, direction: str, *, after_bytes: int) -> None:
        """Forward this many more bytes in this direction, then close the connection."""
        self._left[direction] = after_bytes

    def close(self) -> None:
        self._listener.close()
        self._flowing.set()
        self.close_connections()

    def close_connections(self) -> None:
        with self._lock:
            connections, self._connections = self._connections, []
        for connection in connections:
            _end(connection)

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                client, _ = self._listener.accept()
                if self._refuses:
                    self.faults += 1
                    client.close()
                    continue
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with (
            client,
            contextlib.suppress(ConnectionRefusedError),  # its process has ended
            socket.create_connection(("127.0.0.1", self._server_port)) as server,
        ):
            with self._lock:
                self._connections += [client, server]
            back = threading.Thread(target=self._carry, args=("down", server, client))
            back.start()
            self._carry("up", client, server)
            back.join()

    def _carry(self, direction: str, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                allowed = self._allowed(direction, len(data))
                target.sendall(data[:allowed])
                if allowed < len(data):
                    self.faults += 1
                    self._flowing.wait()  # unless it is stalled, it is cut
                    _end(source)
                    break
        _end(target)

    def _allowed(self, direction: str, size: int) -> int:
        with self._lock:
            left = self._left[direction]
            if left is None:
                return size
            allowed = min(left, size)
            self._left[direction] = left - allowed
            return allowed


def _end(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)


@contextlib.contextmanager
def faulty_proxy(port: int) -> Iterator[FaultyProxy]:
    """A proxy for as long as it is needed."""
    proxy = FaultyProxy(port)
    try:
        yield proxy
    finally:
        proxy.close()
