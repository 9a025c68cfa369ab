"""What can go wrong with a future, each class with the sentence its reader needs."""

from __future__ import annotations


class FutureError(Exception):
    """The future cannot be used like this."""

    def __str__(self) -> str:
        return super().__str__() or (self.__class__.__doc__ or "").strip()


class FutureNotFound(FutureError):
    """No future has this request id."""

    @classmethod
    def named(cls, request_id: str) -> FutureNotFound:
        """The error with the id that was asked for."""
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
    """As many of your requests wait as one user may have; send it again when some are done."""


class QueueNotServed(FutureError):
    """The server runs no worker for the future's queue, so what is submitted there would wait in
    vain; serve its base model again first."""


class PayloadTooLarge(FutureError):
    """The payload is larger than this server allows once decompressed."""


class Fenced(FutureError):
    """This worker was replaced: its epoch no longer owns the futures it wanted to finish."""


class QueueTaken(FutureError):
    """Another live worker serves this queue."""
