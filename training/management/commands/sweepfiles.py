"""``manage.py sweepfiles``: find the files that a crash left behind, and optionally delete them."""

from __future__ import annotations

import shutil
from argparse import ArgumentParser
from pathlib import Path
from typing import Any

from django.core.management.base import BaseCommand

from training.services import files_unnamed


class Command(BaseCommand):
    help = (
        "List folders of checkpoints and snapshots that no row refers to and that are "
        "older than a day; --delete deletes them."
    )

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("--delete", action="store_true", help="delete the listed folders")

    def handle(self, *args: Any, delete: bool, **options: Any) -> None:
        found = files_unnamed()
        for path in found:
            self.stdout.write(f"{_size_bytes(path):>15,} bytes  {path}")
            if delete:
                shutil.rmtree(path, ignore_errors=True)
        verb = "deleted" if delete else "found"
        self.stdout.write(f"{len(found)} folders {verb}")


def _size_bytes(path: Path) -> int:
    return sum(item.stat().st_size for item in path.rglob("*") if item.is_file())
