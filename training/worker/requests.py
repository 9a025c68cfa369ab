"""The request of a claimed future."""

from __future__ import annotations

from futures.models import Future
from futures.payload import decode
from training.kinds import Request, request_from_payload


def request_of(future: Future) -> Request:
    """The future's request: an instance of its kind's class."""
    return request_from_payload(future.kind, decode(bytes(future.payload or b"")))
