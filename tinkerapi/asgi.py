"""The ASGI application that the web process serves."""

import os

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "tinkerapi.settings")

from tinkerapi.handlers import build_application
from training.loaded_code import keep_what_is_loaded

application = build_application()
keep_what_is_loaded()
