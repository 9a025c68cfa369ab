"""When the requests of a session or a run waited and ran, read page by page."""

from __future__ import annotations

from futures.models import Future
from training.models import Run, SamplingSession

PAGE = 500
"""Requests that are read at once: some milliseconds of a thread that others wait for too."""


def session_lanes(session_id: str) -> list[str]:
    """The lanes of a session: those of models, then those of sampling sessions, each in the order
    of creation."""
    runs = Run.objects.filter(session_id=session_id).order_by("model_seq_id")
    samplers = SamplingSession.objects.filter(session_id=session_id).order_by("seq_id")
    return [*runs.values_list("id", flat=True), *samplers.values_list("id", flat=True)]


def run_lanes(run_id: str) -> list[str]:
    """The lane of a run, then those of sampling sessions that sample its checkpoints."""
    samplers = SamplingSession.objects.filter(checkpoint__run_id=run_id).order_by("seq_id", "id")
    return [run_id, *samplers.values_list("id", flat=True)]


def timeline_page(lane_id: str, *, after: int = -1) -> list[Future]:
    """The next finished requests of a lane that ran, without their bodies, in the order of their
    seq ids.

    Args:
        after: The last seq id of the page before.
    """
    finished = Future.objects.without_bodies().filter(
        lane_id=lane_id, seq_id__gt=after, started_at__isnull=False, finished_at__isnull=False
    )
    return list(finished.order_by("seq_id")[:PAGE])
