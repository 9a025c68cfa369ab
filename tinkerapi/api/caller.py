"""The sender of a request, and the sender's key for it."""

from __future__ import annotations

from typing import cast

from rest_framework.request import Request

from training.errors import InvalidRequest

MAX_IDEMPOTENCY_KEY = 200


def owner_of(request: Request) -> int:
    """The id of the request's user; DRF's permissions ensure that there is one."""
    return cast(int, request.user.pk)


def idempotency_key_of(request: Request) -> str | None:
    """The client's key of this request: a repeat returns the first future."""
    key = request.headers.get("Idempotency-Key")
    if key is None:
        return None
    if not (0 < len(key) <= MAX_IDEMPOTENCY_KEY and key.isascii() and key.isprintable()):
        raise InvalidRequest(
            f"Idempotency-Key: expected 1 to {MAX_IDEMPOTENCY_KEY} printable ASCII characters"
        )
    return key
