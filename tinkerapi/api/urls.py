"""The route table: one line per endpoint, in the order of the manual."""

from django.urls import URLPattern, URLResolver

urlpatterns: list[URLPattern | URLResolver] = []
