"""All addresses of the API: the tables of all dialects, joined.

A path of both the quick reference and the tinker SDK goes to the view of the sender's dialect.
"""

from django.urls import URLPattern, URLResolver, include, path

from tinkerapi.api.dispatch import by_dialect
from tinkerapi.api.openai.urls import urlpatterns as openai_routes
from tinkerapi.api.quickref.urls import urlpatterns as quickref_routes
from tinkerapi.api.quickref.views.service import CapabilitiesView, HealthView
from tinkerapi.api.sdk.base import GROUP as SDK
from tinkerapi.api.sdk.urls import urlpatterns as sdk_routes

SDK_PREFIX = "api/v1/"
OPENAI_PREFIX = "v1/"

_quickref_paths = {str(route.pattern) for route in quickref_routes}
_sdk_views = {f"{SDK_PREFIX}{route.pattern}": route.callback for route in sdk_routes}


def _shared(route: URLPattern) -> URLPattern:
    """A route of the quick reference, which is also the SDK's if that has the path too."""
    sdk_view = _sdk_views.get(str(route.pattern))
    if sdk_view is None:
        return route
    return path(str(route.pattern), by_dialect(route.callback, sdk_view), name=route.name)


urlpatterns: list[URLPattern | URLResolver] = [
    *map(_shared, quickref_routes),
    # Two answers that are equal in both dialects, at the SDK's addresses.
    path(f"{SDK_PREFIX}healthz", HealthView.as_view(schema=None, group=SDK)),
    path(f"{SDK_PREFIX}get_server_capabilities", CapabilitiesView.as_view(schema=None, group=SDK)),
    path(
        SDK_PREFIX,
        include([r for r in sdk_routes if f"{SDK_PREFIX}{r.pattern}" not in _quickref_paths]),
    ),
    path(OPENAI_PREFIX, include(openai_routes)),
]
