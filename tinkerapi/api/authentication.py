"""The user of a request: the owner of its API key, or ``local`` without one.

A key comes as ``X-API-Key`` or ``Authorization: Bearer``. A wrong key is refused even if
none is needed, so that a mistyped key never acts as another user.

Without a key, unless the settings require one, a request from this machine acts as
the user ``local``; ``keyless`` decides when that is certain.
"""

from __future__ import annotations

from django.conf import settings
from django.contrib.auth.models import AbstractBaseUser
from rest_framework.authentication import BaseAuthentication
from rest_framework.exceptions import AuthenticationFailed
from rest_framework.request import Request

from tinkerapi.api.keyless import check_keyless
from tinkerapi.models import ApiKey
from tinkerapi.selectors import user_by_name
from tinkerapi.services import LOCAL_USERNAME, api_key_verify, user_ensure
from tinkerapi.tokens import TOKEN_PREFIX, token_verify


class ApiKeyAuthentication(BaseAuthentication):
    """DRF's authentication class for every view that needs a user."""

    def authenticate(self, request: Request) -> tuple[AbstractBaseUser, ApiKey | None]:
        key = _key(request)
        if key is None:
            check_keyless(request._request)
            return local_user(), None
        api_key = token_verify(key) if bears_token(request) else api_key_verify(key)
        if api_key is None:
            raise AuthenticationFailed("The API key is unknown, expired or revoked.")
        return api_key.user, api_key

    def authenticate_header(self, request: Request) -> str:
        if bears_token(request):
            # The SDK then exchanges its key for another token and sends the request again.
            return 'Bearer realm="tinkerapi", error="invalid_token"'
        return 'Bearer realm="tinkerapi"'


def local_user() -> AbstractBaseUser:
    """The user of keyless local requests; created at the first one if ``up`` did not.

    It has no password, so nobody can log in to the admin as this user.
    """
    user = user_by_name(LOCAL_USERNAME) or user_ensure(LOCAL_USERNAME)[0]
    if not user.is_active:
        raise AuthenticationFailed(
            "Requests without a key are refused: the user 'local' is inactive."
        )
    return user


def bears_token(request: Request) -> bool:
    """Whether the request has a token in place of a key."""
    return settings.SDK_JWT and (_key(request) or "").startswith(TOKEN_PREFIX)


def _key(request: Request) -> str | None:
    """The request's key; an empty header counts as a wrong key."""
    headers = request.headers
    if "X-API-Key" in headers:
        return str(headers["X-API-Key"]).strip()
    scheme, _, credentials = str(headers.get("Authorization", "")).partition(" ")
    if scheme.lower() == "bearer":
        return credentials.strip()
    return None
