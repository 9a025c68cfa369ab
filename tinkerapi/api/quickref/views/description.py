"""The OpenAPI description, and a page made from it; both are open to everybody."""

from __future__ import annotations

from django.http import HttpRequest
from drf_spectacular.views import SpectacularAPIView, SpectacularSwaggerSplitView

GROUP = "Documents"


class SchemaView(SpectacularAPIView):
    """Describe the endpoints of the groups above in OpenAPI."""

    group = GROUP
    authentication_classes = ()

    def _get_version_parameter(self, request: HttpRequest) -> None:
        """None: there is only one version. The package's own method copies the requested version
        into a header, which fails for some texts."""


class TryView(SpectacularSwaggerSplitView):
    """Show that description as a page to try the endpoints in."""

    group = GROUP
    authentication_classes = ()
