"""Conversations with base models and checkpoints, in the browser.

The page sends the same requests as OpenAI's clients, so they are durable futures of the person who
is logged in, take their turn in the queue, and are cancelled when the page is closed. Only two
things differ: the person is known by the session of the admin, and checkpoints are named by their
ids, so that a superuser may also try those of other users.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any, ClassVar, cast

from django.conf import settings
from django.contrib.admin.sites import AdminSite
from django.contrib.auth import get_user
from django.db.models import QuerySet
from django.http import HttpRequest, HttpResponse
from django.template.response import TemplateResponse
from django.urls import reverse
from rest_framework.authentication import SessionAuthentication
from rest_framework.permissions import BasePermission
from rest_framework.request import Request

from tinkerapi.api.openai.base import model_not_found
from tinkerapi.api.openai.views import ChatCompletionView
from training.base_models import base_models
from training.models import Checkpoint
from training.selectors import checkpoints_kept

CHECKPOINT = "checkpoint:"
"""Begins the name of a checkpoint here; its id follows."""
LISTED = 200
"""Checkpoints to choose from, the newest; any other is reached from its own page."""
TOP_LOGPROBS = 5
ADDRESS = "admin:training_checkpoint_playground"


class ConsoleSession(SessionAuthentication):
    """The person who is logged in to the admin; a page of another site cannot use the session.

    The API's handler runs no middleware, so the session is read here.
    """

    def authenticate(self, request: Request) -> tuple[Any, None] | None:
        django_request = request._request
        store = import_module(settings.SESSION_ENGINE).SessionStore
        key = django_request.COOKIES.get(settings.SESSION_COOKIE_NAME)
        django_request.session = store(key)
        user = get_user(django_request)
        if not user.is_active:  # also nobody
            return None
        # DRF's request would parse the body for a token.
        self.enforce_csrf(cast(Request, django_request))
        return user, None

    def authenticate_header(self, request: Request) -> str:
        return 'Session realm="tinkerapi"'


class IsStaff(BasePermission):
    """May enter the admin."""

    message = "This page is for users who may enter the console."

    def has_permission(self, request: Request, view: Any) -> bool:
        return bool(request.user and request.user.is_active and request.user.is_staff)


class PlaygroundChatView(ChatCompletionView):
    """Answer a conversation of the playground."""

    group: ClassVar[Any] = None  # it belongs to a page, so it is not in the list of endpoints
    authentication_classes = (ConsoleSession,)
    permission_classes = (IsStaff,)

    def source_of(self, request: Request, model: str) -> dict[str, Any]:
        if not model.startswith(CHECKPOINT):
            return {"base_model": model, "model_path": None}
        checkpoint = sampleable(request.user).filter(pk=_number(model) or 0).first()
        if checkpoint is None:
            raise model_not_found(model)
        return {
            "base_model": None,
            "model_path": str(checkpoint.global_path),
            "lender_id": checkpoint.owner_id,
        }


def sampleable(user: Any) -> QuerySet[Checkpoint]:
    """The checkpoints that a person may try here: their own, or all for a superuser."""
    found = checkpoints_kept().filter(ephemeral=False).exclude(kind=Checkpoint.Kind.EXTERNAL)
    return found if user.is_superuser else found.filter(owner_id=user.pk)


def model_of(checkpoint: Checkpoint) -> str:
    """The name of a checkpoint on this page."""
    return f"{CHECKPOINT}{checkpoint.pk}"


def playground_page(request: HttpRequest, site: AdminSite) -> HttpResponse:
    """The page; ``?model=`` chooses what answers on the left, ``?other=`` on the right."""
    served = [model.name for model in base_models()]
    rows = sampleable(request.user).filter(run__base_model__in=served)
    rows = rows.select_related("run__owner", "run__session")
    newest = list(rows.order_by("-created_at")[:LISTED])
    known = {row.pk for row in newest}
    asked = [_number(request.GET.get(side, "")) for side in ("model", "other")]
    newest += rows.filter(pk__in=[pk for pk in asked if pk is not None and pk not in known])
    context = {
        **site.each_context(request),
        "title": "Playground",
        "base_models": served,
        "checkpoints": [
            {"value": model_of(row), "text": _label(row, request.user)} for row in newest
        ],
        "chosen": request.GET.get("model", "") or served[0],
        "other": request.GET.get("other", ""),
        "chat_url": reverse("playground-chat"),
        "top_logprobs": TOP_LOGPROBS,
        "max_tokens": settings.DEFAULT_MAX_TOKENS,
    }
    return TemplateResponse(request, "console/playground.html", context)


def _label(checkpoint: Checkpoint, user: Any) -> str:
    whose = "" if checkpoint.owner_id == user.pk else f"{checkpoint.run.owner.get_username()}: "
    return f"{whose}{checkpoint.run.shown_title} · {checkpoint.name} · step {checkpoint.step:,}"


def _number(model: str) -> int | None:
    """The id in a checkpoint's name here; None for any other text."""
    digits = model.removeprefix(CHECKPOINT)
    is_id = model.startswith(CHECKPOINT) and digits.isascii() and digits.isdigit()
    return int(digits) if is_id and len(digits) < 19 else None
