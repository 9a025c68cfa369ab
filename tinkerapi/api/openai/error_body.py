"""The shape of OpenAI's errors. It uses no models, so it works before Django is set up."""

from __future__ import annotations

import re
from http import HTTPStatus
from typing import Any

_PARAM = re.compile(r"([a-z][\w.\[\]]*): ")
"""The field that a message is about."""


REQUEST_ID = "x-request-id"
"""Header of an answer: the future's id if there is one, or the id of the cause in the log."""

CODES = {
    "ModelNotFound": "model_not_found",
    "ContextLengthExceeded": "context_length_exceeded",
    "QueueFull": "rate_limit_exceeded",
    "NotFound": "unknown_url",
    "MethodNotAllowed": "method_not_supported",
}
"""OpenAI's names for our errors, if its clients know one; the others keep ours."""


def error_body(status: int, message: str, code: str) -> dict[str, Any]:
    """An error in the form that OpenAI's clients read."""
    if status == HTTPStatus.UNAUTHORIZED:
        code = "invalid_api_key"
    param = _PARAM.match(message)
    return {
        "error": {
            "message": message,
            "type": _type(status),
            "param": param[1] if param else None,
            "code": CODES.get(code, code),
        }
    }


def _type(status: int) -> str:
    if status == HTTPStatus.TOO_MANY_REQUESTS:
        return "rate_limit_error"
    return "invalid_request_error" if status < 500 else "server_error"
