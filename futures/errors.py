"""The errors of futures; each docstring is the message for the user."""

from __future__ import annotations


class FutureError(Exception):
    """The future cannot be used like this."""

    def __str__(self) -> str:
        return super().__str__() or (self.__class__.__doc__ or "").strip()


class FutureNotFound(FutureError):
    """No future has this request id."""

    @classmethod
    def named(cls, request_id: str) -> FutureNotFound:
        """The error with the requested id."""
        return cls(f"request_id: you have no future {request_id[:60]!r}")


class FuturePurged(FutureError):
    """The future is final, but its result was pruned by the server's retention policy."""


class FuturePayloadPruned(FutureError):
    """The future's payload was pruned, so it cannot be submitted again."""


class LaneNumberedByClient(FutureError):
    """The requests of this lane are numbered by their client, whose next number must stay free."""


class FutureNotCancellable(FutureError):
    """The future is finished, so there is nothing to cancel."""


class SeqIdReused(FutureError):
    """This seq id was already used in its lane for another request."""


class IdempotencyKeyReused(FutureError):
    """This Idempotency-Key was already used for another request."""


class QueueFull(FutureError):
    """The most requests that one user may have are waiting; send this one again when some are
    done."""


class QueueNotServed(FutureError):
    """The server runs no worker for the future's queue, so the request would wait in
    vain; serve its base model again first."""


class PayloadTooLarge(FutureError):
    """The decompressed payload is larger than this server allows."""


class Fenced(FutureError):
    """This worker's life was ended by others: its epoch no longer owns the futures it wanted to
    finish."""


class QueueTaken(FutureError):
    """A worker of a former version of this software serves this queue; stop it first."""
