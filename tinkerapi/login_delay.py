"""Slows down the guessing of admin passwords without locking out the right person.

It counts failures of a user from one address, of an address, and of a user from all addresses. Each
counter has some free failures; every further one delays the next attempt for twice as long as the
last, up to a minute (a user from all addresses: up to five seconds). During the delay no password
is checked, and an attempt does not lengthen it, so the right password works after it. A user's own
address, from which a login succeeded recently, does not wait because of others' attempts for the
name.

An attempt counts as failed before its password is checked, in the same transaction that checks
the counters, and is uncounted if it succeeds: so a thousand concurrent attempts gain nothing.
"""

from __future__ import annotations

import hashlib
import ipaddress
from dataclasses import dataclass
from datetime import timedelta

from django.db import transaction
from django.http import HttpRequest
from django.utils import timezone

from futures.database import alias, execute
from tinkerapi.models import FailedLogins
from training.audit import audit_logged_in_lately

FORGET = timedelta(hours=1)
"""After this time without a failure a counter starts again at zero."""

KNOWN = timedelta(days=30)
"""How long an address counts as a user's own after a login."""


@dataclass(frozen=True)
class _Counter:
    key: str
    free: int
    """Failures without a delay."""
    longest_seconds: int


# In the order of keys, because two attempts that lock each other's rows would deadlock.
_COUNT = """
INSERT INTO tinkerapi_failedlogins AS known (key, failures, last_at, closed_until)
SELECT key, 1, statement_timestamp(), statement_timestamp()
FROM unnest(%(keys)s::text[]) AS key ORDER BY key
ON CONFLICT (key) DO UPDATE SET
    failures = CASE WHEN known.last_at < statement_timestamp() - %(forget)s THEN 1
        ELSE known.failures + 1 END
RETURNING key, failures,
    greatest(0, extract(epoch FROM closed_until - statement_timestamp()))::float8
"""

_CLOSE = """
UPDATE tinkerapi_failedlogins AS known SET last_at = statement_timestamp(),
    closed_until = statement_timestamp() + make_interval(secs => counted.seconds)
FROM unnest(%(keys)s::text[], %(seconds)s::float8[]) AS counted (key, seconds)
WHERE known.key = counted.key
"""


def client_address(request: HttpRequest) -> str:
    """The client's address; of an IPv6 address only the network prefix of one customer."""
    address = str(request.META.get("REMOTE_ADDR", ""))
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return address[:100]
    if isinstance(parsed, ipaddress.IPv6Address):
        return str(parsed.ipv4_mapped or ipaddress.ip_network((parsed, 64), strict=False))
    return str(parsed)


def login_begin(*, username: str, address: str) -> float:
    """Count an attempt as failed; 0 if its password may be checked, else the seconds to wait.

    An attempt that has to wait is not counted. Opens its own transaction.
    """
    counters = {counter.key: counter for counter in _counters(username, address)}
    _forget()
    with transaction.atomic(using=alias()):
        counted = execute(_COUNT, {"keys": sorted(counters), "forget": FORGET})
        wait = max(float(closed_seconds) for _, _, closed_seconds in counted)
        if wait > 0:
            transaction.set_rollback(True, using=alias())
            return wait
        seconds = [_delay(counters[key], int(failures)) for key, failures, _ in counted]
        execute(_CLOSE, {"keys": [key for key, _, _ in counted], "seconds": seconds})
    return 0.0


def login_succeeded(*, username: str, address: str) -> None:
    """Uncount the attempt of ``login_begin``, and clear the user's earlier failures."""
    of_pair, of_address, of_user = _every_counter(username, address)
    with transaction.atomic(using=alias()):
        FailedLogins.objects.filter(key__in=[of_pair.key, of_user.key]).delete()
        execute(
            """
            UPDATE tinkerapi_failedlogins
            SET failures = failures - 1, closed_until = statement_timestamp()
            WHERE key = %(key)s AND failures > 0
            """,
            {"key": of_address.key},
        )


def _forget() -> None:
    """Delete counters without recent failures, except those that another attempt has locked."""
    old = FailedLogins.objects.filter(last_at__lt=timezone.now() - 2 * FORGET)
    with transaction.atomic(using=alias()):
        keys = list(old.select_for_update(skip_locked=True).values_list("key", flat=True)[:1000])
        FailedLogins.objects.filter(key__in=keys).delete()


def _delay(counter: _Counter, failures: int) -> float:
    excess = failures - counter.free
    return 0.0 if excess <= 0 else float(min(counter.longest_seconds, 2 ** min(excess - 1, 20)))


def _counters(username: str, address: str) -> list[_Counter]:
    of_pair, of_address, of_user = _every_counter(username, address)
    if audit_logged_in_lately(username=username, address=address, within=KNOWN):
        return [of_pair, of_address]
    return [of_pair, of_address, of_user]


def _every_counter(username: str, address: str) -> tuple[_Counter, _Counter, _Counter]:
    return (
        _Counter(_key("pair", username, address), free=5, longest_seconds=60),
        _Counter(_key("address", address), free=20, longest_seconds=60),
        _Counter(_key("user", username), free=10, longest_seconds=5),
    )


def _key(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode(errors="replace")).hexdigest()
