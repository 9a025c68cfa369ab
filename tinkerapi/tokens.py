"""Short-lived tokens that stand for an API key: JWT, HS256, signed with SECRET_KEY.

A token names the key it was issued for, and is worth no more than that key: revoking the key
closes its tokens too. Written out because one algorithm with one claim set is thirty lines, and
the choice of algorithm by the token's own header is what JWT libraries were attacked through.
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

TOKEN_PREFIX = "eyJ"  # noqa: S105 - what base64 makes of the beginning of every header
"""How a token is told from a key."""

LIFETIME_SECONDS = 3600
ORGANIZATION = "tinkerapi"

_HEADER = b'{"alg":"HS256","typ":"JWT"}'
_SALT = b"tinkerapi.tokens"


def token_issue(api_key: ApiKey) -> str:
    """A token for whom the key speaks for, good for an hour.

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
    """The key that a token stands for, with its user; None if the token or the key is not good."""
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
    # A key of its own, so that nothing else that SECRET_KEY signs can be taken for a token.
    key = hashlib.sha256(_SALT + settings.SECRET_KEY.encode()).digest()
    return _encode(hmac.digest(key, signed.encode("utf-8", "surrogatepass"), "sha256"))
