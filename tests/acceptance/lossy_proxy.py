"""A line that loses answers: it closes the connection when the server has done its part.

The client cannot know whether its request arrived, so it must send it again; whether anything
happens twice is the server's business.
"""

from __future__ import annotations

import contextlib
import re
import socket
import threading
from collections.abc import Iterator


class LossyProxy:
    """Forwards bytes to a port of this machine; loses the first answer to each of some requests."""

    def __init__(self, port: int, *, paths: str) -> None:
        """Begin to listen.

        Args:
            port: The server's.
            paths: A regular expression; every other POST to such a path loses its answer.
        """
        self._server_port = port
        self._request = re.compile(rb"POST (?:" + paths.encode() + rb") ")
        self._lock = threading.Lock()
        self._seen = 0
        self.lost = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._carry, args=(client,), daemon=True).start()

    def _carry(self, client: socket.socket) -> None:
        server = socket.create_connection(("127.0.0.1", self._server_port))
        losing = threading.Event()
        back = threading.Thread(target=self._carry_back, args=(client, server, losing))
        back.start()
        with contextlib.suppress(OSError):
            while data := client.recv(65536):
                if self._request.search(data) and self._loses():
                    losing.set()
                server.sendall(data)
        _end(server)
        back.join()
        client.close()
        server.close()

    def _carry_back(
        self, client: socket.socket, server: socket.socket, losing: threading.Event
    ) -> None:
        with contextlib.suppress(OSError):
            while data := server.recv(65536):
                if losing.is_set():
                    break
                client.sendall(data)
        _end(client)

    def _loses(self) -> bool:
        with self._lock:
            self._seen += 1
            loses = self._seen % 2 == 1
            self.lost += loses
            return loses


def _end(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)


@contextlib.contextmanager
def lossy_proxy(port: int, *, paths: str) -> Iterator[LossyProxy]:
    """A proxy for as long as it is needed."""
    proxy = LossyProxy(port, paths=paths)
    try:
        yield proxy
    finally:
        proxy.close()
