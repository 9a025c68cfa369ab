"""What was used by whom: tokens and worker time by day, user and run.

Rows are added up in the commits that complete requests (``usage_record``); every reader sums a few
of them. Hours of single requests, as the SDK asks for them, are in ``training.billing``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from typing import Any

from django.db.models import Q, Sum

from futures.database import execute
from training.models import DailyUsage, Run

# The rows were changed by the caller's transaction. Sorted, so that two workers that add to the
# same rows take them in one order.
_RECORD = """
WITH done AS (
    SELECT f.owner_id, f.kind, f.state,
        CASE WHEN s.id IS NULL THEN coalesce(f.lane_id, '') ELSE coalesce(c.run_id, '') END
            AS run_id,
        coalesce((f.summary->>'tokens')::bigint, 0) AS tokens,
        coalesce((f.summary->>'prompt_tokens')::bigint, 0) AS prompt_tokens,
        %(seconds)s::float8 * greatest(f.cost, 1) / sum(greatest(f.cost, 1)) OVER () AS seconds
    FROM futures_future AS f
    LEFT JOIN training_samplingsession AS s ON s.id = f.lane_id
    LEFT JOIN training_checkpoint AS c ON c.id = s.checkpoint_id
    WHERE f.id = ANY (%(ids)s::text[])
), parts AS (
    SELECT owner_id, run_id, 'training' AS work, 1 AS requests,
        CASE WHEN state = 'failed' THEN 0 ELSE tokens END AS tokens, seconds
    FROM done WHERE kind IN ('forward', 'forward_backward')
    UNION ALL
    SELECT owner_id, run_id, 'sampling', 1, CASE WHEN state = 'failed' THEN 0 ELSE tokens END,
        seconds * tokens / greatest(prompt_tokens + tokens, 1)
    FROM done WHERE kind = 'sample'
    UNION ALL
    SELECT owner_id, run_id, 'prefill', 0,
        CASE WHEN state = 'failed' THEN 0 ELSE prompt_tokens END,
        seconds * (1 - tokens::float8 / greatest(prompt_tokens + tokens, 1))
    FROM done WHERE kind = 'sample'
    UNION ALL
    SELECT owner_id, run_id, 'other', 1, 0, seconds
    FROM done WHERE kind NOT IN ('forward', 'forward_backward', 'sample')
)
INSERT INTO training_dailyusage AS u (day, owner_id, run_id, work, requests, tokens, seconds)
SELECT (statement_timestamp() AT TIME ZONE 'UTC')::date, owner_id, run_id, work,
    sum(requests), sum(tokens), sum(seconds)
FROM parts GROUP BY owner_id, run_id, work ORDER BY owner_id, run_id, work
ON CONFLICT (owner_id, day, run_id, work) DO UPDATE SET
    requests = u.requests + excluded.requests, tokens = u.tokens + excluded.tokens,
    seconds = u.seconds + excluded.seconds
"""


def usage_record(request_ids: Sequence[str], *, seconds: float) -> None:
    """Add completed requests to their owners' usage, in the transaction that completes them.

    Args:
        seconds: Of the worker, for all of them together.
    """
    if request_ids:
        execute(_RECORD, {"ids": list(request_ids), "seconds": seconds})


def today() -> date:
    """The day of usage that it is now."""
    return datetime.now(UTC).date()


def tokens_used(owner_id: int, day: date) -> int:
    """The tokens that an owner's requests used on a day."""
    rows = DailyUsage.objects.filter(owner_id=owner_id, day=day)
    return rows.aggregate(tokens=Sum("tokens"))["tokens"] or 0


@dataclass(frozen=True, kw_only=True)
class Used:
    """Sums over some rows of usage."""

    requests: int
    training: int
    """Tokens, as the other two."""
    prefill: int
    sampling: int
    seconds: float

    @property
    def tokens(self) -> int:
        return self.training + self.prefill + self.sampling


_SUMS: dict[str, Any] = {
    "requests_sum": Sum("requests", default=0),
    "seconds_sum": Sum("seconds", default=0.0),
    **{
        str(work): Sum("tokens", filter=Q(work=work), default=0)
        for work in (
            DailyUsage.Work.TRAINING,
            DailyUsage.Work.PREFILL,
            DailyUsage.Work.SAMPLING,
        )
    },
}


def _used(row: dict[str, Any]) -> Used:
    return Used(
        requests=row["requests_sum"],
        seconds=row["seconds_sum"],
        training=row["training"],
        prefill=row["prefill"],
        sampling=row["sampling"],
    )


def used_together(parts: Iterable[Used]) -> Used:
    """The sum of some usage, without another look at the rows."""
    items = list(parts)
    return Used(
        requests=sum(item.requests for item in items),
        training=sum(item.training for item in items),
        prefill=sum(item.prefill for item in items),
        sampling=sum(item.sampling for item in items),
        seconds=sum(item.seconds for item in items),
    )


class Period:
    """The usage of the last days, of one owner or of all."""

    def __init__(self, owner_id: int | None, *, days: int) -> None:
        """``days``: today and the days before it."""
        self.first = today() - timedelta(days=days - 1)
        rows = DailyUsage.objects.filter(day__gte=self.first)
        self._rows = rows if owner_id is None else rows.filter(owner_id=owner_id)
        self._owner_id = owner_id

    def by_day(self) -> dict[date, Used]:
        """Days without any usage are left out."""
        rows = self._summed("day").order_by("day")
        return {row["day"]: _used(row) for row in rows}

    def by_owner(self, *, limit: int) -> list[tuple[int, str, Used]]:
        """Id, name and usage, those that used most time first."""
        rows = self._summed("owner_id", "owner__username")
        newest = rows.order_by("-seconds_sum", "owner_id")[:limit]
        return [(row["owner_id"], row["owner__username"], _used(row)) for row in newest]

    def by_run(self, *, limit: int) -> list[tuple[Run | None, str, Used]]:
        """Run, owner's name and usage, those that used most time first; None for no run."""
        rows = self._summed("run_id", "owner__username")
        most = list(rows.order_by("-seconds_sum", "run_id")[:limit])
        runs = Run.objects.select_related("owner", "session").in_bulk(
            [row["run_id"] for row in most]
        )
        return [(runs.get(row["run_id"]), row["owner__username"], _used(row)) for row in most]

    def _summed(self, *columns: str) -> Any:
        """The sums for each value of these columns; a queryset of dictionaries."""
        rows: Any = self._rows.values(*columns)
        return rows.annotate(**_SUMS)

    def lines(self) -> Iterator[tuple[Any, ...]]:
        """Day, owner's name, run id, work, requests, tokens and seconds, in this order."""
        columns = ("day", "owner__username", "run_id", "work", "requests", "tokens", "seconds")
        yield from self._rows.order_by(*columns[:4]).values_list(*columns).iterator()
