"""Checks that a request without a key certainly comes from a program on this machine.

Only then may it act as the user ``local``. Keys prevent three attacks, so a request without one
must show that it is none of them:

* A reverse proxy on this machine makes the whole network look local. A request that may have come
  through one needs a key: it has a header that proxies add, uses HTTP/1.0, as proxies still do and
  programs do not, or has a ``Host`` that is no loopback name. These headers are never trusted; they
  only show that a key is needed. A proxy may hide all of this, so an operator who has
  one sets its address (``TINKERAPI_PUBLIC_URL``), and then every request needs a key.
* A web page open in a browser on this machine can send requests here. Browsers name the
  page in ``Origin``, which must be this server, or say in ``Sec-Fetch-Site`` that it is another
  site; and they ask for permission before they send JSON to another origin, which this server never
  grants. So a body must be ``application/json``, or an archive.
* Such a page can reach this server under its own name, by pointing its DNS entry at
  127.0.0.1 after it was loaded. Hence ``Host`` must be a name of this machine.
"""

from __future__ import annotations

import ipaddress

from django.conf import settings
from django.http import HttpRequest
from rest_framework.exceptions import (
    APIException,
    AuthenticationFailed,
    PermissionDenied,
    UnsupportedMediaType,
)

from tinkerapi.api.bodies.archives import ARCHIVE_TYPES
from tinkerapi.api.bodies.parsers import JSON

FORWARDING_HEADERS = frozenset(
    {
        "cdn-loop",
        "client-ip",
        "fastly-client-ip",
        "fly-client-ip",
        "forwarded",
        "forwarded-for",
        "max-forwards",
        "true-client-ip",
        "via",
        "x-appengine-user-ip",
        "x-client-ip",
        "x-cluster-client-ip",
        "x-envoy-external-address",
        "x-original-forwarded-for",
        "x-original-host",
        "x-original-url",
        "x-proxyuser-ip",
        "x-real-ip",
        "x-remote-ip",
        "x-scheme",
    }
)
"""Headers that proxies and tunnels add, in lower case."""

FORWARDING_PREFIXES = (
    "x-forwarded",
    "cf-",
    "tailscale-",
    "x-arr-",
    "x-azure-",
    "x-amzn-",
)

OLD_HTTP = ("1", "1.0", "0.9")
"""HTTP versions as ASGI servers write them; granian leaves out the zero."""

ASKED_ABOUT = (JSON, *ARCHIVE_TYPES)
"""Content types that a browser sends to another origin only if that origin permits it."""

SAME_SITE = ("same-origin", "none")
"""Values of ``Sec-Fetch-Site`` for a page of this server, or a person who typed the address."""


def is_local_host(host: str) -> bool:
    """Whether a ``Host`` header, with or without its port, is a loopback name."""
    name, separator, port = host.rpartition(":")
    return (name if separator and port.isdigit() else host).lower() in settings.LOOPBACK_NAMES


def check_keyless(request: HttpRequest) -> None:
    """Refuse a request without a key unless it certainly comes from a program on this machine.

    Raises:
        AuthenticationFailed: It needs a key. (401)
        PermissionDenied: A page of another origin made a browser send it. (403)
        UnsupportedMediaType: A page might have sent it, because browsers allow this content type.
            (415)
    """
    if settings.REQUIRE_API_KEY:
        raise AuthenticationFailed("Send an API key in the X-API-Key header.")
    if not _is_loopback(request.META.get("REMOTE_ADDR", "")):
        raise AuthenticationFailed("Only requests from this machine may omit the X-API-Key header.")
    if reason := _proxied(request):
        raise AuthenticationFailed(f"{reason}; send an X-API-Key header.")
    _check_origin(request)
    content_type = request.content_type or ""
    if request.method == "POST" and content_type not in ("", *ASKED_ABOUT):
        is_form = content_type == "multipart/form-data"
        why = "; a web page can send forms, so they need an X-API-Key header" if is_form else ""
        raise UnsupportedMediaType(
            content_type, detail=f"Content-Type: expected {JSON}; got {content_type[:100]!r}{why}"
        )


def _proxied(request: HttpRequest) -> str | None:
    """Why this may have come through a proxy, as part of a sentence; None if no sign of one is
    found."""
    for header in request.headers:
        name = header.lower()
        if name in FORWARDING_HEADERS or name.startswith(FORWARDING_PREFIXES):
            return f"A request with a {header} header comes through a proxy"
    if getattr(request, "scope", {}).get("http_version", "1.1") in OLD_HTTP:
        return "A request in HTTP/1.0 may come through a proxy"
    host = request.META.get("HTTP_HOST", "")
    if not is_local_host(host):
        return f"Host {host[:100]!r} is not a name of this machine, such as localhost"
    return None


def _check_origin(request: HttpRequest) -> None:
    origin = request.headers.get("Origin")
    if origin is not None and origin.partition("://")[2] != request.META.get("HTTP_HOST"):
        raise _foreign_page(f"A web page of {origin[:100]!r}")
    site = request.headers.get("Sec-Fetch-Site")
    if site is not None and site not in SAME_SITE:
        raise _foreign_page(f"A web page of another site (Sec-Fetch-Site: {site[:40]!r})")


def _foreign_page(who: str) -> APIException:
    return PermissionDenied(f"{who} may not use this server without an X-API-Key header.")


def _is_loopback(address: str) -> bool:
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return False
    mapped = getattr(parsed, "ipv4_mapped", None)
    return bool((mapped or parsed).is_loopback)
