"""django-q2's own tables in the admin: for superusers."""

from __future__ import annotations

from typing import Any, ClassVar

from django.contrib import admin
from django.db.models import Model
from django.http import HttpRequest
from django_q.admin import FailAdmin, QueueAdmin, ScheduleAdmin, TaskAdmin
from django_q.models import Failure, OrmQ, Schedule, Success

from tinkerapi.console.kit.superuser_admin import SuperuserAdmin

for model in (Schedule, Success, Failure, OrmQ):
    admin.site.unregister(model)


@admin.register(Schedule)
class ScheduledTaskAdmin(SuperuserAdmin, ScheduleAdmin):  # type: ignore[misc]  # nor has django-q2
    pass


class QueueWindow(SuperuserAdmin):
    """Read-only pages: django-q2's tasks only wake the worker and need no editing."""

    show_full_result_count = False
    actions: ClassVar[Any] = None

    def has_change_permission(self, request: HttpRequest, obj: Model | None = None) -> bool:
        return False

    def has_delete_permission(self, request: HttpRequest, obj: Model | None = None) -> bool:
        return False


@admin.register(Success)
class SuccessAdmin(QueueWindow, TaskAdmin):  # type: ignore[misc]  # nor has django-q2
    pass


@admin.register(Failure)
class FailureAdmin(QueueWindow, FailAdmin):  # type: ignore[misc]  # nor has django-q2
    pass


@admin.register(OrmQ)
class DoorbellAdmin(QueueWindow, QueueAdmin):  # type: ignore[misc]  # nor has django-q2
    pass
