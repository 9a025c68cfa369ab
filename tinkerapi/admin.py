"""API keys, users and django-q2's own tables in the admin.

The pages of other packages are registered again on unfold's ModelAdmin. Accounts and the
queue's inside are for superusers; API keys are also for whoever owns them.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any, ClassVar

from django import forms
from django.conf import settings
from django.contrib import admin
from django.contrib.auth.admin import UserAdmin as DjangoUserAdmin
from django.contrib.auth.models import Group, User
from django.db.models import Model, QuerySet
from django.http import HttpRequest, HttpResponse
from django.shortcuts import render
from django.template.defaultfilters import filesizeformat
from django.utils import timezone
from django.utils.html import format_html_join
from django.utils.safestring import SafeString
from django_q.admin import FailAdmin, QueueAdmin, ScheduleAdmin, TaskAdmin
from django_q.models import Failure, OrmQ, Schedule, Success
from unfold.admin import ModelAdmin
from unfold.contrib.filters.admin import AutocompleteSelectFilter
from unfold.forms import (
    AdminPasswordChangeForm,
    BaseDialogForm,
    UserChangeForm,
    UserCreationForm,
)
from unfold.widgets import UnfoldAdminIntegerFieldWidget, UnfoldAdminSelectWidget
from unfold.widgets import UnfoldAdminTextInputWidget as TextInput

from futures.console import CarefulList, ConsoleAdmin, redirect, verb
from futures.display import link, list_link, moment, page_url, state_label
from futures.filters import MomentFilter
from futures.models import Future
from tinkerapi.models import ApiKey
from tinkerapi.services import MAX_EXPIRY_DAYS, api_key_create, api_key_revoke
from training.models import Checkpoint, Run
from training.storage_quota import storage_use


class NewKeyForm(BaseDialogForm):  # type: ignore[misc]  # unfold has no type information
    """Whose key, and for how long."""

    user = forms.ModelChoiceField(User.objects.none(), widget=UnfoldAdminSelectWidget)
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
        users = User.objects.filter(is_active=True).order_by("username")
        field = self.fields["user"]
        field.queryset = users if me.is_superuser else users.filter(pk=me.pk)
        field.initial = me.pk


@admin.register(ApiKey)
class ApiKeyAdmin(ConsoleAdmin):
    """Keys by their prefix; the key itself is shown once, when it is made, and its hash never."""

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
    actions_detail = ("revoke",)
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
        """Not by hash: a list filtered by its beginnings would spell it out."""
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
        explanation="Requests that carry it are refused from now on, for good.",
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
        """Make a key and show it in this one answer: not in a message or a session, which last."""
        days = form.cleaned_data["expires_in_days"]
        api_key, key = api_key_create(
            user=form.cleaned_data["user"],
            name=form.cleaned_data["name"],
            expires_in=timedelta(days=days) if days else None,
            actor_id=request.user.pk,
        )
        self.log_addition(request, api_key, "made")
        response = render(request, "admin/tinkerapi/apikey/new_key.html", {"key": key})
        # Take the place of the whole dialog, whose form would otherwise be there to send again.
        response["HX-Retarget"] = "#modal-content"
        response["HX-Reselect"] = "#dialog"
        response["HX-Reswap"] = "innerHTML"
        return response


def key_state(api_key: ApiKey) -> str:
    """``active``, ``expired`` or ``revoked``."""
    if api_key.revoked_at is not None:
        return "revoked"
    if api_key.expires_at is not None and api_key.expires_at <= timezone.now():
        return "expired"
    return "active"


class SuperuserAdmin(ModelAdmin):  # type: ignore[misc]  # unfold has no type information
    """Pages that only superusers see, whatever permissions other staff users were given."""

    def get_changelist(self, request: HttpRequest, **kwargs: Any) -> type[CarefulList]:
        return CarefulList

    def has_module_permission(self, request: HttpRequest) -> bool:
        return bool(request.user.is_superuser)

    def has_view_permission(self, request: HttpRequest, obj: Model | None = None) -> bool:
        return bool(request.user.is_superuser)

    has_change_permission = has_view_permission
    has_delete_permission = has_view_permission


for model in (User, Group, Schedule, Success, Failure, OrmQ):
    admin.site.unregister(model)


class NewUserForm(UserCreationForm):  # type: ignore[misc]  # unfold has no type information
    """A new person, who needs no password to train."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        field = self.fields["usable_password"]
        field.label = "Has a password"
        field.help_text = "Only the admin asks for it; the API takes a key."
        field.choices = [("true", "Yes"), ("false", "No")]


@admin.register(User)
class UserAdmin(SuperuserAdmin, DjangoUserAdmin):  # type: ignore[type-arg]  # no subscript at run time
    form = UserChangeForm
    add_form = NewUserForm
    change_password_form = AdminPasswordChangeForm
    # Said again: unfold's ModelAdmin stands before Django's and has an empty one.
    add_fieldsets = DjangoUserAdmin.add_fieldsets
    # No permissions and groups: a person is a client, staff with their own rows, or a superuser.
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

    @admin.display(description="Lists")
    def owned(self, user: User) -> SafeString:
        """Links to what this person has."""
        lists = (
            list_link(Run, "runs", owner__id__exact=user.pk),
            list_link(Future, "futures", owner__id__exact=user.pk),
            list_link(Checkpoint, "checkpoints", run__owner__id__exact=user.pk),
            list_link(ApiKey, "API keys", user__id__exact=user.pk),
        )
        return format_html_join(", ", "{}", ((item,) for item in lists))

    @admin.display(description="Stored")
    def stored(self, user: User) -> str:
        """What this person's things take, and the most that one person's may."""
        limit: int = settings.USER_STORAGE_BYTES
        of_limit = f" Of {filesizeformat(limit)} that one user may take." if limit else ""
        return f"{storage_use(user.pk)}.{of_limit}"


@admin.register(Schedule)
class ScheduledTaskAdmin(SuperuserAdmin, ScheduleAdmin):  # type: ignore[misc]  # nor has django-q2
    pass


class QueueWindow(SuperuserAdmin):
    """django-q2's rows are its own; they only ring, so there is nothing to mend in them."""

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
