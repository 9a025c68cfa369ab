"""``manage.py test``: the whole test suite, by pytest, with a real Postgres and a real server."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from django.conf import settings
from django.core.management import CommandError
from django.core.management.base import BaseCommand

MOST_PROCESSES = 4
"""Each starts a Postgres, and servers with workers, of its own."""


class Command(BaseCommand):
    help = "Run the test suite; all arguments are pytest's, and without any all cores are used."

    def run_from_argv(self, argv: Sequence[str]) -> None:
        """Replace this process by pytest, which parses the options."""
        if not (settings.BASE_DIR / "tests").is_dir():
            raise CommandError("only a checkout has the tests; this is an installed package")
        # The tests have their own settings, which pytest reads from pyproject.toml.
        environment = {k: v for k, v in os.environ.items() if k != "DJANGO_SETTINGS_MODULE"}
        os.chdir(settings.BASE_DIR)
        arguments = argv[2:] or ["-n", str(num_processes()), "--dist", "loadfile"]
        command = [sys.executable, "-m", "pytest", *arguments]
        os.execve(sys.executable, command, environment)  # noqa: S606


def num_processes() -> int:
    """Processes that share the whole suite: one for each core."""
    return min(os.cpu_count() or 1, MOST_PROCESSES)
