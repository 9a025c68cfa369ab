"""``GET /metrics``: the server's figures for Prometheus."""

from __future__ import annotations

from typing import Any, ClassVar

from django.http import HttpResponse
from rest_framework.permissions import BasePermission
from rest_framework.request import Request

from tinkerapi.api.fields.field import Schema
from tinkerapi.api.quickref.views.base import ApiView
from tinkerapi.prometheus import CONTENT_TYPE, exposition


class MaySeeTheServer(BasePermission):
    """A superuser's key, or a request that needs no key."""

    message = "The figures are of all users: send a superuser's key in the X-API-Key header."

    def has_permission(self, request: Request, view: Any) -> bool:
        is_keyless_local = request.auth is None  # only programs on this machine need no key
        return bool(request.user and (is_keyless_local or request.user.is_superuser))


class PrometheusView(ApiView):
    """Report the server's figures in Prometheus' text format."""

    group = "Server"
    permission_classes = (MaySeeTheServer,)
    answer: ClassVar[Schema] = {"type": "string"}
    answer_type: ClassVar[str] = CONTENT_TYPE.partition(";")[0]

    def get(self, request: Request) -> HttpResponse:
        return HttpResponse(exposition(), content_type=CONTENT_TYPE)
