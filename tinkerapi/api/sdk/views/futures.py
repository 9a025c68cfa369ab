"""Futures: retrieve one, cancel one.

A failed operation is a normal answer here, 200 with ``error`` and ``category``; 408 says that
it is still pending. The client polls again at once after every 408 and 5xx, so the server
holds the poll.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from typing import Any, ClassVar

from django.http import HttpResponse
from rest_framework.request import Request

from futures.cancelling import future_cancel
from futures.errors import FutureNotCancellable, FuturePurged
from futures.models import Future
from futures.selectors import future_get
from futures.transitions import Category, State
from futures.waiters import future_wait
from tinkerapi.api import threads
from tinkerapi.api.caller import owner_of
from tinkerapi.api.dialect import PROTOBUF
from tinkerapi.api.fields.field import Field, Flag
from tinkerapi.api.fields.futures import REQUEST_ID
from tinkerapi.api.renderers import JSONResponse, to_json
from tinkerapi.api.results import rendered
from tinkerapi.api.sdk.base import SdkView, empty_response
from tinkerapi.api.sdk.render.json_results import result_json
from tinkerapi.api.sdk.render.protobuf import encode_forward_backward_output, encode_sample_response
from training.kinds import ForwardBackwardResult, Result, SampleResult, stored_result
from training.waiting import future_waiting

POLL_SECONDS = 25.0
"""How long a poll is held; the client itself gives up after 45."""

METADATA_ONLY_BYTES = 1024 * 1024
"""A result of at least this size is announced first, if the client allows it, so that it can
reserve memory. Smaller ones are not worth another round trip."""

_PROTOBUF: Mapping[type[Result], Callable[[Any], bytes]] = {
    ForwardBackwardResult: encode_forward_backward_output,
    SampleResult: encode_sample_response,
}
"""Results that clients before 0.25 read as JSON."""


def final_answer(
    future: Future, *, accepts_protobuf: bool, allow_metadata_only: bool
) -> HttpResponse:
    """A final future's answer.

    Raises:
        FuturePurged: It was ready, and its result is no longer kept. (410)
    """
    if future.state == State.CANCELLED:
        return JSONResponse({"error": "The request was cancelled.", "category": Category.USER})
    if future.state == State.FAILED:
        return JSONResponse({"error": future.error, "category": future.category})
    if future.result is None:
        raise FuturePurged
    result = stored_result(future.kind, bytes(future.result))
    body, content_type = _rendered(result, accepts_protobuf)
    if allow_metadata_only and len(body) >= METADATA_ONLY_BYTES:
        return JSONResponse({"status": "complete_metadata", "response_payload_size": len(body)})
    return HttpResponse(body, content_type=content_type)


def _rendered(result: Result, accepts_protobuf: bool) -> tuple[bytes, str]:
    """Body and content type of a result."""
    if accepts_protobuf and type(result) in _PROTOBUF:
        return _PROTOBUF[type(result)](result), PROTOBUF
    return to_json(result_json(result)), "application/json"


def pending_answer(future: Future) -> HttpResponse:
    """408: poll again. Needs the database.

    The SDK reads the state and its reason; the rest is for people, in the quick reference's words.
    """
    place = future_waiting(future)
    return JSONResponse(
        {
            "type": "try_again",
            "request_id": future.id,
            "queue_state": place.state,
            "queue_state_reason": place.reason,
            "queue_position": place.position,
            "estimated_wait_seconds": place.estimated_wait_seconds,
        },
        status=408,
    )


class RetrieveFutureView(SdkView):
    """A future's result; the poll is held until it is final or the time is up."""

    fields: ClassVar[Mapping[str, Field]] = {
        "request_id": REQUEST_ID,
        "allow_metadata_only": Flag(description="Only the size is needed.", default=False),
    }

    def post(self, request: Request) -> Awaitable[HttpResponse]:
        body = self.checked_body(request)
        form = {
            "accepts_protobuf": PROTOBUF in request.headers.get("Accept", ""),
            "allow_metadata_only": body["allow_metadata_only"],
        }
        return self._waited(body["request_id"], owner_of(request), form)

    async def _waited(self, request_id: str, owner_id: int, form: dict[str, bool]) -> HttpResponse:
        final = await future_wait(request_id, owner_id=owner_id, timeout_seconds=POLL_SECONDS)
        if final is None:
            return await threads.in_database_thread(
                lambda: pending_answer(future_get(request_id=request_id, owner_id=owner_id))
            )
        return await rendered(final, lambda future: final_answer(future, **form))


class CancelFutureView(SdkView):
    """Cancel a request that the client no longer waits for; too late is no error."""

    fields: ClassVar[Mapping[str, Field]] = {"request_id": REQUEST_ID}

    def post(self, request: Request) -> HttpResponse:
        body = self.checked_body(request)
        with suppress(FutureNotCancellable):
            future_cancel(request_id=body["request_id"], owner_id=owner_of(request))
        return empty_response()
