"""``manage.py sweepfiles``: find the files that a crash left behind, and optionally delete them."""

from __future__ import annotations

from argparse import ArgumentParser
from typing import Any

from django.core.management.base import BaseCommand

from training.services import folders_unnamed
from training.storage.chosen import storage


class Command(BaseCommand):
    help = (
        "List folders of checkpoints and snapshots that no row refers to and that are "
        "older than a day; --delete deletes them."
    )

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("--delete", action="store_true", help="delete the listed folders")

    def handle(self, *args: Any, delete: bool, **options: Any) -> None:
        found = folders_unnamed()
        for folder in found:
            where = f"{storage().location}/{folder.directory}"
            self.stdout.write(f"{folder.size_bytes:>15,} bytes  {where}")
            if delete:
                storage().purge(folder.directory)
        verb = "deleted" if delete else "found"
        self.stdout.write(f"{len(found)} folders {verb}")
