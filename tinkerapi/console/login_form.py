"""The admin's login: delayed after failures, and every checked password is in the audit log."""

from __future__ import annotations

import math
from typing import Any

from django.contrib.auth.models import User
from django.core.exceptions import ValidationError
from unfold.forms import AuthenticationForm

from tinkerapi.login_delay import client_address, login_begin, login_succeeded
from training.audit import audit_login

MAX_USERNAME = 150  # Django's limit; longer input is not stored completely


class LoginForm(AuthenticationForm):  # type: ignore[misc]  # unfold has no types
    """Unfold's form; while the login is delayed, no password is checked."""

    def clean(self) -> dict[str, Any]:
        username = self.cleaned_data.get("username")
        if username is None or not self.cleaned_data.get("password"):
            cleaned: dict[str, Any] = super().clean()
            return cleaned
        address = client_address(self.request)
        # Normalized as in the database: nobody has two names.
        username = User.normalize_username(username)[:MAX_USERNAME]
        if wait := login_begin(username=username, address=address):
            raise ValidationError(
                f"Too many logins have failed. Try again in {math.ceil(wait)} seconds.",
                code="too_many",
            )
        try:
            cleaned = super().clean()
        except ValidationError:
            audit_login("failed", username=username, address=address)
            raise
        login_succeeded(username=username, address=address)
        audit_login("succeeded", username=username, address=address)
        return cleaned
