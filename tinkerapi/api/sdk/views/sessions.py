"""Management of sessions: list, describe, move to a project, search, trace."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any, ClassVar

from django.http import HttpResponse
from rest_framework.request import Request

from tinkerapi.api.caller import owner_of
from tinkerapi.api.fields.field import Choice, Custom, Field, Integer, Text, check_object
from tinkerapi.api.fields.refusals import refuse
from tinkerapi.api.renderers import JSONResponse, timestamp
from tinkerapi.api.sdk.base import SdkView, empty_response
from tinkerapi.api.sdk.parse.queries import check_access_scope, check_moment, query_page
from tinkerapi.api.sdk.render.descriptions import session_description, texts, user_urn
from tinkerapi.api.sdk.render.links import trace_link
from tinkerapi.api.sdk.views.service import check_metadata, check_tags
from training.listings import SessionStatus, session_ids, session_search
from training.models import Session
from training.selectors import session_get
from training.services.sessions import session_set_project

MAX_FOUND = 200


class SessionListView(SdkView):
    """List the ids of the caller's sessions."""

    def get(self, request: Request) -> HttpResponse:
        check_access_scope(request)
        found = session_ids(owner_id=owner_of(request), **query_page(request, limit=20))
        return JSONResponse({"sessions": found})


class SessionView(SdkView):
    """Describe a session: its models and samplers."""

    def get(self, request: Request, session_id: str) -> HttpResponse:
        check_access_scope(request)
        session = session_get(owner_id=owner_of(request), session_id=session_id)
        runs = session.runs.order_by("model_seq_id").values_list("name", flat=True)
        samplers = session.sampling_sessions.order_by("seq_id").values_list("id", flat=True)
        return JSONResponse(
            {
                "training_run_ids": list(runs),
                "sampler_ids": list(samplers),
                "user_metadata": texts(session.user_metadata),
                "display_name": session.display_name or None,
            }
        )


class SessionProjectView(SdkView):
    """Move a session to a project, which is only a label."""

    fields: ClassVar[Mapping[str, Field]] = {
        "project_id": Text(description="The project.", required=True)
    }

    def put(self, request: Request, session_id: str) -> HttpResponse:
        body = self.checked_body(request)
        session_set_project(owner_id=owner_of(request), session_id=session_id, **body)
        return empty_response()


_IS_FINISHED = {"active": False, "client_finished": True}
_STATUS_FIELDS: Mapping[str, Field] = {
    "type": Choice(
        description="",
        choices=("active", "client_finished", "cancelled", "failed"),
        required=True,
    ),
    "reasons": Custom(description="", checker=check_tags, json={}),
}
_CURSOR_FIELDS: Mapping[str, Field] = {
    "last_created_at": Text(description="", required=True, max_length=40),
    "last_session_id": Text(description="", required=True, max_length=64),
}
_OWNER_FIELDS: Mapping[str, Field] = {
    "type": Choice(description="", choices=("own", "accessible", "user"), default="own"),
    "owner_urns": Custom(description="", checker=check_tags, json={}),
}


def _check_statuses(value: Any, where: str) -> list[SessionStatus]:
    if not isinstance(value, list) or not value:
        raise refuse(where, "a list of at least one status", value)
    statuses = []
    for index, item in enumerate(value):
        checked = check_object(_STATUS_FIELDS, item, f"{where}[{index}]")
        # No session has the other statuses: only clients end sessions.
        if checked["type"] in _IS_FINISHED:
            is_finished = _IS_FINISHED[checked["type"]]
            statuses.append(SessionStatus(is_finished=is_finished, reasons=checked["reasons"]))
    return statuses


def _check_cursor(value: Any, where: str) -> tuple[datetime, str]:
    checked = check_object(_CURSOR_FIELDS, value, where)
    moment = check_moment(checked["last_created_at"], f"{where}.last_created_at")
    return moment, checked["last_session_id"]


def _check_owner(value: Any, where: str) -> dict[str, Any]:
    return check_object(_OWNER_FIELDS, value, where)


class SessionSearchView(SdkView):
    """Find sessions of the caller by name, project, metadata and state."""

    fields: ClassVar[Mapping[str, Field]] = {
        "session_id": Text(description="This one.", max_length=64),
        "display_name": Text(description="Words of its name."),
        "project_ids": Custom(description="Any of these.", checker=check_tags, json={}),
        "user_metadata": Custom(
            description="All of these.", default={}, checker=check_metadata, json={}
        ),
        "owner": Custom(
            description="Whose.", default={"type": "own"}, checker=_check_owner, json={}
        ),
        "statuses": Custom(description="Any of these.", checker=_check_statuses, json={}),
        "limit": Integer(description="Page size.", default=50, minimum=1, maximum=MAX_FOUND),
        "cursor": Custom(description="", checker=_check_cursor, json={}),
    }

    def post(self, request: Request) -> HttpResponse:
        body = self.checked_body(request)
        body["after"] = body.pop("cursor")
        owner = body.pop("owner")
        own_urn = user_urn(request.user.get_username())
        if owner["type"] == "user" and own_urn not in (owner["owner_urns"] or ()):
            return JSONResponse({"sessions": [], "next_cursor": None})
        limit = body.pop("limit")
        found = session_search(owner_id=owner_of(request), limit=limit + 1, **body)
        page = found[:limit]
        return JSONResponse(
            {
                "sessions": [session_description(session) for session in page],
                "next_cursor": _cursor(page[-1]) if len(found) > limit else None,
            }
        )


def _cursor(last: Session) -> dict[str, Any]:
    return {"last_created_at": timestamp(last.created_at), "last_session_id": last.id}


class SessionTraceView(SdkView):
    """Link to the timeline of a session's requests, which is computed when it is fetched."""

    def get(self, request: Request, session_id: str) -> HttpResponse:
        session = session_get(owner_id=owner_of(request), session_id=session_id)
        return JSONResponse({"status": "ready", "url": trace_link(request, session).url})
