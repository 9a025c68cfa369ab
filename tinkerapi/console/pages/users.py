"""Accounts in the admin: for superusers."""

from __future__ import annotations

from typing import Any

from django.conf import settings
from django.contrib import admin
from django.contrib.admin.utils import unquote
from django.contrib.auth.admin import UserAdmin as DjangoUserAdmin
from django.contrib.auth.models import Group, User
from django.http import Http404, HttpRequest, HttpResponse
from django.template.defaultfilters import filesizeformat
from django.utils.html import format_html_join
from django.utils.safestring import SafeString
from unfold.forms import (
    AdminPasswordChangeForm,
    UserChangeForm,
    UserCreationForm,
)

from futures.models import Future
from tinkerapi.console.invitations import invitation
from tinkerapi.console.kit.console_admin import shown_once, verb
from tinkerapi.console.kit.display import list_link
from tinkerapi.console.kit.superuser_admin import SuperuserAdmin
from tinkerapi.models import ApiKey
from training.models import Checkpoint, Run
from training.storage_quota import storage_use

for model in (User, Group):
    admin.site.unregister(model)


class NewUserForm(UserCreationForm):  # type: ignore[misc]  # unfold has no type information
    """A new user, who needs no password to train."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        field = self.fields["usable_password"]
        field.label = "Has a password"
        field.help_text = "Only the admin uses it; the API uses keys."
        field.choices = [("true", "Yes"), ("false", "No")]


@admin.register(User)
class UserAdmin(SuperuserAdmin, DjangoUserAdmin):  # type: ignore[type-arg]  # no subscript at run time
    form = UserChangeForm
    add_form = NewUserForm
    change_password_form = AdminPasswordChangeForm
    # Repeated, because unfold's ModelAdmin precedes Django's and has an empty one.
    add_fieldsets = DjangoUserAdmin.add_fieldsets
    # No permissions or groups: a user is a client, staff with their own rows, or a superuser.
    fieldsets = (
        (None, {"fields": ("username", "password")}),
        ("Person", {"fields": ("first_name", "last_name", "email")}),
        ("Access", {"fields": ("is_active", "is_staff", "is_superuser")}),
        ("Dates", {"fields": ("last_login", "date_joined")}),
        ("Theirs", {"fields": ("owned", "stored")}),
    )
    readonly_fields = ("last_login", "date_joined", "owned", "stored")
    list_display = ("username", "email", "is_active", "is_staff", "is_superuser", "last_login")
    list_filter = ("is_active", "is_staff", "is_superuser")
    actions_detail = ("invite",)

    def has_invite_permission(self, request: HttpRequest, object_id: str | None = None) -> bool:
        if object_id is None:
            return self.has_view_permission(request)
        user = self.get_object(request, unquote(object_id))
        return self.has_view_permission(request) and user is not None and user.is_active

    @verb(
        "Invite",
        permission="invite",
        icon="mail",
        question="Invite this user to the console?",
        answer="Make a link",
        explanation="You get a link with which the user sets a password. The user may then enter "
        "the console, where only superusers see more than their own objects.",
    )
    def invite(self, request: HttpRequest, form: Any, object_id: str) -> HttpResponse:
        user = self.get_object(request, unquote(object_id))
        if user is None:
            raise Http404
        url = invitation(user, request=request)
        self.log_change(request, user, "invited")
        days = settings.PASSWORD_RESET_TIMEOUT // 86400
        context = {"url": url, "invited": user, "days": days}
        return shown_once(request, "admin/auth/user/invited.html", context)

    @admin.display(description="Lists")
    def owned(self, user: User) -> SafeString:
        """Links to this user's objects."""
        lists = (
            list_link(Run, "runs", owner__id__exact=user.pk),
            list_link(Future, "futures", owner__id__exact=user.pk),
            list_link(Checkpoint, "checkpoints", run__owner__id__exact=user.pk),
            list_link(ApiKey, "API keys", user__id__exact=user.pk),
        )
        return format_html_join(", ", "{}", ((item,) for item in lists))

    @admin.display(description="Stored")
    def stored(self, user: User) -> str:
        """This user's storage, and the limit of one user."""
        limit: int = settings.USER_STORAGE_BYTES
        of_limit = f" The limit of one user is {filesizeformat(limit)}." if limit else ""
        return f"{storage_use(user.pk)}.{of_limit}"
