"""Watch runs in a terminal: what is running, or one run's steps until it ends."""

from __future__ import annotations

import shutil
import time
from argparse import ArgumentTypeError
from collections.abc import Mapping
from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser

from tinkerapi.console.terminal import overview_lines, run_lines, step_line
from training.activity import activity, with_activity
from training.curves import Curves, client_curves, run_curves
from training.errors import RunNotFound
from training.models import Run
from training.overview import runs_newest
from training.progress import with_progress
from training.selectors import run_find

LISTED_RUNS = 20
OVER = ("finished", "failed", "deleted")


def seconds(text: str) -> float:
    """A positive number of seconds, at most an hour."""
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0.1 <= value <= 3600:
        raise ArgumentTypeError(f"expected seconds from 0.1 to 3600; got {text!r}")
    return value


class Command(BaseCommand):
    help = (
        "Show the newest runs, or with RUN one run's curves, until it ends or Ctrl+C. A terminal "
        "is drawn again in place; a file or a pipe gets one line for each step."
    )

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("run", nargs="?", help="id of the run, or its model_id")
        parser.add_argument("--owner", help="the owner's name, if several users have this model_id")
        parser.add_argument(
            "--every", type=seconds, default=2.0, help="seconds between two looks (%(default)s)"
        )
        parser.add_argument("--once", action="store_true", help="look once, and end")

    def handle(self, *args: Any, **options: Any) -> None:
        self._drawn = 0
        run = None
        if options["run"] is not None:
            try:
                run = run_find(options["run"], owner=options["owner"])
            except RunNotFound as error:
                raise CommandError(str(error)) from error
        look = self._look_at(run) if run is not None else self._overview
        try:
            while look() and not options["once"]:
                time.sleep(options["every"])
        except KeyboardInterrupt:
            return

    def _overview(self) -> bool:
        runs = runs_newest(None, limit=LISTED_RUNS)
        self._draw(overview_lines(runs))
        return True

    def _look_at(self, run: Run) -> Any:
        """A function that shows the run as it is now and returns whether it may go on."""
        shown_until = 0

        def look() -> bool:
            nonlocal shown_until
            rows = with_activity(with_progress(Run.objects.filter(pk=run.pk)))
            now = rows.select_related("session", "owner").first()
            if now is None:
                raise CommandError(f"{run.pk} is gone")
            state = activity(now)
            metrics = client_curves(now)
            if self.stdout.isatty():
                self._draw(run_lines(now, state, run_curves(now), metrics))
            else:
                curves = run_curves(now, after=shown_until)
                self._append(curves, metrics)
                shown_until = curves.seq_ids[-1] if curves.seq_ids else shown_until
            return state not in OVER

        return look

    def _append(self, curves: Curves, metrics: Mapping[str, Any]) -> None:
        for place in range(len(curves.steps)):
            self.stdout.write(step_line(curves, place, metrics))
        self.stdout.flush()

    def _draw(self, lines: list[str]) -> None:
        """Replace what was drawn before; in a file, append."""
        if self.stdout.isatty():
            width, height = shutil.get_terminal_size()
            if self._drawn:
                self.stdout.write(f"\x1b[{self._drawn}F\x1b[J", ending="")
            lines = [line[: width - 1] for line in lines[: height - 1]]
            self._drawn = len(lines)
        self.stdout.write("\n".join(lines))
        self.stdout.flush()
