"""Records the metrics that clients measure themselves, such as their reward."""

from __future__ import annotations

from collections.abc import Mapping

from django.db import transaction
from django.db.models import F, Q

from futures.database import execute
from futures.plain import to_jsonb
from training.errors import LimitExceeded, RunNotFound
from training.models import ClientMetrics, Run

Metrics = Mapping[str, float | None]
"""Name to number; None for one that is not finite."""

MAX_STEPS = 100_000
"""Steps with metrics in one run."""

# A repeated request changes nothing; a later one for the same step adds its names.
_RECORD = """
INSERT INTO training_clientmetrics AS c (run_id, step, metrics, created_at)
SELECT %(run_id)s, o.step, o.metrics::jsonb, statement_timestamp()
FROM unnest(%(steps)s::bigint[], %(metrics)s::text[]) AS o (step, metrics)
ORDER BY o.step
ON CONFLICT (run_id, step) DO UPDATE SET metrics = c.metrics || excluded.metrics
"""


@transaction.atomic
def client_metrics_record(*, owner_id: int, run_id: str, steps: Mapping[int, Metrics]) -> Run:
    """Record metrics of some steps; returns the run.

    A name that the step has already gets the new value. Own transaction.

    Args:
        run_id: The id of one of the owner's runs, or a name: of the live run, else the newest.

    Raises:
        RunNotFound: It does not exist, or belongs to another owner. (404)
        LimitExceeded: The run has metrics of too many steps. (400)
    """
    newest_first = (F("deleted_at").desc(nulls_first=True), "-created_at")
    runs = Run.objects.owned_by(owner_id)
    run = runs.filter(Q(id=run_id) | Q(name=run_id)).order_by(*newest_first).first()
    if run is None:
        raise RunNotFound(f"run_id: no run {run_id[:200]!r}")
    execute(
        _RECORD,
        {
            "run_id": run.pk,
            "steps": list(steps),
            "metrics": [to_jsonb(metrics) for metrics in steps.values()],
        },
    )
    # After the insertion, so that two requests at once cannot both pass a check before it.
    if ClientMetrics.objects.filter(run=run).order_by("step")[MAX_STEPS : MAX_STEPS + 1]:
        raise LimitExceeded(
            f"step: this server keeps metrics of {MAX_STEPS:,} steps of a run; send them less often"
        )
    return run
