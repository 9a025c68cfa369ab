"""Pages of other packages' models, which only superusers see."""

from __future__ import annotations

from typing import Any

from django.db.models import Model
from django.http import HttpRequest
from unfold.admin import ModelAdmin

from tinkerapi.console.kit.console_admin import CarefulList


class SuperuserAdmin(ModelAdmin):  # type: ignore[misc]  # unfold has no type information
    """Pages that only superusers see, whatever permissions other staff users have."""

    def get_changelist(self, request: HttpRequest, **kwargs: Any) -> type[CarefulList]:
        return CarefulList

    def has_module_permission(self, request: HttpRequest) -> bool:
        return bool(request.user.is_superuser)

    def has_view_permission(self, request: HttpRequest, obj: Model | None = None) -> bool:
        return bool(request.user.is_superuser)

    has_change_permission = has_view_permission
    has_delete_permission = has_view_permission
