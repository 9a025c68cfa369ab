"""Shared by all views of the tinker SDK's dialect: bodies, errors, and refused numbers.

Bodies are JSON or protobuf, plain or in zstd. Answers are never negotiated. The SDK repeats 409
and 5xx for minutes, so a permanent error is 422 or another 4xx. It never repeats a
number that was refused: a refused request that names its model and seq id becomes a failed
future, which uses its number (``NumberedView``).
"""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any, ClassVar

from django.core.exceptions import RequestDataTooBig
from django.http import HttpResponse, HttpResponseBase
from rest_framework.exceptions import APIException, ParseError
from rest_framework.request import Request

from futures.errors import PayloadTooLarge
from futures.models import Future
from futures.services import Refusal
from futures.transitions import Category
from tinkerapi.api.async_view import AsyncAPIView
from tinkerapi.api.bodies.compression import decompress_body, decompressed_head
from tinkerapi.api.bodies.limit import HEAD_BYTES
from tinkerapi.api.bodies.parsers import parse_json, too_large_sentence
from tinkerapi.api.caller import owner_of
from tinkerapi.api.dialect import PROTOBUF
from tinkerapi.api.errors import UNSTORABLE, BodyTooLarge, refusal_of
from tinkerapi.api.fields.field import Field, check_object
from tinkerapi.api.renderers import JSONResponse
from tinkerapi.api.sdk.parse.broken_bodies import ids_of_broken_json, ids_of_broken_protobuf
from tinkerapi.api.sdk.parse.calls import check_ids
from tinkerapi.api.sdk.parse.protobuf import parse_ids
from training.errors import InvalidRequest, RunNotFound, SessionFinished, TrainingError
from training.services.sessions import refused_submit

GROUP = "Tinker SDK"


class SdkView(AsyncAPIView):
    """A view of the SDK's dialect; it is not in the OpenAPI description."""

    schema = None
    group: ClassVar[str] = GROUP

    fields: ClassVar[Mapping[str, Field]] = {}
    """The JSON body's fields; ``type``, which repeats the path, may always stand beside them."""

    def handle_exception(self, exc: Exception) -> Any:
        response = super().handle_exception(exc)
        if response.status_code == HTTPStatus.CONFLICT:  # which the SDK would repeat
            response.status_code = HTTPStatus.UNPROCESSABLE_ENTITY
        return response

    def raw_body(self, request: Request) -> bytes:
        """The request's body, decompressed.

        Raises:
            BodyTooLarge, PayloadTooLarge: (413)
            InvalidRequest: Compressed in another way than zstd. (400)
        """
        limit = self.max_body_bytes()
        try:
            body = request._request.body
        except RequestDataTooBig:
            raise BodyTooLarge(too_large_sentence(limit)) from None
        encoding = request.headers.get("Content-Encoding")
        return decompress_body(body, encoding, max_bytes=limit)

    def json_body(self, request: Request) -> dict[str, Any]:
        """The body as a dictionary; without a body it is empty.

        Raises:
            ParseError: Not JSON, or not an object. (400)
        """
        return json_fields(self.raw_body(request))

    def checked_body(self, request: Request) -> dict[str, Any]:
        """Every declared field's value or default; null counts as absent.

        Raises:
            InvalidRequest: A field is missing, wrong, or unknown and not null. (400)
        """
        return check_fields(self.fields, self.json_body(request))


