"""The settings of the webhook: where events are sent, which, and the secret that signs them.

A receiver's URL often contains a token, so no message repeats it.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping
from dataclasses import dataclass
from urllib.parse import urlsplit

from django.core.exceptions import ImproperlyConfigured

from tinkerapi.config.environment import env_list, env_text
from tinkerapi.config.nearest import nearest

EVENTS: Mapping[str, str] = {
    "worker_missing": "no worker serves a base model; requests wait",
    "worker_silent": "a worker sends no heartbeats",
    "worker_lost": "a worker was killed, crashed or hung",
    "worker_stopped": "a worker was stopped",
    "worker_started": "a worker started",
    "disk_low": "less than 10 % of the data folder's disk is free",
    "disk_full": "less than 3 % of it is free",
    "disk_filling": "at the growth of the last days it is full within three days",
    "backup_old": "the last backup is older than a week",
    "backup_made": "a backup was complete",
    "login_failed": "a login to the console failed",
    "key_create": "an API key was made",
    "key_revoke": "an API key was revoked",
    "key_rotate": "an API key was replaced",
    "checkpoint_publish": "a checkpoint was published",
}
"""The events that can be sent, and what they mean."""

DEFAULT_EVENTS = (
    "worker_missing",
    "worker_silent",
    "worker_lost",
    "disk_low",
    "disk_full",
    "disk_filling",
    "backup_old",
    "login_failed",
)

SECRET_PREFIX = "whsec_"  # noqa: S105  # what the secret begins with
SECRET_BYTES = range(24, 65)
"""Lengths that the Standard Webhooks specification allows."""

MAX_URL_CHARACTERS = 2000


@dataclass(frozen=True, kw_only=True)
class WebhookConfig:
    """A receiver of events."""

    url: str
    """Secret: it may contain a token."""
    secret: bytes
    events: tuple[str, ...]

    @property
    def host(self) -> str:
        """Scheme and host of the receiver, for people."""
        parts = urlsplit(self.url)
        return f"{parts.scheme}://{parts.netloc}"

    def __repr__(self) -> str:
        return f"WebhookConfig(host={self.host!r}, events={self.events!r})"


def env_webhook(url_name: str, secret_name: str, events_name: str) -> WebhookConfig | None:
    """The receiver that three variables describe; None if no URL is set.

    Raises:
        ImproperlyConfigured: A value is unusable, or one is set that has no effect.
    """
    url, secret = env_text(url_name).strip(), env_text(secret_name).strip()
    events = _events(events_name)
    if not url:
        for name in (secret_name, events_name):
            if env_text(name).strip():
                raise ImproperlyConfigured(f"{name}: it has no effect without {url_name}")
        return None
    if not _is_usable(url):
        raise ImproperlyConfigured(
            f"{url_name}: expected http(s)://HOST/PATH without a user name and a fragment, of at "
            f"most {MAX_URL_CHARACTERS} characters (its value is not shown)"
        )
    return WebhookConfig(url=url, secret=_key(secret_name, secret), events=events)


def _is_usable(url: str) -> bool:
    try:
        parts = urlsplit(url)
        port = parts.port  # a ValueError if it is none
    except ValueError:
        return False
    return (
        parts.scheme in ("http", "https")
        and bool(parts.hostname)
        and port != 0
        and parts.username is None
        and not parts.fragment
        and url.isascii()
        and url.isprintable()
        and " " not in url
        and len(url) <= MAX_URL_CHARACTERS
    )


def _key(name: str, secret: str) -> bytes:
    """The bytes of ``whsec_`` and base64."""
    try:
        key = base64.b64decode(secret.removeprefix(SECRET_PREFIX), validate=True)
    except (binascii.Error, ValueError):
        key = b""
    if not secret.startswith(SECRET_PREFIX) or len(key) not in SECRET_BYTES:
        raise ImproperlyConfigured(
            f"{name}: expected {SECRET_PREFIX} and 24 to 64 bytes in base64 (its value is not "
            f'shown); make one with: echo "{SECRET_PREFIX}$(head -c 32 /dev/urandom | base64)"'
        )
    return key


def _events(name: str) -> tuple[str, ...]:
    chosen = env_list(name) or DEFAULT_EVENTS
    for event in chosen:
        if event not in EVENTS:
            raise ImproperlyConfigured(
                f"{name}: {event!r} is no event{nearest(event, EVENTS)}; expected some of "
                f"{', '.join(EVENTS)}"
            )
    return tuple(dict.fromkeys(chosen))
