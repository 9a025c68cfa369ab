"""Futures: retrieve_future, cancel_future."""

from __future__ import annotations

from collections.abc import Awaitable, Mapping
from typing import Any, ClassVar

from django.conf import settings
from django.http import HttpResponse
from rest_framework.request import Request

from futures.cancelling import future_cancel
from tinkerapi.api.caller import owner_of
from tinkerapi.api.fields.field import Field, Schema
from tinkerapi.api.fields.futures import REQUEST_ID
from tinkerapi.api.quickref.render import waited_answer
from tinkerapi.api.quickref.views.base import WAIT, ApiView
from tinkerapi.api.renderers import JSONResponse


class RetrieveFutureView(ApiView):
    """Ask for a future's result, as often as you like.

    Answers 202 while it is pending, then 200 with the result itself. Without `wait` it
    answers at once.
    """

    group = "Futures"
    fields: ClassVar[Mapping[str, Field]] = {"request_id": REQUEST_ID, "wait": WAIT}
    answer: ClassVar[Schema] = {
        "type": "object",
        "description": "The answer of the waiting form of the call.",
    }
    answer_example: ClassVar[Any] = {"loss": 2.31, "model_id": "my_model"}
    errors: ClassVar[Mapping[int, str]] = {
        202: "Still pending.",
        404: "You have no future of this id.",
        409: "It was cancelled.",
        410: "Its result is no longer kept.",
        500: "The operation failed; `detail` says why.",
    }

    def post(self, request: Request) -> Awaitable[HttpResponse]:
        body = self.checked_body(request)
        wait = min(body["wait"] or 0, settings.MAX_WAIT_SECONDS)
        return waited_answer(body["request_id"], owner_id=owner_of(request), timeout_seconds=wait)


class CancelFutureView(ApiView):
    """Cancel a request that has not begun, or a running sample.

    Its place in the order is skipped. A cancelled sample has no result. Training that has
    begun continues to its end.
    """

    group = "Futures"
    fields: ClassVar[Mapping[str, Field]] = {"request_id": REQUEST_ID}
    answer: ClassVar[Schema] = {
        "type": "object",
        "properties": {
            "status": {"type": "string", "enum": ["cancelled"]},
            "request_id": {"type": "string"},
        },
        "required": ["status", "request_id"],
    }
    answer_example: ClassVar[Any] = {
        "status": "cancelled",
        "request_id": "future_0123456789abcdef0123456789abcdef",
    }
    errors: ClassVar[Mapping[int, str]] = {
        404: "You have no future of this id.",
        409: "It is finished, or it is training that is running and continues to its end.",
    }

    def post(self, request: Request) -> HttpResponse:
        body = self.checked_body(request)
        future_cancel(request_id=body["request_id"], owner_id=owner_of(request))
        return JSONResponse({"status": "cancelled", "request_id": body["request_id"]})