class NumberedView(SdkView):
    """A request with a place in a model's order. Its JSON is decoded once."""

    is_numbered = True
    takes_protobuf: ClassVar[bool] = False

    def post(self, request: Request) -> HttpResponse:
        try:
            body = self.raw_body(request)
        except (BodyTooLarge, PayloadTooLarge) as error:
            return self.refused_by_head(request, head_of(request), error)
        owner_id = owner_of(request)
        is_protobuf = request.content_type == PROTOBUF
        fields: dict[str, Any] | APIException | TrainingError | None = None
        if not is_protobuf or not self.takes_protobuf:
            fields = read_json_fields(body)
        model_id, seq_id = self.ids(body, fields)
        try:
            if isinstance(fields, Exception):
                raise fields
            if is_protobuf and not self.takes_protobuf:
                raise InvalidRequest("body: expected JSON; got protobuf")
            future = self.submit(
                body if fields is None else fields,
                owner_id=owner_id,
                model_id=model_id,
                seq_id=seq_id,
            )
        except (RunNotFound, SessionFinished):
            raise  # no later number waits for this one
        except (TrainingError, PayloadTooLarge, APIException, *UNSTORABLE) as unsafe:
            future = self.refuse(request, body, model_id, seq_id, refusal_of(unsafe))
        return JSONResponse({"request_id": future.id, "model_id": model_id})

    def refuse(
        self, request: Request, body: bytes, model_id: str, seq_id: int, error: Exception
    ) -> Future:
        """The failed future that uses the number of a request that will never run."""
        return refused_submit(
            owner_id=owner_of(request),
            model_id=model_id,
            seq_id=seq_id,
            body_digest=hashlib.sha256(body).hexdigest(),
            refusal=Refusal(
                error=str(error),
                category=Category(getattr(error, "category", Category.USER)),
                error_code=type(error).__name__,
            ),
        )

    def too_large_body(self, request: Request, head: bytes) -> HttpResponseBase:
        error = BodyTooLarge(too_large_sentence(self.max_body_bytes()))
        return self.refused_by_head(request, head, error)

    def refused_by_head(
        self, request: Request, head: bytes, error: BodyTooLarge | PayloadTooLarge
    ) -> HttpResponse:
        """The answer to a body that is too large: its number is used if its beginning has it.

        Args:
            head: The body's beginning, as sent.

        Raises:
            BodyTooLarge, PayloadTooLarge: ``error``; the number cannot be read there. (413)
            SeqIdReused: (422)
        """
        encoding = request.headers.get("Content-Encoding")
        text = decompressed_head(head, encoding, max_bytes=HEAD_BYTES)
        is_message = request.content_type == PROTOBUF and self.takes_protobuf
        if is_message:
            ids = ids_of_broken_protobuf(text)
        else:
            ids = ids_of_broken_json(text.rstrip(b"0123456789"))  # a number may be cut in two
        try:
            model_id, seq_id = check_ids(ids.get("model_id"), ids.get("seq_id"))
            future = self.refuse(request, head, model_id, seq_id, error)
        except (InvalidRequest, RunNotFound):
            raise error from None
        return JSONResponse({"request_id": future.id, "model_id": model_id})

    def ids(
        self, body: bytes, fields: dict[str, Any] | APIException | TrainingError | None
    ) -> tuple[str, int]:
        """Model id and seq id, even if the rest of the body is wrong.

        Args:
            fields: The JSON's fields, or the error of reading them; None for protobuf.

        Raises:
            InvalidRequest: These two cannot be read. (400)
        """
        if fields is None:
            return parse_ids(body)
        if isinstance(fields, Exception):
            ids = ids_of_broken_json(body)
            if not ids:
                raise fields
            fields = ids
        return check_ids(fields.get("model_id"), fields.get("seq_id"))

    @abstractmethod
    def submit(
        self, body: bytes | dict[str, Any], *, owner_id: int, model_id: str, seq_id: int
    ) -> Future:
        """Call the service of this operation with the bytes of a protobuf body, if it accepts
        them, or with JSON's fields."""


class NumberedJSONView(NumberedView):
    """A numbered request whose body is JSON."""

    def submit(
        self, body: bytes | dict[str, Any], *, owner_id: int, model_id: str, seq_id: int
    ) -> Future:
        assert isinstance(body, dict)  # noqa: S101  (it takes no protobuf)
        given = {name: item for name, item in body.items() if name not in ("model_id", "seq_id")}
        checked = check_fields(self.fields, given)
        return self.submit_fields(checked, owner_id=owner_id, model_id=model_id, seq_id=seq_id)

    @abstractmethod
    def submit_fields(
        self, body: dict[str, Any], *, owner_id: int, model_id: str, seq_id: int
    ) -> Future:
        """Call the service of this operation with the checked body and the ids."""


def head_of(request: Request) -> bytes:
    """The beginning of a body that has arrived and is too large."""
    try:
        return request._request.body[:HEAD_BYTES]
    except RequestDataTooBig:
        return request._request.read(HEAD_BYTES)


def read_json_fields(body: bytes) -> dict[str, Any] | APIException | TrainingError:
    """``json_fields``, or the error of reading them."""
    try:
        return json_fields(body)
    except (APIException, TrainingError) as error:
        return error


def json_fields(body: bytes) -> dict[str, Any]:
    """A JSON object without its nulls; an empty body gives an empty object.

    Raises:
        ParseError: (400)
    """
    value = parse_json(body)
    if not isinstance(value, dict):
        raise ParseError("The body must be a JSON object.")
    return {name: item for name, item in value.items() if item is not None}


def check_fields(fields: Mapping[str, Field], given: dict[str, Any]) -> dict[str, Any]:
    """Every declared field's value or default.

    Raises:
        InvalidRequest: A field is missing, wrong or unknown. (400)
    """
    return check_object(fields, {k: v for k, v in given.items() if k != "type"})


def empty_response() -> HttpResponse:
    """204: done, without a body."""
    return HttpResponse(status=HTTPStatus.NO_CONTENT)
