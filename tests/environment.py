"""Environment variables for the commands that tests and benchmarks start.

What the shell sets for a server of its own must not reach them: with its DATABASE_URL a test's
server would work on that server's database.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

TEST_DATABASE_URL = "TINKERAPI_TEST_DATABASE_URL"
"""Names a Postgres for the tests to make their database in; without it they start their own."""

_CLIENTS = ("TINKER_API_KEY", "TINKER_BASE_URL", "OPENAI_API_KEY", "OPENAI_BASE_URL")


def is_of_the_shell(name: str) -> bool:
    """Whether a variable configures somebody's server, client or connection to Postgres."""
    return (
        name in ("DATABASE_URL", *_CLIENTS)
        or (name.startswith("TINKERAPI_") and not name.startswith("TINKERAPI_TEST_"))
        or (name.startswith("PG") and name[2:].isalpha())  # libpq's
    )


def clean_environment() -> dict[str, str]:
    """This process's environment without what configures a server or a client."""
    return {name: value for name, value in os.environ.items() if not is_of_the_shell(name)}


def command_environment(data_dir: Path, settings: Mapping[str, str]) -> dict[str, str]:
    """For a command of ours on this data folder, with the project's own settings."""
    return {
        **clean_environment(),
        "DJANGO_SETTINGS_MODULE": "tinkerapi.settings",
        "TINKERAPI_DATA_DIR": str(data_dir),
        **settings,
    }
