"""The server's own address behind a proxy that speaks TLS."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pytest_django import Settings

from tests.api.test_asgi import call
from tinkerapi.api.quickref.views.service import HealthView
from tinkerapi.api.renderers import JSONResponse
from tinkerapi.api.sdk.render import links
from tinkerapi.handlers import build_application
from training.models import Session


def answered(path: str, host: str) -> dict[str, str]:
    """The headers of a page that was asked for under this name."""
    return call(path, method="GET", headers={"host": host}, body=[b""])[1]


@pytest.mark.django_db
def test_pages_tell_browsers_to_come_back_by_tls(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings.TLS, settings.SECURE_HSTS_SECONDS = True, 1000
    monkeypatch.setattr("tests.api.test_asgi.application", build_application())

    headers = answered("/docs/", "train.example.com")
    assert headers["strict-transport-security"].startswith("max-age=")
    headers = answered("/docs/", "localhost:8000")
    assert "strict-transport-security" not in headers


@pytest.mark.parametrize(
    ("public_url", "tls", "host", "begin"),
    [
        ("", False, "train.example.com", "http://train.example.com/api/v1/downloads/"),
        ("", True, "train.example.com", "https://train.example.com/api/v1/downloads/"),
        ("", True, "localhost:8000", "http://localhost:8000/api/v1/downloads/"),
        ("https://a.example", True, "127.0.0.1:8000", "https://a.example/api/v1/downloads/"),
    ],
)
def test_links_say_how_they_are_reached(
    settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
    public_url: str,
    tls: bool,
    host: str,
    begin: str,
) -> None:
    settings.PUBLIC_URL, settings.TLS = public_url, tls

    def link(self: HealthView, request: Any) -> JSONResponse:
        made = links.trace_link(request, Session(pk="a-session"))
        return JSONResponse({"url": made.url})

    monkeypatch.setattr(HealthView, "get", link)
    _, _, body = call("/healthz", method="GET", headers={"host": host}, body=[b""])

    assert json.loads(body)["url"].startswith(begin)
