"""The webhook's settings: an unusable one stops the start, and no message repeats a secret."""

from __future__ import annotations

import base64

import pytest
from django.core.exceptions import ImproperlyConfigured

from tinkerapi.config.webhook import DEFAULT_EVENTS, EVENTS, WebhookConfig, env_webhook

KEY = bytes(range(32))
SECRET = "whsec_" + base64.b64encode(KEY).decode()
NAMES = ("URL", "SECRET", "EVENTS")


def read(monkeypatch: pytest.MonkeyPatch, *values: str) -> WebhookConfig | None:
    for name, value in zip(NAMES, values, strict=False):
        monkeypatch.setenv(name, value)
    return env_webhook(*NAMES)


def test_no_url_is_no_webhook(monkeypatch: pytest.MonkeyPatch) -> None:
    assert read(monkeypatch, "", "", "") is None


def test_a_receiver_gets_the_events_that_need_somebody(monkeypatch: pytest.MonkeyPatch) -> None:
    found = read(monkeypatch, "https://hooks.example:8443/in/TOKEN?a=b", SECRET)

    assert found is not None
    assert (found.host, found.secret, found.events) == (
        "https://hooks.example:8443",
        KEY,
        DEFAULT_EVENTS,
    )
    assert set(DEFAULT_EVENTS) <= set(EVENTS)
    assert "TOKEN" not in repr(found)


def test_events_are_chosen_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    found = read(monkeypatch, "https://h.example/", SECRET, "worker_lost, disk_low,worker_lost")

    assert found is not None
    assert found.events == ("worker_lost", "disk_low")


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        (("hooks.example/TOKEN", SECRET), "URL: expected http"),
        (("ftp://hooks.example/TOKEN", SECRET), "URL: expected http"),
        (("https:///TOKEN", SECRET), "URL: expected http"),
        (("https://me:TOKEN@hooks.example/", SECRET), "URL: expected http"),
        (("https://hooks.example:0/TOKEN", SECRET), "URL: expected http"),
        (("https://hooks.example:99999/TOKEN", SECRET), "URL: expected http"),
        (("https://hooks.example/TOKEN#part", SECRET), "URL: expected http"),
        (("https://hooks.example/TOKEN\r\nX: y", SECRET), "URL: expected http"),
        (("https://[hooks/TOKEN", SECRET), "URL: expected http"),
        (("https://hooks.example/" + "TOKEN" * 400, SECRET), "URL: expected http"),
        (("https://hooks.example/", ""), "SECRET: expected whsec_"),
        (("https://hooks.example/", "TOKEN" * 8), "SECRET: expected whsec_"),
        (("https://hooks.example/", "whsec_TOKEN!"), "SECRET: expected whsec_"),
        (("https://hooks.example/", "whsec_VE9LRU4="), "SECRET: expected whsec_"),
        (("https://h.example/", SECRET, "worker_lots"), "'worker_lots' is no event; did you mean"),
        (("", SECRET), "SECRET: it has no effect without URL"),
        (("", "", "worker_lost"), "EVENTS: it has no effect without URL"),
    ],
)
def test_an_unusable_value_stops_the_start(
    monkeypatch: pytest.MonkeyPatch, values: tuple[str, ...], sentence: str
) -> None:
    with pytest.raises(ImproperlyConfigured) as raised:
        read(monkeypatch, *values)
    assert sentence in str(raised.value)
    assert "TOKEN" not in str(raised.value)
