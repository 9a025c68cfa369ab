"""Readers of environment variables; an invalid value stops the start with a message."""

import os
import re
import secrets
from pathlib import Path

import dj_database_url
import psycopg
from django.core.exceptions import ImproperlyConfigured
from psycopg.conninfo import make_conninfo

from tinkerapi.config.nearest import nearest

PREFIX = "TINKERAPI_"
OTHERS = ("TINKERAPI_NO_INSTALL",)
"""Variables of ours that are read before the settings are."""

REMOVED = {"TINKERAPI_RESIDENT_ADAPTERS": "TINKERAPI_ADAPTER_CACHE_BYTES, in bytes"}
"""Settings of older versions, and what takes their place."""

_read: set[str] = set()

LARGEST = 10**9
"""The largest number if no other limit applies: as seconds, thirty years."""


def env_text(name: str, default: str = "") -> str:
    """The variable's value, unchanged; the default if it is not set."""
    _read.add(name)
    return os.environ.get(name, default)


def refuse_unknown_variables() -> None:
    """Stop the start if a TINKERAPI_ variable is set that no reader has read.

    Call it after the last reader. Variables that begin with ``TINKERAPI_TEST_`` are the test
    suite's.
    """
    known = {name for name in _read if name.startswith(PREFIX)} | set(OTHERS)
    for name, instead in REMOVED.items():
        if name in os.environ:
            raise ImproperlyConfigured(f"{name}: replaced by {instead}; set that, and unset this")
    for name in sorted(os.environ):
        if name.startswith(PREFIX) and name not in known and not name.startswith(f"{PREFIX}TEST_"):
            raise ImproperlyConfigured(f"{name}: no such setting{nearest(name, known)}")


def refuse_beside(name: str, *others: str) -> None:
    """Stop the start if a variable is set together with one that it replaces."""
    for other in others:
        if env_text(name) and env_text(other):
            raise ImproperlyConfigured(f"{other}: {name} is set and replaces it; unset one of them")


def env_bool(name: str, default: bool) -> bool:
    """``1``, ``true``, ``yes``, ``on`` or their opposites; anything else stops the start."""
    value = env_text(name).strip().lower()
    if value in ("", "1", "true", "yes", "on", "0", "false", "no", "off"):
        return default if not value else value in ("1", "true", "yes", "on")
    raise ImproperlyConfigured(f"{name}: expected 1 or 0, got {value!r}")


def env_int(name: str, default: int, *, minimum: int = 1, maximum: int = LARGEST) -> int:
    """A whole number from ``minimum`` to ``maximum``; anything else stops the start."""
    value = env_text(name).strip()
    try:
        number = int(value) if value else default
    except ValueError:
        raise ImproperlyConfigured(f"{name}: expected a whole number, got {value!r}") from None
    if number < minimum:
        raise ImproperlyConfigured(f"{name}: expected at least {minimum}, got {number}")
    if number > maximum:
        raise ImproperlyConfigured(f"{name}: expected at most {maximum}, got {number}")
    return number


def env_int_or_auto(name: str, *, maximum: int = LARGEST) -> int:
    """A whole number; 0, like ``auto`` and no value, leaves the choice to us."""
    if env_text(name).strip().lower() == "auto":
        return 0
    try:
        return env_int(name, 0, minimum=0, maximum=maximum)
    except ImproperlyConfigured as error:
        reason = str(error).replace("a whole number", "auto or a whole number")
        raise ImproperlyConfigured(reason) from None


def env_choice(name: str, default: str, choices: tuple[str, ...]) -> str:
    """One of ``choices``; anything else stops the start."""
    value = env_text(name).strip() or default
    if value not in choices:
        raise ImproperlyConfigured(f"{name}: expected one of {', '.join(choices)}, got {value!r}")
    return value


def env_list(name: str, default: str = "") -> list[str]:
    """Comma-separated values, blanks dropped."""
    return [item.strip() for item in env_text(name, default).split(",") if item.strip()]


def env_names(name: str, default: str) -> list[str]:
    """Comma-separated values, at least one; commas or blanks alone stop the start."""
    names = env_list(name, default) if env_text(name) else [default]
    if not names:
        raise ImproperlyConfigured(f"{name}: expected a name, got {env_text(name)!r}")
    return names


def env_hosts(name: str, default: str) -> list[str]:
    """Comma-separated host names or addresses. One with a scheme, a port or a path stops the start,
    because no request would ever match it."""
    hosts = env_list(name, default)
    for host in hosts:
        if "/" in host or (":" in host and not host.startswith("[")) or "]:" in host:
            raise ImproperlyConfigured(
                f"{name}: expected host names without scheme and port, got {host!r}"
            )
    return hosts


def env_origins(name: str) -> list[str]:
    """Comma-separated origins; one without a scheme stops the start."""
    origins = env_list(name)
    for origin in origins:
        if not origin.startswith(("http://", "https://")):
            raise ImproperlyConfigured(f"{name}: expected https://HOST, got {origin!r}")
    return origins


def env_url(name: str) -> str:
    """Scheme, host and port of an address, or nothing; anything else stops the start."""
    value = env_text(name).strip().rstrip("/").lower()
    if value and not re.fullmatch(r"https?://([\w.-]+|\[[\da-fA-F:.]+\])(:\d{1,5})?", value):
        raise ImproperlyConfigured(f"{name}: expected https://HOST without a path, got {value!r}")
    return value


def env_bucket(name: str) -> str:
    """``s3://BUCKET`` or ``s3://BUCKET/PREFIX``, or nothing; anything else stops the start."""
    value = env_text(name).strip().rstrip("/")
    form = r"s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9](/\w[\w.=+-]*)*"
    if value and not re.fullmatch(form, value, re.ASCII):
        raise ImproperlyConfigured(f"{name}: expected s3://BUCKET/PREFIX, got {value!r}")
    return value


def env_database(name: str) -> dj_database_url.DBConfig:
    """Django's settings for the Postgres of a URL; anything else stops the start."""
    # The value is not shown: it may contain a password.
    expected = f"{name}: expected postgresql://USER:PASSWORD@HOST:PORT/NAME"
    try:
        database = dj_database_url.parse(env_text(name).strip())
    except dj_database_url.UnknownSchemeError:
        raise ImproperlyConfigured(f"{expected}, got a URL of another kind") from None
    except ValueError:
        raise ImproperlyConfigured(f"{expected}, got a value that is not a URL") from None
    if database["ENGINE"] != "django.db.backends.postgresql":
        raise ImproperlyConfigured(f"{expected}, got a URL of another kind")
    options = {**database.get("OPTIONS", {})}
    if not database["NAME"] and "service" not in options:
        raise ImproperlyConfigured(f"{expected}, got one without a NAME")
    options.pop("assume_role", None)  # Django's own
    try:
        make_conninfo(**options)
    except psycopg.ProgrammingError as error:
        raise ImproperlyConfigured(f"{name}: {str(error).strip()}") from None
    return database


def kept_secret(path: Path) -> str:
    """The secret that ``up`` stores there, so that a command signs queue entries as the server
    does. If there is none to read, a new one for this process only."""
    try:
        return path.read_text().strip() or secrets.token_urlsafe(50)
    except OSError:
        return secrets.token_urlsafe(50)
