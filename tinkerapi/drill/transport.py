"""HTTP to a server that may be killed at any moment, and counts of answers and retries."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Callable, Mapping
from http import HTTPStatus
from typing import Any

Json = dict[str, Any]

PATIENCE_SECONDS = 300.0  # for one answer, including all restarts
SOCKET_SECONDS = 45.0  # as the SDK: longer than the server holds any answer
PAUSES_SECONDS = (0.05, 0.1, 0.2, 0.4)
SEND_AGAIN = (
    HTTPStatus.TOO_MANY_REQUESTS,
    HTTPStatus.BAD_GATEWAY,
    HTTPStatus.SERVICE_UNAVAILABLE,
    HTTPStatus.GATEWAY_TIMEOUT,
)


class GivenUp(Exception):
    """No answer came in time, or an impossible one."""


class Progress:
    """The progress of all clients together; other threads may wait for it."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self.submitted = 0
        self.answered = 0
        self.is_over = False
        self.resent = 0
        self.worst_seconds = 0.0

    def submits(self) -> None:
        with self._changed:
            self.submitted += 1
            self._changed.notify_all()

    def answers(self, seconds: float) -> None:
        """Record a result, and the seconds since its request was first sent."""
        with self._changed:
            self.answered += 1
            self.worst_seconds = max(self.worst_seconds, seconds)
            self._changed.notify_all()

    def resends(self) -> None:
        with self._changed:
            self.resent += 1

    def ends(self) -> None:
        """Record that all clients have ended."""
        with self._changed:
            self.is_over = True
            self._changed.notify_all()

    def wait_for(self, reached: Callable[[], bool], timeout_seconds: float | None) -> bool:
        """Wait for ``reached()``, the end of all clients, or the timeout; return whether
        reached."""
        with self._changed:
            self._changed.wait_for(lambda: reached() or self.is_over, timeout_seconds)
            return reached()


class Connection:
    """HTTP to one server as one user; outlives every server process."""

    def __init__(self, port: int, headers: Mapping[str, str], progress: Progress) -> None:
        """``headers``: sent with every request; they identify the user."""
        self._port = port
        self._headers = {"Content-Type": "application/json", **headers}
        self._progress = progress
        self._http: http.client.HTTPConnection | None = None

    def post(self, path: str, body: Json, **headers: str) -> tuple[int, Json]:
        """Status and JSON of the answer; repeats the request until there is one.

        Raises:
            GivenUp: There was none in PATIENCE_SECONDS.
        """
        deadline = time.monotonic() + PATIENCE_SECONDS
        attempt = 0
        while True:
            try:
                status, answer = self._once(path, body, headers)
                if status not in SEND_AGAIN:
                    return status, answer
                reason = f"{status} {answer}"
            except (OSError, http.client.HTTPException, json.JSONDecodeError) as error:
                self.close()
                reason = repr(error)
            if time.monotonic() > deadline:
                raise GivenUp(f"{path}: {reason}")
            time.sleep(PAUSES_SECONDS[min(attempt, len(PAUSES_SECONDS) - 1)])
            attempt += 1
            self._progress.resends()

    def close(self) -> None:
        if self._http is not None:
            self._http.close()
            self._http = None

    def _once(self, path: str, body: Json, headers: Mapping[str, str]) -> tuple[int, Json]:
        if self._http is None:
            self._http = http.client.HTTPConnection("127.0.0.1", self._port, timeout=SOCKET_SECONDS)
        self._http.request("POST", path, json.dumps(body), {**self._headers, **headers})
        response = self._http.getresponse()
        return response.status, json.loads(response.read() or b"{}")
