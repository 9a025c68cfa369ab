"""Sessions, flags and limits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from django.http import HttpResponse
from rest_framework.request import Request

from tinkerapi.api.caller import owner_of
from tinkerapi.api.errors import error_response
from tinkerapi.api.fields.field import Choice, Custom, Field, Text
from tinkerapi.api.fields.refusals import check_json, refuse
from tinkerapi.api.renderers import JSONResponse, to_json
from tinkerapi.api.sdk.base import SdkView, empty_response
from tinkerapi.api.sdk.flags import client_flags, dynamic_flags
from training.errors import InvalidRequest
from training.models import Session
from training.services.sessions import session_create, session_finish, session_heartbeat

SESSION_ID = Text(description="The session.", required=True, max_length=64)

MAX_METADATA_BYTES = 64 * 1024
MAX_TAGS = 100


def check_metadata(value: Any, where: str) -> dict[str, Any]:
    """A small object for the user's own use, stored unchanged."""
    if not isinstance(value, dict):
        raise refuse(where, "an object", value)
    check_json(value, where)
    if len(to_json(value)) > MAX_METADATA_BYTES:
        raise InvalidRequest(f"{where}: larger than {MAX_METADATA_BYTES} bytes")
    return value


def check_tags(value: Any, where: str) -> list[str]:
    if not isinstance(value, list) or len(value) > MAX_TAGS:
        raise refuse(where, f"a list of up to {MAX_TAGS} texts", value)
    tag = Text(description="")
    return [tag.check(item, f"{where}[{i}]") for i, item in enumerate(value)]


def check_free_text(value: Any, where: str) -> str:
    """Any text, or none."""
    return Text(description="", max_length=10_000).check(value, where) if value != "" else ""


METADATA = Custom(
    description="The user's own metadata.", default={}, checker=check_metadata, json={}
)


class ClientConfigView(SdkView):
    """The flags a client starts with."""

    def post(self, request: Request) -> HttpResponse:
        return JSONResponse(client_flags())


class DynamicConfigView(SdkView):
    """The flags that a client reads again from time to time."""

    def post(self, request: Request) -> HttpResponse:
        return JSONResponse(dynamic_flags())


class TelemetryView(SdkView):
    """Accept telemetry and drop it unread: its events may contain the API key."""

    def post(self, request: Request) -> HttpResponse:
        return JSONResponse({"status": "accepted"})


class CreateSessionView(SdkView):
    """Begin a session."""

    fields: ClassVar[Mapping[str, Field]] = {
        "sdk_version": Text(description="The client's.", default="unknown", max_length=40),
        "tags": Custom(description="Labels.", default=[], checker=check_tags, json={}),
        "user_metadata": METADATA,
        "project_id": Text(description="The project.", default=""),
        "display_name": Text(description="For people.", default=""),
    }

    def post(self, request: Request) -> HttpResponse:
        body = self.checked_body(request)
        session = session_create(owner_id=owner_of(request), **body)
        return JSONResponse({"session_id": session.id, "type": "create_session"})


class SessionHeartbeatView(SdkView):
    """Record that the client lives; 410 tells it to stop its heartbeats."""

    fields: ClassVar[Mapping[str, Field]] = {"session_id": SESSION_ID}

    def post(self, request: Request) -> HttpResponse:
        body = self.checked_body(request)
        session = session_heartbeat(owner_id=owner_of(request), session_id=body["session_id"])
        if session.finished_at is not None:
            return error_response(410, "The session was finished.", error_code="SessionFinished")
        return JSONResponse({"type": "session_heartbeat"})


def _check_reason(value: Any, where: str) -> str:
    if not isinstance(value, dict):
        raise refuse(where, 'an object such as {"type": "success"}', value)
    reason = Choice(description="", choices=tuple(str(item) for item in Session.FinishReason))
    return reason.check(value.get("type"), f"{where}.type")


class SessionFinishView(SdkView):
    """End a session; its models accept no further requests."""

    fields: ClassVar[Mapping[str, Field]] = {
        "reason": Custom(
            description="How it ended.", required=True, checker=_check_reason, json={}
        ),
        "detail": Custom(description="Why.", default="", checker=check_free_text, json={}),
    }

    def post(self, request: Request, session_id: str) -> HttpResponse:
        body = self.checked_body(request)
        session_finish(owner_id=owner_of(request), session_id=session_id, **body)
        return empty_response()
