"""The client's credential: its description, and a short-lived token for it."""

from __future__ import annotations

from typing import cast

from django.conf import settings
from django.http import Http404, HttpResponse
from rest_framework.exceptions import AuthenticationFailed, PermissionDenied
from rest_framework.request import Request

from tinkerapi.api.authentication import bears_token
from tinkerapi.api.renderers import JSONResponse
from tinkerapi.api.sdk.base import SdkView, empty_response
from tinkerapi.models import ApiKey
from tinkerapi.services import api_key_revoke
from tinkerapi.tokens import ORGANIZATION, token_issue


class TokenView(SdkView):
    """Exchange a key for a token of an hour, if TINKERAPI_SDK_JWT is 1."""

    def post(self, request: Request) -> HttpResponse:
        if not settings.SDK_JWT:
            raise Http404
        if bears_token(request):  # or a stolen one would never expire
            raise PermissionDenied(
                "A token cannot be exchanged for a token; send the API key itself."
            )
        return JSONResponse({"jwt": token_issue(_api_key(request))})


class OwnKeyView(SdkView):
    """Describe the key that is sent (GET), or revoke it (DELETE)."""

    def get(self, request: Request) -> HttpResponse:
        api_key = _api_key(request)
        return JSONResponse(
            {
                "key_id": api_key.pk,
                "name": api_key.name,
                "note": "",
                "details": {
                    "org_details": {"name": ORGANIZATION},
                    "user_details": {"email": api_key.user.email or api_key.user.get_username()},
                },
            }
        )

    def delete(self, request: Request) -> HttpResponse:
        api_key_revoke(api_key_id=_api_key(request).pk, actor_id=request.user.pk)
        return empty_response()


def _api_key(request: Request) -> ApiKey:
    """The request's key; a request without a key is refused, even a local one."""
    if request.auth is None:
        raise AuthenticationFailed("Send an API key in the X-API-Key header.")
    return cast(ApiKey, request.auth)
