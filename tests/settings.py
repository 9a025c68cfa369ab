"""The project's settings with what tests need changed.

Tests run on a real Postgres: TINKERAPI_TEST_DATABASE_URL if set, otherwise an embedded one that
``tests/conftest.py`` starts before the first test that wants a database. The data folder is
a temporary one, made here because the settings read it as they load; a process that a test
starts inherits it. Each of pytest-xdist's processes has its own folder, with its own Postgres. Of
what the shell sets for a server of its own, nothing is taken over.
"""

import os
import tempfile

from tests.environment import TEST_DATABASE_URL, is_of_the_shell

# A process of a test gets the variables, and one of pytest-xdist those of the run's first process.
if os.environ.get("TINKERAPI_TEST_PROCESS") != os.environ.get("PYTEST_XDIST_WORKER", "one"):
    os.environ["TINKERAPI_TEST_PROCESS"] = os.environ.get("PYTEST_XDIST_WORKER", "one")
    for name in [name for name in os.environ if is_of_the_shell(name)]:
        del os.environ[name]
    if url := os.environ.get(TEST_DATABASE_URL):
        os.environ["DATABASE_URL"] = url
    os.environ["TINKERAPI_TEST_DATA_DIR"] = tempfile.mkdtemp(prefix="tinkerapi-tests-")
os.environ["TINKERAPI_DATA_DIR"] = os.environ["TINKERAPI_TEST_DATA_DIR"]
# Before torch is loaded: its idle threads would wait in busy loops, and the parts of a test share
# the processors.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from tinkerapi.settings import *  # noqa: F403

SECRET_KEY = "tests"  # noqa: S105
PASSWORD_HASHERS = ["django.contrib.auth.hashers.MD5PasswordHasher"]
