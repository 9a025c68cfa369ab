"""Whether a request without a key surely comes from a program on this machine.

Only then may it act as the user ``local``. Three attacks are possible without keys that keys
prevent, so the request must also show that none of them is under way:

* A reverse proxy on this machine makes the whole network look local. Whatever looks as if it came
  through one needs a key: a header that proxies add, HTTP/1.0, which proxies still speak and
  programs do not, or a ``Host`` that is no loopback name. Those headers are never believed; they
  only cost the request its privilege. A proxy may be set up to show nothing of itself, so who has
  one names its address (``TINKERAPI_PUBLIC_URL``), and then everybody needs a key.
* A web page open in a browser on this machine can send requests here. Browsers name the
  page in ``Origin``, which must be this server, or say in ``Sec-Fetch-Site`` that it is another;
  and they ask first before they send JSON to another origin, which is never granted. So a body
  must be ``application/json``.
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
"""What proxies and tunnels add to what they pass on, in lower case."""

FORWARDING_PREFIXES = (
    "x-forwarded",
    "cf-",
    "tailscale-",
    "x-arr-",
    "x-azure-",
    "x-amzn-",
)

OLD_HTTP = ("1", "1.0", "0.9")
"""As ASGI servers write it; granian leaves out the zero."""

SAME_SITE = ("same-origin", "none")
"""Of ``Sec-Fetch-Site``: a page of this server, or a person who typed the address."""


def is_local_host(host: str) -> bool:
    """Whether a ``Host`` header, with or without its port, is a loopback name."""
    name, separator, port = host.rpartition(":")
    return (name if separator and port.isdigit() else host).lower() in settings.LOOPBACK_NAMES


def check_keyless(request: HttpRequest) -> None:
    """Refuse a request without a key unless it surely comes from a program on this machine.

    Raises:
        AuthenticationFailed: It needs a key. (401)
        PermissionDenied: A page of another origin made a browser send it. (403)
        UnsupportedMediaType: A page might have, for it need not ask before it sends this. (415)
    """
    if settings.REQUIRE_API_KEY:
        raise AuthenticationFailed("Send an API key in the X-API-Key header.")
    if not _is_loopback(request.META.get("REMOTE_ADDR", "")):
        raise AuthenticationFailed("Only requests from this machine may omit the X-API-Key header.")
    if reason := _proxied(request):
        raise AuthenticationFailed(f"{reason}; send an X-API-Key header.")
    _check_origin(request)
    content_type = request.content_type or ""
    if request.method == "POST" and content_type not in ("", JSON):
        raise UnsupportedMediaType(
            content_type, detail=f"Content-Type: expected {JSON}; got {content_type[:100]!r}"
        )


def _proxied(request: HttpRequest) -> str | None:
    """Why this may have come through a proxy, as half a sentence; None if nothing says so."""
    for header in request.headers:
        name = header.lower()
        if name in FORWARDING_HEADERS or name.startswith(FORWARDING_PREFIXES):
            return f"A request with a {header} header comes through a proxy"
    if getattr(request, "scope", {}).get("http_version", "1.1") in OLD_HTTP:
        return "A request in HTTP/1.0 may come through a proxy"
    host = request.META.get("HTTP_HOST", "")
    if not is_local_host(host):
        return f"Host {host[:100]!r} is no name of this machine, such as localhost"
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
