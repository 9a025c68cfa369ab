"""Futures as HTTP answers: one form for a waiting call and for ``/retrieve_future``.

``/retrieve_future`` answers 500 for every failed future, although that is a normal outcome: the
quick reference's clients loop until they see 200 or an error, and this is the error. Asking again
gives the same answer. A waiting call answers with the status of the mistake, wherever it was found.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from django.db import InterfaceError, OperationalError

from futures.errors import FuturePurged
from futures.models import Future
from futures.queue_positions import QueuePosition
from futures.selectors import PAUSED, future_get
from futures.transitions import State
from futures.waiters import future_wait
from tinkerapi.api.errors import error_response, failure_status
from tinkerapi.api.quickref.render_results import result_body
from tinkerapi.api.renderers import JSONResponse
from tinkerapi.api.results import rendered
from tinkerapi.api.threads import in_database_thread
from training.kinds import stored_result
from training.loss_fns import LOSS_FNS
from training.waiting import future_waiting, waits_for_nobody

RETRY_AFTER_SECONDS = 1


def final_answer(future: Future, *, is_known: bool) -> JSONResponse:
    """A final future's answer.

    Args:
        is_known: See ``waited_answer``.

    Raises:
        FuturePurged: It was ready, and its result is no longer kept. (410)
    """
    if future.state == State.READY:
        if future.result is None:
            raise FuturePurged
        return JSONResponse(result_body(stored_result(future.kind, bytes(future.result))))
    if future.state == State.CANCELLED:
        return error_response(
            409,
            "Job cancelled: its owner withdrew it.",
            error_code="FutureCancelled",
            request_id=future.id,
        )
    return error_response(
        failure_status(future.category, future.error_code) if is_known else 500,
        f"Job failed: {future.error}",
        error_code=future.error_code or "ServerError",
        category=future.category,
        request_id=future.id,
    )


def pending_answer(future: Future, **more: Any) -> JSONResponse:
    """202: not finished. Needs the database."""
    return _pending(future.id, future_waiting(future), **more)


def _pending(request_id: str, found: QueuePosition, **more: Any) -> JSONResponse:
    body = {
        "status": "pending",
        "request_id": request_id,
        "queue_position": found.position,
        "estimated_wait_seconds": found.estimated_wait_seconds,
        "queue_state": found.state,
        "queue_state_reason": found.reason,
        **more,
    }
    response = JSONResponse(body, status=202)
    response["Retry-After"] = str(RETRY_AFTER_SECONDS)
    return response


async def waited_answer(
    request_id: str,
    *,
    owner_id: int,
    timeout_seconds: float,
    is_known: bool = False,
    **more: Any,
) -> JSONResponse:
    """The answer once the future is final, or 202 when the time is up; at once if no worker of
    this server will ever run it.

    Holds no thread, no connection and no request body meanwhile; if the client goes away, nothing
    is lost.

    Args:
        is_known: The caller has just submitted it: the answer names it even if Postgres has gone
            down since, because it was accepted; and a failure has its own HTTP status.

    Raises:
        FutureNotFound: The owner has no such future. (404)
    """
    final = await future_wait(
        request_id,
        owner_id=owner_id,
        timeout_seconds=timeout_seconds,
        is_known=is_known,
        is_hopeless=waits_for_nobody,
    )
    if final is None:

        def pending() -> JSONResponse:
            return pending_answer(future_get(request_id=request_id, owner_id=owner_id), **more)

        try:
            return await in_database_thread(pending)
        except (OperationalError, InterfaceError):
            if not is_known:
                raise
            found = QueuePosition(None, None, PAUSED, "The database does not answer.")
            return _pending(request_id, found, **more)
    return await rendered(final, partial(final_answer, is_known=is_known))


def loss_fns_description() -> dict[str, dict[str, Any]]:
    """Each loss function's inputs and settings with their defaults, by name; not those that need
    the provenance of recorded samples, which only the SDK can send."""
    return {
        name: {
            "inputs": list(spec.inputs),
            "optional_inputs": list(spec.optional_inputs),
            "config": {setting: spec.config[setting].default for setting in spec.config},
        }
        for name, spec in LOSS_FNS.items()
        if not spec.needs_provenance
    }
