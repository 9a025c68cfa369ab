"""The ASGI application that the web process serves."""

import gc
import os

os.environ.setdefault("DJANGO_SETTINGS_MODULE", "tinkerapi.settings")

from tinkerapi.handlers import build_application

application = build_application()

# The garbage collector need not look at all modules again while requests wait.
gc.collect()
gc.freeze()
