"""``manage.py backup FOLDER``: a backup to a new folder, while the server runs."""

from __future__ import annotations

from argparse import ArgumentParser
from pathlib import Path
from typing import Any

from django.core.management.base import BaseCommand, CommandError
from django.db import OperationalError

from tinkerapi.server.backup import BackupError, backup_make
from tinkerapi.server.upgrade import database_down_reason


class Command(BaseCommand):
    help = (
        "Write the database and the files that it refers to to a new folder. The server may keep "
        "running; it or at least its database must run."
    )
    requires_system_checks = ()

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("folder", type=Path, help="the new folder, best on another disk")

    def handle(self, *args: Any, folder: Path, **options: Any) -> None:
        try:
            backup = backup_make(folder.resolve())
        except (BackupError, OSError) as error:
            raise CommandError(str(error)) from error
        except OperationalError as error:
            raise CommandError(database_down_reason(error) or str(error)) from error
        self.stdout.write(
            f"{folder}: the database and {backup.folders} folders of checkpoints and snapshots, "
            f"{backup.size_bytes:,} bytes"
        )
        self.stdout.write(f"base models, which are not in it: {', '.join(backup.base_models)}")
