"""The ASGI application that the web process serves."""

import os

from django.core.asgi import get_asgi_application

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "tinkerapi.settings")
django_application = get_asgi_application()

from tinkerapi.api.body_limit import limit_body  # noqa: E402 - needs Django's apps

application = limit_body(django_application)
