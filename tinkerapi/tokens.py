"""Short-lived tokens in place of an API key: JWT, HS256, signed with SECRET_KEY.

A token names the key that it was issued for, and is worth no more than that key: revoking the key
revokes its tokens too. This is our own code because one algorithm with one set of claims is thirty
lines, and attacks on JWT libraries used the choice of algorithm in the token's header.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import time
from typing import Any

import orjson
from django.conf import settings

from tinkerapi.models import ApiKey
from tinkerapi.selectors import api_key_by_id

TOKEN_PREFIX = "eyJ"  # noqa: S105 - the beginning of every header in base64
"""Distinguishes a token from a key."""

LIFETIME_SECONDS = 3600
ORGANIZATION = "tinkerapi"

_HEADER = b'{"alg":"HS256","typ":"JWT"}'
_SALT = b"tinkerapi.tokens"


def token_issue(api_key: ApiKey) -> str:
    """A token for the key's user, valid for an hour.

    Claims: ``sub`` and ``org_id``, which the SDK shows as the user and organization, ``email``
    if the user has one, ``iat`` and ``exp`` in seconds, and ``key_id``.
    """
    now = int(time.time())
    claims = {
        "sub": f"tml:user:{api_key.user.get_username()}",
        "org_id": ORGANIZATION,
        "iat": now,
        "exp": now + LIFETIME_SECONDS,
        "key_id": api_key.pk,
    }
    email = getattr(api_key.user, "email", "")
    if email:
        claims["email"] = email
    signed = f"{_encode(_HEADER)}.{_encode(orjson.dumps(claims))}"
    return f"{signed}.{_signature(signed)}"


def token_verify(token: str) -> ApiKey | None:
    """The key of a token, with its user; None if the token or the key is invalid."""
    signed, _, signature = token.rpartition(".")
    header, _, payload = signed.partition(".")
    good = hmac.compare_digest(_signature(signed).encode(), signature.encode())
    if not good or header != _encode(_HEADER):
        return None
    claims: dict[str, Any] = orjson.loads(base64.urlsafe_b64decode(payload + "=="))
    if claims["exp"] <= time.time():
        return None
    return api_key_by_id(claims["key_id"])


def _encode(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def _signature(signed: str) -> str:
    # A separate key, so that nothing else signed with SECRET_KEY can be used as a token.
    key = hashlib.sha256(_SALT + settings.SECRET_KEY.encode()).digest()
    return _encode(hmac.digest(key, signed.encode("utf-8", "surrogatepass"), "sha256"))
