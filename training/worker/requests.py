"""The request of a claimed future."""

from __future__ import annotations

from futures.models import Future
from training.kinds import Request, stored_request


def request_of(future: Future) -> Request:
    """The future's request: an instance of its kind's class."""
    return stored_request(future.kind, bytes(future.payload or b""))
