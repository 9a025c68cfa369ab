"""The rule that distinguishes the official SDK's requests from the quick reference's.

Both use the same paths. The SDK names itself in a header, sends protobuf, or numbers its
requests with ``seq_id``; all other requests use the quick reference.
"""

from __future__ import annotations

from django.http import HttpRequest

PROTOBUF = "application/x-protobuf"

SEQ_ID = "seq_id"
"""The field by which the SDK numbers its requests."""

SEQ_ID_WORD = b'"seq_id"'
"""Contained in the SDK's JSON bodies, and hardly in others."""


def is_sdk_dialect(request: HttpRequest) -> bool:
    """Whether the official SDK sent this, by its headers; JSON with ``SEQ_ID`` is the SDK's too."""
    return "X-Stainless-Package-Version" in request.headers or request.content_type == PROTOBUF
