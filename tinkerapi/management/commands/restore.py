"""``manage.py restore FOLDER``: a new data folder and database from a backup."""

from __future__ import annotations

from argparse import ArgumentParser
from pathlib import Path
from typing import Any

from django.conf import settings
from django.core.management.base import BaseCommand, CommandError
from django.db import OperationalError

from tinkerapi.server.backup import BackupError, backup_restore
from tinkerapi.server.postgres_cluster import PostgresError
from tinkerapi.server.upgrade import database_down_reason


class Command(BaseCommand):
    help = (
        "Fill a new data folder (TINKERAPI_DATA_DIR) and, with DATABASE_URL, a new database, from "
        "a backup; then `up` continues from there."
    )
    requires_system_checks = ()

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("folder", type=Path, help="the folder that `manage.py backup` wrote")

    def handle(self, *args: Any, folder: Path, **options: Any) -> None:
        try:
            backup = backup_restore(folder.resolve())
        except (BackupError, PostgresError, OSError) as error:
            raise CommandError(str(error)) from error
        except OperationalError as error:
            raise CommandError(database_down_reason(error) or str(error)) from error
        self.stdout.write(f"{settings.DATA_DIR} is as the server was at {backup.made_at}")
        self.stdout.write(
            f"now start it with the base models {', '.join(backup.base_models)}: manage.py up"
        )
