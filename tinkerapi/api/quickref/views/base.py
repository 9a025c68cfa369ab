"""Shared by all views of the quick reference: body check, waiting, schema.

An operation is declared once and served at up to three addresses: one that waits for the
result, one that answers with a future, and a short name from older clients that does the
same. The route selects one (``as_view(waits=False)``); nothing else differs.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Awaitable, Mapping
from typing import Any, ClassVar

from django.conf import settings
from django.http import HttpResponse
from rest_framework.request import Request

from tinkerapi.api.async_view import AsyncAPIView
from tinkerapi.api.bodies.parsers import json_object
from tinkerapi.api.caller import idempotency_key_of, owner_of
from tinkerapi.api.dialect import SEQ_ID, is_sdk_dialect
from tinkerapi.api.errors import SdkDialectNotSpoken
from tinkerapi.api.fields.field import MAX_FLOAT, Field, Number, Schema, check_object
from tinkerapi.api.quickref.render import waited_answer
from tinkerapi.api.quickref.schema import ApiSchema
from tinkerapi.api.renderers import JSONResponse
from training.services import Submission


class ApiView(AsyncAPIView):
    """A view that declares its request and its answer."""

    schema = ApiSchema()

    group: ClassVar[str]
    """The heading under which the manual and ``GET /`` list it."""
    fields: ClassVar[Mapping[str, Field]] = {}
    """The request body's fields."""
    files: ClassVar[Mapping[str, str]] = {}
    """The files that it takes beside the fields, with descriptions. The body is then a form."""
    answer: ClassVar[Schema]
    """JSON schema of the 200 answer."""
    answer_example: ClassVar[Any] = None
    answer_type: ClassVar[str] = "application/json"
    """The media type of the answer; errors are JSON."""
    errors: ClassVar[Mapping[int, str]] = {}
    """Its other statuses, and when; 400, 401 and 415 need not be listed."""
    waits: ClassVar[bool | None] = None
    """None: it makes no future. For operations, set by the route: True answers with the result,
    False with the future's id."""
    legacy: ClassVar[bool] = False
    """Set by the route of a short name from older clients."""

    def body_fields(self) -> Mapping[str, Field]:
        """``fields``, and those that the route adds."""
        return self.fields

    def checked_body(self, request: Request) -> dict[str, Any]:
        """The request body with every declared field, checked.

        Raises:
            SdkDialectNotSpoken: The official SDK sent it. (400)
            InvalidRequest: A field is missing, unknown or wrong; the message names it. (400)
        """
        django_request = request._request
        if is_sdk_dialect(django_request):
            raise SdkDialectNotSpoken
        body = json_object(django_request, max_bytes=self.max_body_bytes())
        if SEQ_ID in body:
            raise SdkDialectNotSpoken
        return check_object(self.body_fields(), body)


WAIT = Number(
    description="Seconds to wait for the result before answering 202; larger values are "
    "cut to the server's limit.",
    maximum=MAX_FLOAT,
)


class OperationView(ApiView):
    """A request that becomes a future."""

    waits = True

    def body_fields(self) -> Mapping[str, Field]:
        return {**self.fields, "wait": WAIT} if self.waits else self.fields

    @abstractmethod
    def submit(
        self, body: dict[str, Any], *, owner_id: int, idempotency_key: str | None
    ) -> Submission:
        """Call the service of this operation."""

    def post(self, request: Request) -> HttpResponse | Awaitable[HttpResponse]:
        body = self.checked_body(request)
        submission = self.submit(
            body, owner_id=owner_of(request), idempotency_key=idempotency_key_of(request)
        )
        return self.respond(request, submission, wait=body.get("wait"))

    def respond(
        self, request: Request, submission: Submission, *, wait: float | None = None
    ) -> HttpResponse | Awaitable[HttpResponse]:
        """The answer to an accepted request, in the route's form.

        Args:
            wait: The client's limit in seconds; None means the server's.
        """
        future, model_id = submission.future, submission.model_id
        if not self.waits:
            return JSONResponse({"request_id": future.id, "model_id": model_id})
        limit = settings.SYNC_TIMEOUT_SECONDS
        return waited_answer(
            future.id,
            owner_id=owner_of(request),
            timeout_seconds=limit if wait is None else min(wait, limit),
            is_known=True,
            model_id=model_id,
        )
