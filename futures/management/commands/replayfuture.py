"""Submit requests again, and compare the new results with the first ones."""

from __future__ import annotations

from argparse import ArgumentParser
from typing import Any

from asgiref.sync import async_to_sync
from django.conf import settings
from django.core.management.base import BaseCommand, CommandError
from django.utils.module_loading import import_string

from futures.errors import FutureError
from futures.models import Future
from futures.payload import digest
from futures.resubmitting import future_resubmit
from futures.transitions import State
from futures.waiters import future_wait, waiters


class Command(BaseCommand):
    help = (
        "Submit the requests of these futures again, each as a new future at the end of its lane."
    )

    def add_arguments(self, parser: ArgumentParser) -> None:
        parser.add_argument("request_ids", nargs="+", metavar="ID", help="request id of a future")
        parser.add_argument(
            "--wait",
            action="store_true",
            help="wait for the new results and report whether they equal the first ones",
        )
        parser.add_argument(
            "--timeout",
            type=float,
            default=600,
            metavar="SECONDS",
            help="longest wait for one result (default: %(default)s)",
        )

    def handle(
        self, *args: Any, request_ids: list[str], wait: bool, timeout: float, **options: Any
    ) -> None:
        failures = 0
        replays = []
        for request_id in request_ids:
            try:
                replay = future_resubmit(request_id=request_id)
            except FutureError as error:
                failures += 1
                self.stderr.write(f"{request_id}: {error}")
            else:
                replays.append(replay)
                self.stdout.write(f"{request_id} -> {replay.pk}")
        if wait:
            failures += sum(not self._compare(replay, timeout) for replay in replays)
        if failures:
            raise CommandError(f"{failures} of {len(request_ids)} failed.")

    def _compare(self, replay: Future, timeout_seconds: float) -> bool:
        """Wait for a replay and report it; False unless it is ready.

        A different result is no failure: the lane may have changed since the first one.
        """
        ended = async_to_sync(_wait)(replay, timeout_seconds)
        if ended is None:
            self.stderr.write(f"{replay.pk}: not finished after {timeout_seconds:g} seconds.")
            return False
        if ended.state != State.READY:
            self.stderr.write(f"{replay.pk}: {ended.state}. {ended.error}".rstrip())
            return False
        first = Future.objects.values_list("result", flat=True).get(pk=replay.replay_of_id)
        if first is None:
            self.stdout.write(f"{replay.pk}: ready; the first one has no result to compare with.")
            return True
        # Values, not bytes: another version of zstd or of this server stores other bytes.
        value = import_string(settings.FUTURES_RESULT_VALUE)
        same = digest("", value(replay.kind, bytes(first))) == digest(
            "", value(replay.kind, bytes(ended.result or b""))
        )
        self.stdout.write(f"{replay.pk}: {'same' if same else 'different'} result.")
        return True


async def _wait(replay: Future, timeout_seconds: float) -> Future | None:
    try:
        return await future_wait(
            replay.pk, owner_id=replay.owner_id, timeout_seconds=timeout_seconds
        )
    finally:
        await waiters().close()
