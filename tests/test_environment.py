"""The suite and a server started from the same shell do not affect each other."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.environment import clean_environment
from tests.server import ROOT

OF_A_SERVER = {
    "DATABASE_URL": "postgresql://db.example/production",
    "PGPORT": "6543",
    "TINKERAPI_DATA_DIR": "/srv/production",
    "TINKERAPI_BASE_MODEL": "/nowhere/model",
    "TINKERAPI_REQUIRE_API_KEY": "1",
    "TINKERAPI_MAX_PENDING": "1",
    "TINKER_API_KEY": "tml-somebody",
}

PRINTS_SETTINGS = """
import os
from tests import settings
print(settings.DATA_DIR, settings.DATABASE_URL, settings.BASE_MODELS, settings.REQUIRE_API_KEY,
      settings.MAX_PENDING, sorted(set(os.environ) & {"PGPORT", "TINKER_API_KEY"}), sep="\\n")
os.rmdir(settings.DATA_DIR)
"""


def settings_of_a_run(**environment: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", PRINTS_SETTINGS],
        cwd=ROOT,
        env={"PATH": os.environ["PATH"], **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.splitlines()


def test_tests_take_nothing_of_a_server_from_the_shell() -> None:
    bare, beside = settings_of_a_run(), settings_of_a_run(**OF_A_SERVER)

    assert bare[1:] == beside[1:]
    assert bare[1] == "", "an embedded Postgres"
    assert "/srv/production" not in beside[0]


def test_tests_use_a_postgres_of_ones_own_only_where_it_is_named_for_them() -> None:
    url = "postgresql://db.example/scratch"

    assert settings_of_a_run(TINKERAPI_TEST_DATABASE_URL=url)[1] == url


def test_commands_that_tests_start_take_nothing_of_a_server(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, value in OF_A_SERVER.items():
        monkeypatch.setenv(name, value)

    assert not set(OF_A_SERVER) & set(clean_environment())
