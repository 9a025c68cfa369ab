"""Addresses: the admin, the manual, and the API."""

from django.contrib import admin
from django.urls import include, path

urlpatterns = [
    path("admin/", admin.site.urls),
    path("", include("tinkerapi.api.urls")),
]
