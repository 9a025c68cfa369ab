"""The OpenAPI description, and a page made from it; both are open to everybody."""

from __future__ import annotations

from drf_spectacular.views import SpectacularAPIView, SpectacularSwaggerView

GROUP = "Documents"


class SchemaView(SpectacularAPIView):
    """Describe the endpoints of the groups above in OpenAPI."""

    group = GROUP
    authentication_classes = ()


class TryView(SpectacularSwaggerView):
    """Show that description as a page to try the endpoints in."""

    group = GROUP
    authentication_classes = ()
