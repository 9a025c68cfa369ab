"""The ASGI application that the web process serves."""

import os

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "tinkerapi.settings")

from tinkerapi.handlers import build_application

application = build_application()
