"""Addresses: the admin, the API, and the manual."""

from django.contrib import admin
from django.urls import include, path

from tinkerapi import manual


urlpatterns = [
    path("admin/", admin.site.urls),
    path("", include("tinkerapi.api.urls")),
    path("api/v1/", include("tinkerapi.api.sdk.urls")),
    path("v1/", include("tinkerapi.api.openai.urls")),
    path("docs/", manual.IndexView.as_view(), name="docs"),
    path("docs/<slug:name>", manual.PageView.as_view(), name="docs-page"),
]

handler400 = "tinkerapi.api.errors.bad_request"
handler403 = "tinkerapi.api.errors.permission_denied"
handler404 = "tinkerapi.api.errors.page_not_found"
handler500 = "tinkerapi.api.errors.server_error"
