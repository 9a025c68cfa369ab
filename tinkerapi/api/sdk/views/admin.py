"""The endpoints of the SDK's AdminClient: the caller's audit log, usage and storage.

A superuser's key reads everybody's audit log.
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

from django.conf import settings
from django.http import HttpResponse
from django.utils import timezone
from rest_framework.request import Request

from tinkerapi.api.caller import owner_of
from tinkerapi.api.fields.field import Choice
from tinkerapi.api.renderers import JSONResponse, timestamp
from tinkerapi.api.sdk.base import SdkView
from tinkerapi.api.sdk.parse.queries import query_day, query_moment, query_text
from tinkerapi.api.sdk.render.descriptions import texts, user_urn
from training.audit import audit_events
from training.billing import WINDOW, Usage, Work, checkpoints_stored, usage_by_hour
from training.errors import InvalidRequest
from training.listings import sessions_by_id
from training.models import AuditEvent

MAX_EVENTS = 10_000
"""Most events in one answer; shorter periods show the rest."""

GIGABYTE = 1_000_000_000

_THINGS: Mapping[str, str | None] = {
    "all": None,
    "checkpoints": "checkpoint",
    "projects": "project",
    # These do not exist here, so nothing of them is ever logged.
    "teams": "team",
    "organizations": "organization",
}
"""Event type to the first word of our events."""

_EVENT_TYPE = Choice(description="", choices=tuple(_THINGS))

_USAGE_TYPES: Mapping[Work, str] = {
    Work.TRAINING: "training",
    Work.PREFILL: "sampling_prefill",
    Work.SAMPLING: "sampling_sample",
    Work.CHECKPOINT: "checkpoint",
}


class AuditView(SdkView):
    """List actions on the caller's objects, the oldest first."""

    def get(self, request: Request) -> HttpResponse:
        event_type = _EVENT_TYPE.check(request.query_params.get("event_type", "all"), "event_type")
        events = audit_events(
            owner_id=None if request.user.is_superuser else owner_of(request),
            thing=_THINGS[event_type],
            day=query_day(request, "day"),
        )
        newest = list(events.reverse()[:MAX_EVENTS])
        return JSONResponse({"entries": [_entry(event) for event in reversed(newest)]})


def _entry(event: AuditEvent) -> dict[str, Any]:
    return {
        "timestamp": timestamp(event.created_at),
        "event": event.event,
        "event_details": {
            "actor": event.actor and user_urn(event.actor.get_username()),
            "owner": event.owner and user_urn(event.owner.get_username()),
            **event.details,
        },
        "model_id": event.details.get("model_id"),
        "tinker_path": event.details.get("tinker_path"),
        "purpose": event.details.get("purpose"),
    }


class UsageView(SdkView):
    """Report the caller's usage, hour by hour."""

    def get(self, request: Request) -> HttpResponse:
        begin, end = _window(request)
        usages = usage_by_hour(owner_id=owner_of(request), begin=begin, end=end)
        ids = {usage.session_id for usage in usages if usage.session_id}
        user = request.user.get_username()
        return JSONResponse(
            {
                "data": [_event(usage, user) for usage in usages],
                "sessions": {
                    session.id: {"user_metadata": texts(session.user_metadata)}
                    for session in sessions_by_id(ids)
                },
                "cost_data_through": None,
            }
        )


def _window(request: Request) -> tuple[datetime, datetime]:
    """Whole hours, at most fourteen days, not wholly in the future.

    Raises:
        InvalidRequest: (400)
    """
    moments = []
    for name in ("starting_on", "ending_before"):
        moment = query_moment(request, name).astimezone(UTC)
        if moment != moment.replace(minute=0, second=0, microsecond=0):
            raise InvalidRequest(f"{name}: expected a whole hour of UTC")
        moments.append(moment)
    begin, end = moments
    if not timedelta() < end - begin <= WINDOW:
        raise InvalidRequest(
            f"ending_before: expected later than starting_on, by at most {WINDOW.days} days"
        )
    if begin > timezone.now():
        raise InvalidRequest("starting_on: lies in the future")
    return begin, end


def _event(usage: Usage, username: str) -> dict[str, Any]:
    info: dict[str, Any] = {"type": _USAGE_TYPES[usage.work]}
    if usage.work == Work.CHECKPOINT:
        info["count"] = usage.count
    else:
        info["token_count"] = usage.count
    if usage.work == Work.PREFILL:
        info["cached"] = False
    dollars_per_second = settings.WORKER_HOUR_CENTS / 100 / 3600
    priced = dollars_per_second > 0 and usage.work != Work.CHECKPOINT and usage.count > 0
    cost = usage.seconds * dollars_per_second if priced else None
    return {
        "bucket_start": timestamp(usage.hour),
        "bucket_end": timestamp(usage.hour + timedelta(hours=1)),
        "base_model": usage.base_model,
        "user_id": user_urn(username),
        "user_name": username,
        "session_id": usage.session_id,
        "project_id": usage.project_id or None,
        "estimated_cost_usd": cost,
        "effective_rate_usd_per_million_tokens": cost and cost / usage.count * 1_000_000,
        "event_info": info,
    }


class StorageUsageView(SdkView):
    """Report the current size of the caller's checkpoints."""

    def get(self, request: Request) -> HttpResponse:
        stored = checkpoints_stored(
            owner_id=owner_of(request), project_id=query_text(request, "project_id")
        )
        user = request.user
        return JSONResponse(
            {
                "effective_rate_usd_per_gigabyte_month": None,
                "data": [
                    {
                        "project_id": item.project_id,
                        "org_user_urn": user_urn(user.get_username()),
                        "user_email": getattr(user, "email", "") or None,
                        "user_name": user.get_username(),
                        "checkpoint_count": item.count,
                        "size_bytes": item.size_bytes,
                        "size_gigabytes": item.size_bytes / GIGABYTE,
                        "estimated_monthly_cost_usd": None,
                    }
                    for item in stored
                ],
            }
        )
