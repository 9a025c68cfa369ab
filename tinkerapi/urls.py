"""Addresses: the admin, the API, and the manual.

The API never redirects: a client would send its POST as a GET. Pages do, because a person
who types an address forgets a slash or adds one.
"""

from collections.abc import Callable

from django.contrib import admin
from django.http import HttpResponseBase
from django.templatetags.static import static
from django.urls import include, path
from django.views.decorators.csrf import csrf_exempt
from django.views.generic import RedirectView

from tinkerapi.api.quickref.views.service import IndexView
from tinkerapi.console import manual
from tinkerapi.console.front_page import front_page
from tinkerapi.console.invitations import InvitationView
from tinkerapi.console.playground import PlaygroundChatView

admin.autodiscover()  # ``tinkerapi.admin``


def redirect_to(name: str | None = None, url: str | None = None) -> Callable[..., HttpResponseBase]:
    """A view that sends a browser to the page of this name, or to this address."""
    methods = ["get", "head"]
    return csrf_exempt(RedirectView.as_view(pattern_name=name, url=url, http_method_names=methods))


# The manual's views change nothing, so a POST gets 405 instead of a CSRF error.
urlpatterns = [
    path("favicon.ico", redirect_to(url=static("tinkerapi/favicon.svg"))),
    # Before the API's, which describes it.
    path("", front_page(IndexView.as_view())),
    path("admin", redirect_to("admin:index")),
    path("admin/invitation/<uidb64>/<token>/", InvitationView.as_view(), name="invitation"),
    path("admin/", admin.site.urls),
    path("", include("tinkerapi.api.urls")),
    path("playground/chat", PlaygroundChatView.as_view(), name="playground-chat"),
    path("api/docs/", redirect_to("api-docs")),
    path("docs", redirect_to("docs")),
    path("docs/", csrf_exempt(manual.IndexView.as_view()), name="docs"),
    path("docs/<slug:folder>/<str:name>", csrf_exempt(manual.FileView.as_view()), name="docs-file"),
    path("docs/<slug:name>", csrf_exempt(manual.PageView.as_view()), name="docs-page"),
    path("docs/<slug:name>/", redirect_to("docs-page")),
]

handler400 = "tinkerapi.api.errors.bad_request"
handler403 = "tinkerapi.api.errors.permission_denied"
handler404 = "tinkerapi.api.errors.page_not_found"
handler500 = "tinkerapi.api.errors.server_error"
