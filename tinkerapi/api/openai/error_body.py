"""The one shape of OpenAI's errors. Knows no rows, so that it is there before Django is set up."""

from __future__ import annotations

import re
from http import HTTPStatus
from typing import Any

_PARAM = re.compile(r"([a-z][\w.\[\]]*): ")
"""The field that a message is about."""


REQUEST_ID = "x-request-id"
"""Of an answer: the future's id where there is one, or the id under which the log has the cause."""

CODES = {
    "ModelNotFound": "model_not_found",
    "ContextLengthExceeded": "context_length_exceeded",
    "QueueFull": "rate_limit_exceeded",
    "NotFound": "unknown_url",
    "MethodNotAllowed": "method_not_supported",
}
"""What OpenAI calls our errors, where its clients know a name; the others keep ours."""


def error_body(status: int, message: str, code: str) -> dict[str, Any]:
    """An error as OpenAI's clients read it."""
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
