"""Progress of runs, from the summaries of their futures: the curve of one, the last loss of many.

Only summaries are read, never a payload or a result, and never more than the newest
``MAX_REQUESTS`` of a run, so a page's cost does not grow with the run.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from django.db.models import OuterRef, QuerySet, Subquery
from django.db.models.fields.json import KT
from django.db.models.functions import Coalesce

from futures.models import Future
from futures.transitions import State
from training.kinds import Kind
from training.models import Run

MAX_REQUESTS = 5_000
MAX_POINTS = 300
"""Points of a curve; longer curves are averaged over neighbouring steps."""


@dataclass(frozen=True, kw_only=True)
class ProgressPoint:
    """One optimizer step, or the mean of several."""

    step: int
    """The last step it covers."""
    loss: float | None
    """Mean over the tokens of the passes that led to it, in nats."""
    grad_norm: float | None


@dataclass(frozen=True, kw_only=True)
class Progress:
    """The curve of one run, oldest first."""

    points: list[ProgressPoint]
    steps_per_point: int
    is_whole: bool
    """False if older requests were left out."""


def run_progress(run: Run) -> Progress:
    """The optimizer steps of a run, from its newest requests; one query."""
    newest = Future.objects.filter(
        lane_id=run.pk, state=State.READY, kind__in=[Kind.FORWARD_BACKWARD, Kind.OPTIM_STEP]
    ).order_by("-seq_id")
    rows = list(newest.values_list("kind", "summary")[: MAX_REQUESTS + 1])
    points = _points(rows[:MAX_REQUESTS][::-1], first_step=run.step + 1)
    per_point = max(1, math.ceil(len(points) / MAX_POINTS))
    return Progress(
        points=[
            _mean(points[begin : begin + per_point]) for begin in range(0, len(points), per_point)
        ],
        steps_per_point=per_point,
        is_whole=len(rows) <= MAX_REQUESTS,
    )


def with_progress(runs: QuerySet[Run]) -> QuerySet[Any]:
    """The runs with ``last_loss``, the loss of their newest finished pass, as text or None, and
    with ``newest_request_at``, when their newest request was submitted."""
    requests = Future.objects.filter(lane_id=OuterRef("pk")).order_by("-seq_id")
    passes = requests.filter(state=State.READY, kind=Kind.FORWARD_BACKWARD)
    return runs.annotate(
        last_loss=Subquery(passes.values(text=KT("summary__loss"))[:1]),
        newest_request_at=Coalesce(Subquery(requests.values("created_at")[:1]), "created_at"),
    )


def _points(rows: list[tuple[str, dict[str, Any]]], *, first_step: int) -> list[ProgressPoint]:
    """One point for each optim_step; later passes make a last point."""
    points: list[ProgressPoint] = []
    weighted, tokens = 0.0, 0.0
    for kind, summary in rows:
        if kind == Kind.FORWARD_BACKWARD:
            loss = _number(summary.get("loss"))
            if loss is not None:
                weight = _number(summary.get("tokens")) or 1.0
                weighted, tokens = weighted + loss * weight, tokens + weight
            continue
        points.append(
            ProgressPoint(
                step=int(_number(summary.get("step")) or 0),
                loss=weighted / tokens if tokens else None,
                grad_norm=_number(summary.get("grad_norm")),
            )
        )
        weighted, tokens = 0.0, 0.0
    if tokens:
        step = points[-1].step + 1 if points else first_step
        points.append(ProgressPoint(step=step, loss=weighted / tokens, grad_norm=None))
    return points


def _mean(points: list[ProgressPoint]) -> ProgressPoint:
    def mean(values: list[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return sum(known) / len(known) if known else None

    return ProgressPoint(
        step=points[-1].step,
        loss=mean([point.loss for point in points]),
        grad_norm=mean([point.grad_norm for point in points]),
    )


def _number(value: Any) -> float | None:
    """A finite number, or None for any other value."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number and math.isfinite(value) else None
