"""A receiver of events: a real HTTP server on loopback whose answers the test chooses."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from django.db.models import F
from pytest_django import Settings

from tests.waiting import LONG_SECONDS
from tinkerapi.config.webhook import EVENTS, WebhookConfig
from tinkerapi.models import Delivery
from tinkerapi.webhook.sender import WebhookSender

SECRET = b"0123456789abcdefghijklmnopqrstuv"


@dataclass
class Received:
    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class Receiver:
    """``statuses`` are the next answers; once they are used up, 204."""

    url: str
    statuses: list[int] = field(default_factory=list)
    received: list[Received] = field(default_factory=list)
    location: str = ""


@pytest.fixture
def receiver(monkeypatch: pytest.MonkeyPatch) -> Iterator[Receiver]:
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            headers = {name.lower(): value for name, value in self.headers.items()}
            found.received.append(Received(self.path, headers, body))
            self.send_response(found.statuses.pop(0) if found.statuses else 204)
            if found.location:
                self.send_header("Location", found.location)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    found = Receiver(f"http://127.0.0.1:{server.server_port}/in?token=private")
    thread = threading.Thread(target=server.serve_forever, name="receiver")
    thread.start()
    yield found
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(autouse=True)
def data_dir(tmp_path: Path, settings: Settings) -> Path:
    settings.DATA_DIR = tmp_path
    return tmp_path


@pytest.fixture
def sender_of(db: None) -> Callable[..., WebhookSender]:
    """``sender_of(url)``: as a new process would be; ``events`` are the chosen ones."""

    def make(url: str, *, events: tuple[str, ...] = tuple(EVENTS), **options: Any) -> WebhookSender:
        config = WebhookConfig(url=url, secret=SECRET, events=events)
        return WebhookSender(config, **{"attempt_seconds": LONG_SECONDS, **options})

    return make


def pauses_end() -> None:
    """Every pause after a failed attempt is over."""
    Delivery.objects.update(next_attempt_at=F("next_attempt_at") - timedelta(days=2))
