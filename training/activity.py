"""A run's current activity, for people: training, sampling, idle and so on."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from django.db.models import Exists, OuterRef, Q, QuerySet
from django.utils import timezone

from futures.models import Future
from futures.transitions import State
from training.client_silence import SHOWN_AS_GONE
from training.kinds import Kind
from training.models import Run, SamplingSession

RECENT = timedelta(seconds=30)
"""A training loop may pause this long between requests without being idle."""


def with_activity(runs: QuerySet[Any]) -> QuerySet[Any]:
    """The runs with ``is_training`` and ``is_sampling``: whether they have such open requests.

    ``activity`` reads these and ``newest_request_at`` of ``training.progress.with_progress``.
    """
    is_open = Q(state__in=(State.PENDING, State.RUNNING))
    own = Future.objects.filter(is_open, lane_id=OuterRef("pk"))
    sessions = SamplingSession.objects.filter(checkpoint__run=OuterRef(OuterRef("pk")))
    of_sessions = Future.objects.filter(is_open, lane_id__in=sessions.values("pk"))
    annotated: QuerySet[Any] = runs.annotate(
        is_training=Exists(own.exclude(kind=Kind.SAMPLE)),
        is_sampling=Exists(own.filter(kind=Kind.SAMPLE)) | Exists(of_sessions),
    )
    return annotated


def activity(run: Any) -> str:
    """One of ``training``, ``sampling``, ``idle``, ``client gone``, ``finished``, ``creating``,
    ``failed``, ``deleted``.

    Args:
        run: A run read by ``with_progress`` and ``with_activity``, with its session.
    """
    if run.shown_state != Run.RunState.READY:
        return str(run.shown_state)
    if run.is_training:
        return "training"
    if run.is_sampling:
        return "sampling"
    now = timezone.now()
    if run.session is not None and now - run.session.heartbeat_at > SHOWN_AS_GONE:
        return "client gone"
    return "training" if run.step and now - run.newest_request_at < RECENT else "idle"
