"""The project's settings with what tests need changed.

Tests run on a real Postgres: DATABASE_URL if set, otherwise the embedded one, which
``tests/conftest.py`` starts before Django connects.
"""

from tinkerapi.settings import *  # noqa: F403

SECRET_KEY = "tests"  # noqa: S105
PASSWORD_HASHERS = ["django.contrib.auth.hashers.MD5PasswordHasher"]
