"""The rule that distinguishes the official SDK's requests from the quick reference's.

Both use the same paths. The SDK names itself in a header, sends protobuf, or numbers its
requests with ``seq_id``; all other requests use the quick reference.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from django.http import HttpRequest

PROTOBUF = "application/x-protobuf"

SEQ_ID_WORD = b'"seq_id"'
"""Contained in the SDK's JSON bodies, and hardly in others."""


def is_sdk_dialect(request: HttpRequest, body: Mapping[str, Any] | None = None) -> bool:
    """Whether the official SDK sent this; ``body`` is the decoded JSON, once there is one."""
    return (
        "X-Stainless-Package-Version" in request.headers
        or request.content_type == PROTOBUF
        or (body is not None and "seq_id" in body)
    )
