"""Delete old payloads and results; the rows stay."""

from __future__ import annotations

from argparse import ArgumentParser
from datetime import timedelta
from typing import Any

from django.conf import settings
from django.core.management.base import BaseCommand, CommandError
from django.db.models import QuerySet
from django.utils import timezone
from django.utils.module_loading import import_string

from futures.models import Future
from futures.transitions import FINAL_STATES

_MAX_DAYS = 36500  # a century
_BATCH = 500  # rows in one transaction, so that no other statement waits for long


class Command(BaseCommand):
    help = (
        "Delete payload and result of futures that were finished long ago. Their rows stay, with "
        "state, times and summary. Data that a replay may need is kept."
    )

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument(
            "--days",
            type=int,
            default=settings.KEEP_RESULTS_DAYS,
            help="age in days since they were finished (default: %(default)s)",
        )
        parser.add_argument("--dry-run", action="store_true", help="only print how many")

    def handle(self, *args: Any, days: int, dry_run: bool, **options: Any) -> None:
        if not 0 <= days <= _MAX_DAYS:
            raise CommandError(f"--days: expected 0 to {_MAX_DAYS}, got {days}")
        prunable = _prunable(days)
        if dry_run:
            self.stdout.write(f"{prunable.count()} futures would be pruned.")
            return
        pruned = 0
        while ids := list(prunable.values_list("pk", flat=True)[:_BATCH]):
            pruned += Future.objects.filter(pk__in=ids).update(
                payload=None, result=None, pruned_at=timezone.now()
            )
        self.stdout.write(f"{pruned} futures pruned.")


def _prunable(days: int) -> QuerySet[Future]:
    """Old final futures with a body, except those that the project wants to keep.

    ``settings.FUTURES_PRUNABLE``, if set, names a function from such a queryset to the part
    of it that may be pruned, because this app does not know what a replay needs.
    """
    old: QuerySet[Future] = Future.objects.filter(
        state__in=FINAL_STATES,
        finished_at__lt=timezone.now() - timedelta(days=days),
        pruned_at__isnull=True,
    )
    path = getattr(settings, "FUTURES_PRUNABLE", "")
    return import_string(path)(old) if path else old
