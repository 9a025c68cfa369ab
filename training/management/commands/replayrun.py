"""Rebuild a run from its log into a new run, and report whether both are equal."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any, cast

from django.core.management.base import BaseCommand, CommandError, CommandParser
from tqdm import tqdm

from futures.models import Future
from futures.transitions import State
from training.errors import TrainingError
from training.kinds import CompareRunsResult, stored_result
from training.selectors import run_find, run_log
from training.services import run_compare_submit, run_replay_create, run_replay_submit

POLL_SECONDS = 0.2


class Command(BaseCommand):
    help = (
        "Submit every request of a run's log again, in order, into a new run; then "
        "compare losses, gradient norms and weights. The server must be running. Exits with 1 "
        "if anything differs by more than the tolerance."
    )

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("run", help="id of the run, or its model_id")
        parser.add_argument("--owner", help="the owner's name, if several users have this model_id")
        parser.add_argument("--name", help="model_id of the new run; default: <model_id>-replay-N")
        parser.add_argument(
            "--tolerance",
            type=float,
            default=1e-3,
            help="largest difference that counts as a match, absolute (default %(default)s); "
            "0 requires equal bits",
        )
        parser.add_argument(
            "--timeout",
            type=float,
            default=3600.0,
            help="seconds to wait for the worker (default %(default)s)",
        )

    def handle(self, *args: Any, **options: Any) -> None:
        self._deadline = time.monotonic() + options["timeout"]
        try:
            run = run_find(options["run"], owner=options["owner"])
            log = run_log(run)
            copy = run_replay_create(run=run, name=options["name"])
        except TrainingError as error:
            raise CommandError(str(error)) from error
        self.stdout.write(f"{run.name}: {len(log)} requests, into {copy.name} ({copy.id})")
        replayed = [run_replay_submit(run=copy, original=original) for original in log]
        largest = 0.0
        finished = zip(log, self._wait(replayed), strict=True)
        for original, replay in tqdm(finished, total=len(log), unit="request", disable=None):
            if (replay.state, replay.error_code) != (original.state, original.error_code):
                raise CommandError(f"request {original.seq_id} ({original.kind}): {replay.error}")
            for figure in ("loss", "grad_norm"):
                if figure in original.summary:
                    difference = abs(original.summary[figure] - replay.summary[figure])
                    largest = max(largest, difference)
        self.stdout.write(f"losses and gradient norms: largest difference {largest:.3g}")
        [comparison] = self._wait([run_compare_submit(run=copy, other=run)])
        if comparison.state != State.READY:
            raise CommandError(f"weights: {comparison.error}")
        stored = stored_result(comparison.kind, bytes(comparison.result or b""))
        result = cast(CompareRunsResult, stored)
        for name, difference in result.largest_difference.items():
            self.stdout.write(f"{name}: largest difference {difference:.3g}")
            largest = max(largest, difference)
        if result.is_identical:
            self.stdout.write("identical: every weight and optimizer moment has the same bits")
        if result.steps[0] != result.steps[1] or largest > options["tolerance"]:
            raise CommandError("the replayed run differs from the original")
        self.stdout.write(self.style.SUCCESS("match"))

    def _wait(self, futures: list[Future]) -> Iterator[Future]:
        for future in futures:
            while not future.is_final:
                if time.monotonic() > self._deadline:
                    raise CommandError(f"{future.id} is still {future.state}; is a worker running?")
                time.sleep(POLL_SECONDS)
                future.refresh_from_db(fields=["state", "error", "error_code", "summary", "result"])
            yield future
