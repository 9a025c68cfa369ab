"""Reads of what was sampled from a run: pages, groups, single sequences."""

from __future__ import annotations

from dataclasses import dataclass

from django.db.models import Q, QuerySet

from futures.models import Future
from training.models import Rollout, Run

MAX_GROUP = 512
MAX_WORDS = 10


@dataclass(frozen=True, kw_only=True)
class RolloutPage:
    """Some rollouts, the newest first."""

    rows: list[Rollout]
    before: int | None
    """Where the next page begins; None on the last one."""


def rollout_page(
    run: Run, *, words: str = "", step: int | None = None, before: int | None = None, limit: int
) -> RolloutPage:
    """A page of a run's rollouts; one query.

    Args:
        words: Each of them must be in the prompt or the completion, ignoring case.
        step: Only those of this step's weights.
        before: The ``before`` of the previous page.
    """
    rows: QuerySet[Rollout] = Rollout.objects.filter(run=run)
    for word in words.split()[:MAX_WORDS]:
        rows = rows.filter(Q(prompt__icontains=word) | Q(completion__icontains=word))
    if step is not None:
        rows = rows.filter(step=step)
    if before is not None:
        rows = rows.filter(pk__lt=before)
    found = list(rows.order_by("-pk")[: limit + 1])
    return RolloutPage(
        rows=found[:limit], before=found[limit - 1].pk if len(found) > limit else None
    )


def rollout_group(run: Run, *, step: int, prompt_digest: bytes) -> list[Rollout]:
    """The sequences of one prompt from one step's weights, the best first; one query."""
    rows = Rollout.objects.filter(run=run, step=step, prompt_digest=prompt_digest)
    return sorted(
        rows.order_by("pk")[:MAX_GROUP],
        key=lambda row: (row.advantage is None, -(row.advantage or 0.0)),
    )


def rollout_find(run: Run, *, request_id: str, number: int) -> tuple[Rollout, Future] | None:
    """One sequence of a run and its request, with the bodies; None if it is not the run's."""
    row = Rollout.objects.filter(run=run, request_id=request_id, number=number).first()
    future = Future.objects.filter(pk=request_id, owner_id=run.owner_id).first() if row else None
    return None if row is None or future is None else (row, future)
