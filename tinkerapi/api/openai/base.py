"""Shared by the OpenAI-compatible views: the error shape, and whether a client may retry.

Statuses come from the table in ``tinkerapi.api.errors``; only the body's shape is OpenAI's:
``{"error": {"message", "type", "param", "code"}}``. OpenAI's clients send 408, 409, 429 and 5xx
again unless ``x-should-retry`` is false, as it is if the same request would fail again.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any, ClassVar

import orjson
from django.conf import settings
from django.http import HttpResponse
from rest_framework.exceptions import APIException

from futures.models import Future
from futures.transitions import Category, State
from tinkerapi.api.async_view import AsyncAPIView
from tinkerapi.api.openai.error_body import REQUEST_ID, error_body
from tinkerapi.api.renderers import JSONResponse


class ModelNotFound(APIException):
    """No such model; another owner's model gets the same answer."""

    status_code = HTTPStatus.NOT_FOUND
    default_detail = "model: no such model"


class SampleFailed(APIException):
    """An accepted request that has failed, or that took too long to wait for."""

    default_code = "ServerError"
    request_id = ""


def model_not_found(model: str) -> ModelNotFound:
    """The error with the requested name."""
    return ModelNotFound(f"model: {model[:200]!r} does not exist, or it is not yours")


def failure(future: Future, status: int, detail: str, code: str) -> SampleFailed:
    """The error with its status and the name of its cause."""
    error = SampleFailed(detail, code)
    error.status_code = status
    error.request_id = future.id
    return error


def sample_failed(future: Future, names: Mapping[str, str]) -> SampleFailed:
    """The error for a future that ended without a result.

    Args:
        names: The client's names of fields at the beginning of the worker's message.
    """
    if future.state == State.CANCELLED:
        return failure(future, HTTPStatus.CONFLICT, "The request was cancelled.", "FutureCancelled")
    is_users = future.category == Category.USER
    status = HTTPStatus.BAD_REQUEST if is_users else HTTPStatus.INTERNAL_SERVER_ERROR
    detail = future.error
    for ours, theirs in names.items():
        if re.match(rf"{ours}[:\[.]", detail):
            detail = theirs + detail.removeprefix(ours)
            break
    return failure(future, status, detail, future.error_code or SampleFailed.default_code)


def not_finished(future: Future) -> SampleFailed:
    """The error for a future that took too long."""
    return failure(
        future,
        HTTPStatus.GATEWAY_TIMEOUT,
        f"Not finished after {settings.SYNC_TIMEOUT_SECONDS} s; it continues, and "
        f"/retrieve_future has its result under {future.id}.",
        "Timeout",
    )


class OpenAIView(AsyncAPIView):
    """A view with OpenAI's errors; it is not in the OpenAPI description."""

    schema = None
    group: ClassVar[str] = "OpenAI's clients"

    def handle_exception(self, exc: Exception) -> Any:
        planned: HttpResponse = super().handle_exception(exc)
        body = orjson.loads(planned.content)
        code = str(exc.get_codes()) if isinstance(exc, SampleFailed) else body["error_code"]
        response = JSONResponse(
            error_body(planned.status_code, body["detail"], code), status=planned.status_code
        )
        for header in ("WWW-Authenticate", "Retry-After"):
            if header in planned:
                response[header] = planned[header]
        if isinstance(exc, SampleFailed):
            response["x-should-retry"] = "false"
            response[REQUEST_ID] = exc.request_id
        elif "log_id" in body:
            response[REQUEST_ID] = body["log_id"]
        return response
