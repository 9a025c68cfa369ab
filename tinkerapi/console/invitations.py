"""Links with which a person sets a password and may then enter the console.

A link holds a token of Django's: it works once, for three days, and only until the password changes
or the person logs in. Nothing is stored, and nobody but the person learns the password.
"""

from __future__ import annotations

from typing import Any

from django.conf import settings
from django.contrib import admin
from django.contrib.auth.models import User
from django.contrib.auth.tokens import default_token_generator
from django.contrib.auth.views import PasswordResetConfirmView
from django.http import HttpRequest
from django.urls import reverse, reverse_lazy
from django.utils.encoding import force_bytes
from django.utils.http import urlsafe_base64_encode
from unfold.forms import AdminPasswordChangeForm

from tinkerapi.services import user_admit


class PasswordForm(AdminPasswordChangeForm):  # type: ignore[misc]  # unfold has no type information
    """The new password, twice. An account without a password is no choice here."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.fields.pop("usable_password", None)


def invitation(user: User, *, request: HttpRequest) -> str:
    """Let a user enter the console, and return the address at which they set their password."""
    user_admit(user=user, actor_id=request.user.pk)
    uid = urlsafe_base64_encode(force_bytes(user.pk))
    path = reverse("invitation", args=[uid, default_token_generator.make_token(user)])
    return settings.PUBLIC_URL + path if settings.PUBLIC_URL else request.build_absolute_uri(path)


class InvitationView(PasswordResetConfirmView):
    """The page of such a link. The token moves into the session, so that no page that is opened
    from here learns it."""

    form_class = PasswordForm
    template_name = "console/invitation.html"
    success_url = reverse_lazy("admin:login")
    title = "Set your password"

    def get_user(self, uidb64: str) -> User | None:
        """Nobody for an account that was deactivated after the invitation."""
        user = super().get_user(uidb64)
        return user if isinstance(user, User) and user.is_active else None

    def get_context_data(self, **kwargs: Any) -> dict[str, Any]:
        if not self.validlink:
            kwargs["form"] = None  # there is no user whose form it would be
        context = admin.site.each_context(self.request) | super().get_context_data(**kwargs)
        return context | {"title": self.title}
