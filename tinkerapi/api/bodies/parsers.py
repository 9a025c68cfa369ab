"""Bytes to values: the request body as one JSON object, or an error that says why not.

Django has spooled the body to a temporary file by now; it is read into memory only
up to the limit. ``body_limit`` refuses large bodies before they arrive, and
``json_limits`` bounds the cost of decoding them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import IO, Any, cast

import orjson
from django.conf import settings
from django.http import HttpRequest
from rest_framework.exceptions import ParseError, UnsupportedMediaType
from rest_framework.parsers import BaseParser

from tinkerapi.api.bodies.json_limits import check_json_size
from tinkerapi.api.errors import BodyTooLarge

JSON = "application/json"

_NOT_JSON = ("NaN", "Infinity", "-Infinity")

_NAME_BEFORE = re.compile(r'(?<!\\)"([^"\\]{1,60})"\s*:[\[\]\s\d.,eE+-]*$')
"""The field in whose number, or array of numbers, a text ends."""

_LOOK_BACK = 1000  # characters of an array of numbers


class JSONParser(BaseParser):
    """JSON by orjson: UTF-8 only, no NaN, no infinity, no trailing commas."""

    media_type = JSON

    def parse(
        self,
        stream: IO[Any],
        media_type: str | None = None,
        parser_context: Mapping[str, Any] | None = None,
    ) -> Any:
        return parse_json(read_body(stream, settings.MAX_BODY_BYTES))


def read_body(stream: IO[Any], max_bytes: int) -> bytes:
    """The whole body.

    Raises:
        BodyTooLarge: It has more than ``max_bytes``; no more than that was read. (413)
    """
    body: bytes = stream.read(max_bytes + 1)
    if len(body) > max_bytes:
        raise BodyTooLarge(too_large_sentence(max_bytes))
    return body


def json_object(request: HttpRequest, *, max_bytes: int) -> dict[str, Any]:
    """The request's body as a dictionary; without a body it is empty.

    Raises:
        BodyTooLarge: By its Content-Length, or by its actual size. (413)
        LimitExceeded: It nests too deep, or has too many values. (400)
        UnsupportedMediaType: Not JSON, or compressed. (415)
        ParseError: The content is not JSON, or not an object. (400)
    """
    if declared_length(request) > max_bytes:
        raise BodyTooLarge(too_large_sentence(max_bytes))
    if encoding := request.headers.get("Content-Encoding"):
        raise UnsupportedMediaType(
            encoding,
            detail=f"Content-Encoding: {encoding[:40]!r} is not supported; send plain JSON",
        )
    content_type = request.content_type or ""
    if content_type not in ("", JSON):
        raise UnsupportedMediaType(
            content_type, detail=f"Content-Type: expected {JSON}; got {content_type[:100]!r}"
        )
    value = parse_json(read_body(cast(IO[bytes], request), max_bytes))
    if not isinstance(value, dict):
        raise ParseError('The body must be a JSON object, such as {"model_id": "my_model"}.')
    if value and not content_type:
        raise UnsupportedMediaType(
            "", detail=f"Content-Type: expected {JSON}, but the request has no Content-Type"
        )
    return value


def parse_json(body: bytes) -> Any:
    """The value; an empty body counts as ``{}``.

    Raises:
        LimitExceeded: It nests too deep, or has too many values; it was not decoded.
        ParseError: With line and column of the first wrong byte.
    """
    check_json_size(body)
    if not body.strip():
        return {}
    try:
        return orjson.loads(body)
    except orjson.JSONDecodeError as exc:
        rest = exc.doc[exc.pos : exc.pos + 9] if isinstance(exc.doc, str) else ""
        reason = exc.msg
        for literal in _NOT_JSON:
            if rest.startswith(literal):
                reason = f"{literal} is not a JSON number"
                if name := _NAME_BEFORE.search(exc.doc, max(exc.pos - _LOOK_BACK, 0), exc.pos):
                    reason += f", in {name[1]!r}"
        raise ParseError(
            f"The body is not valid JSON: {reason} (line {exc.lineno}, column {exc.colno})."
        ) from None


def declared_length(request: HttpRequest) -> int:
    """The Content-Length of the request; 0 if it has none."""
    length = request.META.get("CONTENT_LENGTH") or ""
    return int(length) if length.isdigit() else 0


def too_large_sentence(max_bytes: int, *, when: str = "") -> str:
    """The reason for refusing a body over the limit of its address; ``when`` is added after the
    size."""
    if max_bytes > settings.MAX_BODY_BYTES:
        return (
            f"The body is larger than {max_bytes} bytes{when}, the limit of an upload; raise "
            "TINKERAPI_MAX_IMPORT_BYTES."
        )
    if max_bytes < settings.MAX_BODY_BYTES:
        return (
            f"The body is larger than {max_bytes} bytes{when}, the limit of addresses that take no "
            "training data and no prompts."
        )
    return (
        f"The body is larger than {max_bytes} bytes{when}; send the data in several requests, or "
        "raise TINKERAPI_MAX_BODY_BYTES."
    )
