"""Records what was sampled from runs and what text was trained on, for people to read, and deletes
old records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from django.conf import settings
from django.utils import timezone

from futures.database import execute
from futures.payload import encode
from training.models import RenderedData, Rollout
from training.types import Datum

_DELETE_AT_ONCE = 5_000
_RECENT = 50_000
"""Newest rows in which runs with too many rows are looked for."""

# Sums, so that each request adds its own.
_COUNT = """
INSERT INTO training_sampledstep AS s
    (run_id, step, sequences, tokens, stopped_by_length, logprob_sum)
VALUES (%(run_id)s, %(step)s, %(sequences)s, %(tokens)s, %(stopped_by_length)s, %(logprob_sum)s)
ON CONFLICT (run_id, step) DO UPDATE SET
    sequences = s.sequences + excluded.sequences, tokens = s.tokens + excluded.tokens,
    stopped_by_length = s.stopped_by_length + excluded.stopped_by_length,
    logprob_sum = s.logprob_sum + excluded.logprob_sum
"""

# Only sequences without one: the same tokens may be sampled and trained again at a later step.
_JOIN = """
UPDATE training_rollout AS r SET advantage = o.advantage, trained_by = %(request_id)s
FROM unnest(%(digests)b::bytea[], %(advantages)s::float8[]) AS o (digest, advantage)
WHERE r.run_id = %(run_id)s AND r.sequence_digest = o.digest AND r.trained_by = ''
"""

_TRIM = """
WITH bounds AS (
    SELECT run_id, (
        SELECT id FROM training_rollout AS r WHERE r.run_id = runs.run_id
        ORDER BY id DESC OFFSET %(kept)s LIMIT 1
    ) AS last
    FROM (
        SELECT DISTINCT run_id FROM training_rollout
        WHERE id > (SELECT coalesce(max(id), 0) FROM training_rollout) - %(recent)s
    ) AS runs
), old AS (
    SELECT r.id FROM training_rollout AS r JOIN bounds USING (run_id)
    WHERE r.id <= bounds.last LIMIT %(limit)s
)
DELETE FROM training_rollout WHERE id IN (SELECT id FROM old)
"""


# One statement for all requests of a commit.
_RENDERED = """
INSERT INTO training_rendereddata (run_id, request_id, data, created_at)
SELECT run_id, request_id, data, statement_timestamp()
FROM unnest(%(runs)s::text[], %(requests)s::text[], %(data)b::bytea[])
    AS o (run_id, request_id, data)
ON CONFLICT DO NOTHING
"""


@dataclass(frozen=True, kw_only=True)
class RenderedRequest:
    """The tokens that were made of one request's text."""

    run_id: str
    request_id: str
    data: Sequence[Datum]


def rollouts_record(rows: Sequence[Rollout], sums: Mapping[str, Any]) -> None:
    """Record one request's sequences, inside the transaction that commits its result.

    Args:
        rows: The sequences to keep as text; may be empty.
        sums: A row of ``SampledStep``.
    """
    execute(_COUNT, sums)
    if rows:
        Rollout.objects.bulk_create(rows, ignore_conflicts=True)


def rollouts_join(
    *, run_id: str, request_id: str, advantages: Sequence[tuple[bytes, float]]
) -> None:
    """Note the advantages that a training request gave to sampled sequences, inside the
    transaction that commits its result.

    Args:
        advantages: Digest of a prompt and its completion, and the completion's advantage.
    """
    if not advantages:
        return
    execute(
        _JOIN,
        {
            "run_id": run_id,
            "request_id": request_id,
            "digests": [digest for digest, _ in advantages],
            "advantages": [advantage for _, advantage in advantages],
        },
    )


def rendered_record(requests: Sequence[RenderedRequest]) -> None:
    """Record the tokens of requests that were sent as text, inside the transaction that commits
    their results."""
    if not requests:
        return
    execute(
        _RENDERED,
        {
            "runs": [request.run_id for request in requests],
            "requests": [request.request_id for request in requests],
            "data": [encode(_content(request.data)) for request in requests],
        },
    )


def _content(data: Sequence[Datum]) -> list[dict[str, Any]]:
    return [
        {"model_input": datum.model_input, "loss_fn_inputs": dict(datum.loss_fn_inputs)}
        for datum in data
    ]


def rollouts_forget() -> None:
    """Delete some rollouts and rendered tokens that are too old, and some rollouts of runs that
    have too many. The worker calls it often."""
    limit = timezone.now() - timedelta(days=settings.KEEP_RESULTS_DAYS)
    rendered = RenderedData.objects.filter(created_at__lt=limit).values("pk")[:_DELETE_AT_ONCE]
    RenderedData.objects.filter(pk__in=rendered).delete()
    oldest = Rollout.objects.order_by("pk").values_list("pk", "created_at")[:_DELETE_AT_ONCE]
    Rollout.objects.filter(pk__in=[pk for pk, created in oldest if created < limit]).delete()
    kept = {"kept": settings.ROLLOUTS_PER_RUN, "recent": _RECENT, "limit": _DELETE_AT_ONCE}
    execute(_TRIM, kept)
