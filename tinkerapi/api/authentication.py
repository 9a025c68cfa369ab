"""Who a request speaks for: the owner of its API key, or ``local`` without one.

A key comes as ``X-API-Key`` or ``Authorization: Bearer``. A wrong key is refused even where
none is needed, so that a mistyped key is never mistaken for another user.

Without a key, and unless the settings demand one, a request from this very machine acts as
the user ``local``. That makes three attacks possible that keys prevent, so such a request
must also show that none of them is under way:

* A reverse proxy on this machine makes the whole network look local. Any forwarding header
  means a proxy; those headers are never believed, they only cost the request its privilege.
* A web page open in a browser on this machine can send requests here. Browsers name the
  page in ``Origin``, which must be this server; and they ask first before they send JSON to
  another origin, which is never granted. So a body must be ``application/json``.
* Such a page can reach this server under its own name, by pointing its DNS entry at
  127.0.0.1 after it was loaded. Hence ``Host`` must be a name of this machine.
"""

from __future__ import annotations

import ipaddress

from django.conf import settings
from django.contrib.auth.models import AbstractBaseUser, User
from django.http import HttpRequest
from rest_framework.authentication import BaseAuthentication
from rest_framework.exceptions import AuthenticationFailed, UnsupportedMediaType
from rest_framework.request import Request

from tinkerapi.api.parsers import JSON
from tinkerapi.models import ApiKey
from tinkerapi.selectors import user_by_name
from tinkerapi.services import LOCAL_USERNAME, api_key_verify
from tinkerapi.tokens import TOKEN_PREFIX, token_verify

# testserver is what Django's test client calls itself; no public DNS can hold the name.
LOCAL_HOSTS = frozenset({"localhost", "127.0.0.1", "[::1]", "testserver"})

FORWARDING_HEADERS = ("Forwarded", "X-Forwarded-For", "X-Forwarded-Host", "X-Real-IP", "Via")


class ApiKeyAuthentication(BaseAuthentication):
    """DRF's authentication class for every view that needs a user."""

    def authenticate(self, request: Request) -> tuple[AbstractBaseUser, ApiKey | None]:
        key = _key(request)
        if key is None:
            _check_keyless(request._request)
            return local_user(), None
        if settings.SDK_JWT and key.startswith(TOKEN_PREFIX):
            api_key = token_verify(key)
        else:
            api_key = api_key_verify(key)
        if api_key is None:
            raise AuthenticationFailed("The API key is unknown, expired or revoked.")
        return api_key.user, api_key

    def authenticate_header(self, request: Request) -> str:
        if settings.SDK_JWT and (_key(request) or "").startswith(TOKEN_PREFIX):
            # The SDK then exchanges its key for another token and sends the request again.
            return 'Bearer realm="tinkerapi", error="invalid_token"'
        return 'Bearer realm="tinkerapi"'


def local_user() -> AbstractBaseUser:
    """The user for whom keyless local requests act; made at the first one if ``up`` did not.

    It has no password, so nobody can log in to the admin as it.
    """
    user = user_by_name(LOCAL_USERNAME)
    if user is None:
        user, _ = User.objects.get_or_create(username=LOCAL_USERNAME)
    if not user.is_active:
        raise AuthenticationFailed("Keyless requests are closed: the user 'local' is inactive.")
    return user


def _key(request: Request) -> str | None:
    """The key that the request carries; an empty header counts as a key, and a wrong one."""
    headers = request.headers
    if "X-API-Key" in headers:
        return str(headers["X-API-Key"]).strip()
    scheme, _, credentials = str(headers.get("Authorization", "")).partition(" ")
    if scheme.lower() == "bearer":
        return credentials.strip()
    return None


def _check_keyless(request: HttpRequest) -> None:
    """Refuse a request without a key unless it surely comes from a program on this machine."""
    if settings.REQUIRE_API_KEY:
        raise AuthenticationFailed("Send an API key in the X-API-Key header.")
    if not _is_loopback(request.META.get("REMOTE_ADDR", "")):
        raise AuthenticationFailed("Only requests from this machine may omit the X-API-Key header.")
    for header in FORWARDING_HEADERS:
        if header in request.headers:
            raise AuthenticationFailed(
                f"A request with a {header} header comes through a proxy; send an X-API-Key header."
            )
    host = request.META.get("HTTP_HOST") or request.META.get("SERVER_NAME", "")
    if _host_name(host) not in LOCAL_HOSTS:
        raise AuthenticationFailed(
            f"Host {host[:100]!r} is no name of this machine; use localhost, or send an "
            "X-API-Key header."
        )
    origin = request.headers.get("Origin")
    if origin is not None and origin.partition("://")[2] != host:
        raise AuthenticationFailed(
            f"A web page of {origin[:100]!r} may not use this server without an X-API-Key header."
        )
    content_type = request.content_type or ""
    if request.method == "POST" and content_type not in ("", JSON):
        raise UnsupportedMediaType(
            content_type, detail=f"Content-Type: expected {JSON}; got {content_type[:100]!r}"
        )


def _is_loopback(address: str) -> bool:
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return False
    mapped = getattr(parsed, "ipv4_mapped", None)
    return bool((mapped or parsed).is_loopback)


def _host_name(host: str) -> str:
    """Without the port; brackets of an IPv6 address stay."""
    name, separator, port = host.rpartition(":")
    return (name if separator and port.isdigit() else host).lower()
