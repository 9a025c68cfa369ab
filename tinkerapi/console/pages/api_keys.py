"""API keys in the admin: for superusers and the keys' owners."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from django import forms
from django.contrib import admin, messages
from django.contrib.admin.utils import unquote
from django.contrib.auth.models import User
from django.db.models import QuerySet
from django.http import HttpRequest, HttpResponse
from django.utils import timezone
from django.utils.safestring import SafeString
from unfold.contrib.filters.admin import AutocompleteSelectFilter
from unfold.forms import (
    BaseDialogForm,
)
from unfold.widgets import UnfoldAdminIntegerFieldWidget, UnfoldAdminSelectWidget
from unfold.widgets import UnfoldAdminTextInputWidget as TextInput

from tinkerapi.console.kit.console_admin import ConsoleAdmin, redirect, shown_once, verb
from tinkerapi.console.kit.display import link, moment, page_url, state_label
from tinkerapi.console.kit.filters import MomentFilter
from tinkerapi.models import ApiKey
from tinkerapi.selectors import users_active
from tinkerapi.services import (
    MAX_EXPIRY_DAYS,
    api_key_create,
    api_key_revoke,
    api_key_rotate,
)

MAX_OVERLAP_HOURS = 24 * 30
SHOWN_ONCE = "admin/tinkerapi/apikey/new_key.html"


class NewKeyForm(BaseDialogForm):  # type: ignore[misc]  # unfold has no type information
    """The key's user and its lifetime."""

    user: forms.ModelChoiceField[User] = forms.ModelChoiceField(
        None, widget=UnfoldAdminSelectWidget
    )
    name = forms.CharField(max_length=100, widget=TextInput, help_text="Where it will be used")
    expires_in_days = forms.IntegerField(
        min_value=1,
        max_value=MAX_EXPIRY_DAYS,
        required=False,
        widget=UnfoldAdminIntegerFieldWidget,
        help_text="Empty: never",
    )

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        me = self.request.user
        field = self.fields["user"]
        field.queryset = users_active(only=None if me.is_superuser else me.pk)
        field.initial = me.pk


class RotateForm(BaseDialogForm):  # type: ignore[misc]  # unfold has no type information
    """How long both keys are valid."""

    overlap_hours = forms.IntegerField(
        min_value=0,
        max_value=MAX_OVERLAP_HOURS,
        initial=24,
        widget=UnfoldAdminIntegerFieldWidget,
        label="Hours in which the old key stays valid",
        help_text="0: it is refused from now on",
    )


