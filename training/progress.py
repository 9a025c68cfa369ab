"""Progress of runs, from the summaries of their futures: the last loss of many, the pace of one.

Only summaries are read, never a payload or a result.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any

from django.db.models import OuterRef, QuerySet, Subquery
from django.db.models.fields.json import KT
from django.db.models.functions import Coalesce

from futures.models import Future
from futures.transitions import State
from training.kinds import Kind
from training.models import ClientMetrics, Run


def with_progress(runs: QuerySet[Run]) -> QuerySet[Any]:
    """The runs with the loss of their newest finished pass (``last_loss``, and ``last_loss_fn`` if
    it is not cross_entropy), the ``last_reward`` that their client recorded, and
    ``newest_request_at``, when their newest request was submitted. All but the time are text or
    None."""
    requests = Future.objects.filter(lane_id=OuterRef("pk")).order_by("-seq_id")
    passes = requests.filter(state=State.READY, kind=Kind.FORWARD_BACKWARD)
    metrics = ClientMetrics.objects.filter(run_id=OuterRef("pk")).order_by("-step")
    return runs.annotate(
        last_loss=Subquery(passes.values(text=KT("summary__loss"))[:1]),
        last_loss_fn=Subquery(passes.values(text=KT("summary__loss_fn"))[:1]),
        last_reward=Subquery(metrics.values(text=KT("metrics__reward"))[:1]),
        newest_request_at=Coalesce(Subquery(requests.values("created_at")[:1]), "created_at"),
    )


def steps_newest(run: Run, *, limit: int) -> list[datetime]:
    """When a run's last optimizer steps finished, the last one first; one query."""
    steps = Future.objects.filter(lane_id=run.pk, state=State.READY, kind=Kind.OPTIM_STEP)
    finished = steps.order_by("-seq_id").values_list("finished_at", flat=True)[:limit]
    return [moment for moment in finished if moment is not None]
