"""The one table from error class to HTTP status, and the one shape of every error answer.

``{"detail": str, "error_code": str, "category": "user" | "server"}``: the message for a
person, the class name for a program, and who caused it. Domain errors know no HTTP; a
test walks their subclasses and fails if one has no row here.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Mapping
from typing import Any

from django.core.exceptions import PermissionDenied, SuspiciousOperation
from django.db import DataError, InterfaceError, OperationalError
from django.http import Http404, HttpRequest, HttpResponse
from django.views import defaults
from rest_framework import exceptions

from futures import errors as futures_errors
from futures.log_fields import about
from futures.plain import plain_text
from futures.transitions import Category
from tinkerapi.api.renderers import JSONResponse
from tinkerapi.page_addresses import is_page
from training import errors as training_errors

logger = logging.getLogger(__name__)

RETRY_AFTER_SECONDS = 2

STATUS: Mapping[type[Exception], int] = {
    training_errors.TrainingError: 400,
    training_errors.InvalidRequest: 400,
    training_errors.InvalidDatum: 400,
    training_errors.LimitExceeded: 400,
    training_errors.ContextLengthExceeded: 400,
    training_errors.StorageQuotaExceeded: 413,
    training_errors.TokenQuotaExceeded: 403,
    training_errors.SessionNotFound: 404,
    training_errors.SessionFinished: 400,
    training_errors.SamplingSessionNotFound: 404,
    training_errors.RunNotFound: 404,
    training_errors.RunExists: 409,
    training_errors.RunNotCreated: 404,
    training_errors.CheckpointNotFound: 404,
    training_errors.CheckpointExists: 409,
    training_errors.BaseModelNotFound: 404,
    training_errors.DeviceNotFound: 500,
    training_errors.WorkerDisagrees: 500,
    training_errors.NonFiniteResult: 400,
    training_errors.GradientDropped: 400,
    training_errors.OutOfMemory: 503,
    training_errors.StorageFull: 507,
    training_errors.StorageFailed: 500,
    training_errors.RunLost: 410,
    futures_errors.FutureError: 400,
    futures_errors.FutureNotFound: 404,
    futures_errors.FuturePurged: 410,
    futures_errors.FuturePayloadPruned: 410,
    futures_errors.FutureNotCancellable: 409,
    futures_errors.LaneNumberedByClient: 409,
    futures_errors.QueueNotServed: 409,
    futures_errors.SeqIdReused: 409,
    futures_errors.IdempotencyKeyReused: 409,
    futures_errors.QueueFull: 429,
    futures_errors.PayloadTooLarge: 413,
    futures_errors.Fenced: 500,
    futures_errors.QueueTaken: 500,
}
"""Domain error class to the status of a request that raises it."""

UNSTORABLE = (DataError, UnicodeEncodeError)
"""Errors of the database, or of its driver, for a value that no column can store.

Fields check their values by name, so these are for values that no field foresaw: U+0000 in a text,
half a surrogate pair, a number or a date out of range."""

_STATUS_BY_CODE = {error.__name__: status for error, status in STATUS.items()}


class BodyTooLarge(exceptions.APIException):
    """The request body is larger than this server allows."""

    status_code = 413


class SdkDialectNotSpoken(exceptions.APIException):
    """This address does not speak the tinker SDK's dialect."""

    status_code = 400
    default_detail = "this address does not speak the tinker SDK's dialect"


def error_response(
    status: int, detail: str, *, error_code: str, category: str | None = None, **more: Any
) -> JSONResponse:
    """The one error shape; without a category, a status below 500 means ``user``."""
    category = category or ("user" if status < 500 else "server")
    body = {"detail": detail, "error_code": error_code, "category": category, **more}
    response = JSONResponse(body, status=status)
    if status in (429, 503):
        response["Retry-After"] = str(RETRY_AFTER_SECONDS)
    return response


def refusal_of(exc: Exception) -> Exception:
    """The error for the sender: a value that cannot be stored is the sender's mistake."""
    if not isinstance(exc, UNSTORABLE):
        return exc
    logger.warning("refused a value that cannot be stored: %s", plain_text(str(exc), 200))
    return training_errors.InvalidRequest(
        "The request contains a value that cannot be stored: U+0000 or half a surrogate pair in a "
        "text, or a number or date out of range."
    )


def failure_status(category: str, error_code: str) -> int:
    """The status of a waiting call whose future has failed.

    The user's mistakes are a 4xx, as if they had been found at submission.
    """
    return _STATUS_BY_CODE.get(error_code, 400) if category == Category.USER else 500


def exception_handler(exc: Exception, context: Mapping[str, Any]) -> HttpResponse:
    """DRF's hook: every exception of a view becomes an answer, never a traceback.

    An unexpected exception is logged with an id, and the answer contains only the id:
    its text may contain internals.
    """
    exc = refusal_of(exc)
    if isinstance(exc, Http404):
        exc = exceptions.NotFound()
    elif isinstance(exc, PermissionDenied):
        exc = exceptions.PermissionDenied()
    elif isinstance(exc, SuspiciousOperation):
        exc = exceptions.ParseError(str(exc))
    if isinstance(exc, exceptions.APIException):
        response = error_response(exc.status_code, str(exc.detail), error_code=type(exc).__name__)
        if challenge := getattr(exc, "auth_header", None):
            response["WWW-Authenticate"] = challenge
        return response
    for ancestor in type(exc).__mro__:
        if status := STATUS.get(ancestor):
            return error_response(
                status,
                str(exc),
                error_code=type(exc).__name__,
                category=getattr(exc, "category", None),
            )
    if isinstance(exc, OperationalError | InterfaceError):
        logger.warning("the database did not answer: %s", exc)
        return error_response(
            503,
            "The database did not answer. Send the request again, with an Idempotency-Key "
            "header if it must not run twice.",
            error_code="DatabaseUnavailable",
        )
    return unexpected_error(exc, context["request"])


def unexpected_error(exc: BaseException | None, request: HttpRequest) -> JSONResponse:
    """500 with the id of the traceback in the log."""
    log_id = secrets.token_hex(6)
    logger.error(
        "log id %s: %s %s",
        log_id,
        request.method,
        request.path,
        exc_info=exc,
        extra=about(
            log_id=log_id,
            method=request.method,
            path=request.path,
            # Not request.user, which would authenticate the sender again.
            owner=getattr(vars(request).get("_user"), "pk", None),
        ),
    )
    return error_response(
        500,
        f"The server failed; its log has the details under {log_id}.",
        error_code="ServerError",
        log_id=log_id,
    )


def bad_request(request: HttpRequest, exception: Exception) -> HttpResponse:
    """Django's ``handler400``: JSON, but a page in the admin. The next three are similar."""
    if is_page(request.path):
        return defaults.bad_request(request, exception)
    return error_response(400, "The request is malformed.", error_code="BadRequest")


def permission_denied(request: HttpRequest, exception: Exception) -> HttpResponse:
    if is_page(request.path):
        return defaults.permission_denied(request, exception)
    return error_response(403, "This is not allowed.", error_code="PermissionDenied")


def page_not_found(request: HttpRequest, exception: Exception) -> HttpResponse:
    if is_page(request.path):
        return defaults.page_not_found(request, exception)
    return error_response(
        404, f"There is no {request.path}; GET / lists every endpoint.", error_code="NotFound"
    )


def server_error(request: HttpRequest) -> HttpResponse:
    if is_page(request.path):
        return defaults.server_error(request)
    return error_response(500, "The server failed.", error_code="ServerError")
