"""``manage.py doctor``: one line per part, with advice if something is wrong."""

from __future__ import annotations

from typing import Any

from django.core.management import CommandError
from django.core.management.base import BaseCommand

from tinkerapi.server.doctor import Verdict, examine


class Command(BaseCommand):
    help = "Check every part of this installation, whether the server runs or not."
    requires_system_checks = ()

    def handle(self, *args: Any, **options: Any) -> None:
        styles = {
            Verdict.OK: self.style.SUCCESS,
            Verdict.OFF: self.style.WARNING,
            Verdict.FAILED: self.style.ERROR,
        }
        failed = 0
        for finding in examine():
            failed += finding.verdict is Verdict.FAILED
            word = styles[finding.verdict](f"{finding.verdict.value:6}")
            self.stdout.write(f"{word}  {finding.part}: {finding.detail}")
            self.stdout.flush()
        if failed:
            raise CommandError(f"{failed} of the checks failed")
