"""A model hub on loopback, with the few answers that the hub's own client asks for."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

COMMIT = "a" * 40


class Hub(ThreadingHTTPServer):
    """Serves one repository, whole, to senders of the token."""

    def __init__(self, name: str, files: Mapping[str, bytes], token: str | None) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.name, self.files, self.token = name, files, token
        self.fetched: list[str] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: Any) -> None:
        """Say nothing."""

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        hub = self.server
        if hub.token and self.headers.get("Authorization") != f"Bearer {hub.token}":
            self._answer(401, b'{"error": "Unauthorized"}', {"X-Error-Code": "GatedRepo"})
            return
        path = self.path.partition("?")[0]
        if path.startswith(f"/api/models/{hub.name}/tree/"):
            entries = [
                {"type": "file", "path": name, "size": len(content), "oid": _etag(content)}
                for name, content in hub.files.items()
            ]
            self._answer(200, json.dumps(entries).encode())
        elif path.startswith(f"/api/models/{hub.name}"):
            siblings = [
                {"rfilename": name, "size": len(content)} for name, content in hub.files.items()
            ]
            info = {"id": hub.name, "modelId": hub.name, "sha": COMMIT, "siblings": siblings}
            self._answer(200, json.dumps(info).encode())
        else:
            name = path.rpartition("/")[2]
            if f"/{hub.name}/resolve/" not in path or name not in hub.files:
                self._answer(404, b"", {"X-Error-Code": "EntryNotFound"})
                return
            if self.command == "GET":
                hub.fetched.append(name)
            content = hub.files[name]
            headers = {"ETag": f'"{_etag(content)}"', "X-Repo-Commit": COMMIT}
            self._answer(200, content, headers)

    def _answer(
        self, status: int, content: bytes, headers: Mapping[str, str] | None = None
    ) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)


def _etag(content: bytes) -> str:
    return hashlib.sha1(content, usedforsecurity=False).hexdigest()


@contextmanager
def running_hub(
    name: str, files: Mapping[str, bytes], *, token: str | None = None
) -> Iterator[Hub]:
    hub = Hub(name, files, token)
    thread = threading.Thread(target=hub.serve_forever)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        thread.join()
        hub.server_close()