@admin.register(ApiKey)
class ApiKeyAdmin(ConsoleAdmin):
    """Keys by their prefix; the key itself is shown once, when it is made; its hash is never
    shown."""

    owner_path = "user"
    list_display = (
        "prefix",
        "name",
        "owner_link",
        "state",
        "created",
        "last_used",
        "expires",
    )
    list_filter = (
        ("user", AutocompleteSelectFilter),
        ("created_at", MomentFilter),
        ("last_used_at", MomentFilter),
    )
    list_filter_submit = True
    list_select_related = ("user",)
    search_fields = ("name__icontains", "prefix__startswith", "user__username__startswith")
    search_help_text = "Part of a key's name, or the beginning of its prefix or of a user's name"
    ordering = ("-created_at",)
    sortable_by = ("name", "created", "last_used")
    actions = ("revoke_selected",)
    actions_list = ("new_key",)
    actions_detail = ("rotate", "revoke")
    fieldsets = (
        (
            None,
            {
                "fields": (
                    ("prefix", "name"),
                    ("owner_link", "state"),
                    ("created", "last_used"),
                    ("expires", "revoked"),
                )
            },
        ),
    )

    def get_queryset(self, request: HttpRequest) -> QuerySet[ApiKey]:
        return super().get_queryset(request).defer("key_hash")

    def lookup_allowed(self, lookup: str, value: str, request: HttpRequest) -> bool:
        """Not by hash: filtering by prefixes would reveal it."""
        allowed: bool = super().lookup_allowed(lookup, value, request)
        return allowed and not lookup.startswith("key_hash")

    @admin.display(description="State")
    def state(self, api_key: ApiKey) -> SafeString:
        return state_label(key_state(api_key))

    @admin.display(description="Owner")
    def owner_link(self, api_key: ApiKey) -> SafeString | None:
        return link(api_key.user)

    @admin.display(description="Created", ordering="created_at")
    def created(self, api_key: ApiKey) -> SafeString | None:
        return moment(api_key.created_at)

    @admin.display(description="Last used", ordering="last_used_at")
    def last_used(self, api_key: ApiKey) -> SafeString | None:
        return moment(api_key.last_used_at)

    @admin.display(description="Expires")
    def expires(self, api_key: ApiKey) -> SafeString | None:
        return moment(api_key.expires_at)

    @admin.display(description="Revoked")
    def revoked(self, api_key: ApiKey) -> SafeString | None:
        return moment(api_key.revoked_at)

    def has_revoke_permission(self, request: HttpRequest, object_id: str | None = None) -> bool:
        return self.matches(request, object_id, revoked_at__isnull=True)

    @verb(
        "Revoke",
        permission="revoke",
        icon="block",
        danger=True,
        question="Revoke this key?",
        answer="Revoke the key",
        explanation="Requests with this key are refused from now on. This cannot be undone.",
    )
    def revoke(self, request: HttpRequest, form: Any, object_id: str) -> HttpResponse:
        api_key = self.row(request, object_id)
        self.revoke_one(request, api_key)
        return redirect(request, page_url(api_key))

    @admin.action(description="Revoke selected keys", permissions=["revoke"])
    def revoke_selected(self, request: HttpRequest, queryset: QuerySet[ApiKey]) -> None:
        for api_key in queryset.filter(revoked_at__isnull=True):
            self.revoke_one(request, api_key)

    def revoke_one(self, request: HttpRequest, api_key: ApiKey) -> None:
        self.attempt(
            request,
            api_key,
            "revoked",
            lambda: api_key_revoke(api_key_id=api_key.pk, actor_id=request.user.pk),
        )

    @verb(
        "New key",
        icon="add",
        question="New API key",
        answer="Make the key",
        explanation="The key is shown once; only its hash is kept.",
        form_class=NewKeyForm,
    )
    def new_key(self, request: HttpRequest, form: NewKeyForm) -> HttpResponse:
        """Make a key and show it in this answer only: messages and sessions would keep it."""
        days = form.cleaned_data["expires_in_days"]
        api_key, key = api_key_create(
            user=form.cleaned_data["user"],
            name=form.cleaned_data["name"],
            expires_in=timedelta(days=days) if days else None,
            actor_id=request.user.pk,
        )
        self.log_addition(request, api_key, "made")
        return shown_once(request, SHOWN_ONCE, {"key": key})

    def has_rotate_permission(self, request: HttpRequest, object_id: str | None = None) -> bool:
        if object_id is None:
            return True
        api_key = self.get_object(request, unquote(object_id))
        return api_key is not None and key_state(api_key) == "active"

    @verb(
        "Rotate",
        permission="rotate",
        icon="autorenew",
        question="Replace this key?",
        answer="Make its successor",
        explanation="The new key has the same user, name and lifetime, and is shown once. The old "
        "one stays valid for a while, so that programs can change over without a failure.",
        form_class=RotateForm,
    )
    def rotate(self, request: HttpRequest, form: RotateForm, object_id: str) -> HttpResponse:
        old = self.row(request, object_id)
        made = api_key_rotate(
            api_key_id=old.pk,
            overlap=timedelta(hours=form.cleaned_data["overlap_hours"]),
            actor_id=request.user.pk,
        )
        if made is None:  # revoked meanwhile
            messages.error(request, f"{old}: it is not valid any more; make a new key")
            return redirect(request, page_url(old))
        self.log_change(request, old, f"replaced by {made[0].prefix}")
        self.log_addition(request, made[0], "made")
        return shown_once(request, SHOWN_ONCE, {"key": made[1]})


def key_state(api_key: ApiKey) -> str:
    """``active``, ``expired`` or ``revoked``."""
    if api_key.revoked_at is not None:
        return "revoked"
    if api_key.expires_at is not None and api_key.expires_at <= timezone.now():
        return "expired"
    return "active"
