"""How a worker gets futures: a claim takes those that may run now.

It is one statement over all lanes of the queue. It does not depend on kinds: the worker
keeps the claimed futures in order and enforces the barriers itself.

Which futures may run
    Futures without a lane, those of an unordered lane, and in an ordered lane the range
    that begins at ``next_seq_id`` and in which every seq id has a row. A missing seq id ends
    the range, because requests may arrive out of order; final rows in it are skipped.
On which worker
    Those of an ordered lane on the worker to which the lane is leased; the claim leases a free lane
    (``futures.leases``). All others on any. The live workers of a queue share what is free: a
    worker that leases fewer lanes than its share takes free ones up to that share, and of the
    futures without an ordered lane each takes its part. What has waited for PATIENCE_SECONDS may be
    taken by any worker that claims, so no future waits for a worker that is busy or gone while
    another is idle. A worker that is alone takes everything.
In which order
    Owners take turns, and among those whose turn it is, the owner whom this worker served least
    recently comes first: a claim that is too small for everybody continues where the last one
    ended. An owner's futures are ordered by the time at which they could first have run:
    when they and all before them in their lane had arrived. So a cut through this order never
    separates a future from an earlier one of its lane.
How many
    The longest prefix of that order within the budgets of futures and cost, and at least one.
Suspects
    A future whose worker crashed while it ran may have caused the crash. A suspect is claimed
    alone, and only by a worker that holds nothing else. After it has run alone for some seconds (a
    long sample, for example) it is trusted again: others may join it. If that was a mistake, it
    runs alone for longer after the next crash, and after the third crash it runs alone to its end.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import orjson

from futures.database import alias, execute
from futures.errors import Fenced
from futures.models import Future, Worker

MIN_WINDOW, MAX_WINDOW = 32, 256
"""Rows of one lane (or, without lane, of one owner) that a claim reads: as many as it may
take, within these bounds. So its work does not grow with the length of a lane."""

SUSPECT_INTERRUPTIONS = 3
"""After this many workers were ended from outside while it ran, a future is a suspect."""

SUSPECT_SECONDS = 5
"""How long a suspect runs alone the first time; the second time
it is twice as long."""

PATIENCE_SECONDS = 0.3
"""How long a worker leaves futures to others whose share is not complete. An idle worker answers
within milliseconds."""

MAX_SERVED = 1000
"""Owners whose last service a worker remembers; a forgotten owner comes first."""

# Numbered as in the statement:
# 0. The epoch, locked, so that a claim and the end of its epoch are serialized: a claim that
#    waited for that end finds no epoch and takes nothing. The futures that the epoch
#    holds. The doorbells are deleted; one that this statement does not see stays. The
#    commit does not wait for the disk.
# 1. The lanes and the owners that have pending futures, found by skipping from one to the next
#    in the partial indexes, so that ten thousand rows of one lane cost one step. Or only the lanes
#    that this worker leases, if the caller knows that nothing else is new.
# 2. The rows of each lane from its next seq id on, and of each owner without a lane.
# 3. The futures that may run, and since when; of those that any worker may run, this one's share.
# 4. Their order, and the prefix within the budgets.
# 5. A suspect, alone, or the future that must run before it in its lane.
# 6. The free lanes that no other claim is taking, and the futures without an ordered lane that none
#    is taking; whoever has locked one first gets it. The lanes are leased and moved past all rows
#    that are claimed or final; one that has changed since this statement began stays as it is.
# 7. The compare-and-set.
# 8. Whether any future is left that this worker may run, now or after the held ones, and whether
#    some are left to others.
# ``= ANY (ARRAY(...))`` makes Postgres look up rows by key, whatever row count it estimates.
_CLAIM = """
WITH RECURSIVE epoch AS MATERIALIZED (                                                    -- 0
    SELECT id, set_config('synchronous_commit', 'off', true) FROM futures_worker
    WHERE id = %(worker_id)s AND state IN ('starting', 'live')
    FOR NO KEY UPDATE
), held AS MATERIALIZED (
    SELECT coalesce(bool_or(NOT is_trusted_again), false) AS holds,
        coalesce(bool_or({is_suspect} AND NOT is_trusted_again), false) AS suspect
    FROM (
        SELECT *, {is_suspect} AND suspicions <= 2 AND started_at < statement_timestamp()
            - make_interval(secs => suspicions * %(suspect_seconds)s) AS is_trusted_again
        FROM futures_future CROSS JOIN LATERAL (
            SELECT greatest(attempts, interruptions - %(interruptions)s + 1) AS suspicions
        ) AS counted
        WHERE worker_id = %(worker_id)s AND state = 'running'
    ) AS running
), may_claim AS MATERIALIZED (
    SELECT FROM epoch, held WHERE NOT held.suspect
), rung AS (
    DELETE FROM django_q_ormq WHERE id = ANY (ARRAY(
        SELECT id FROM django_q_ormq WHERE key = %(queue)s AND EXISTS (SELECT FROM epoch)
        FOR UPDATE SKIP LOCKED
    ))
), any_lane_with_work (lane_id) AS (                                                      -- 1
    (SELECT lane_id FROM futures_future
     WHERE queue = %(queue)s AND state = 'pending' AND lane_id IS NOT NULL
        AND NOT %(only_leased)s AND EXISTS (SELECT FROM may_claim)
     ORDER BY lane_id LIMIT 1)
    UNION ALL
    SELECT (
        SELECT f.lane_id FROM futures_future AS f
        WHERE f.queue = %(queue)s AND f.state = 'pending' AND f.lane_id > before.lane_id
        ORDER BY f.lane_id LIMIT 1
    ) FROM any_lane_with_work AS before WHERE before.lane_id IS NOT NULL
), lane_with_work AS MATERIALIZED (
    SELECT lane_id FROM any_lane_with_work
    UNION ALL
    SELECT l.id FROM futures_lane AS l
    WHERE %(only_leased)s AND l.worker_id = %(worker_id)s AND EXISTS (SELECT FROM may_claim)
        AND EXISTS (
            SELECT FROM futures_future
            WHERE queue = %(queue)s AND state = 'pending' AND lane_id = l.id
        )
), owner_without_lane (owner_id) AS (
    (SELECT owner_id FROM futures_future
     WHERE queue = %(queue)s AND state = 'pending' AND lane_id IS NULL
        AND NOT %(only_leased)s AND EXISTS (SELECT FROM may_claim)
     ORDER BY owner_id LIMIT 1)
    UNION ALL
    SELECT (
        SELECT f.owner_id FROM futures_future AS f
        WHERE f.queue = %(queue)s AND f.state = 'pending' AND f.lane_id IS NULL
            AND f.owner_id > before.owner_id
        ORDER BY f.owner_id LIMIT 1
    ) FROM owner_without_lane AS before WHERE before.owner_id IS NOT NULL
), stretch AS MATERIALIZED (                                                              -- 2
    SELECT * FROM (
        SELECT l.id AS lane_id, l.next_seq_id, l.worker_id IS NULL AS is_free, f.id, l.owner_id,
            f.seq_id, f.state, f.cost, f.is_suspect,
            max(f.created_at) OVER (PARTITION BY l.id ORDER BY f.seq_id) AS runnable_at,
            row_number() OVER (PARTITION BY l.id ORDER BY f.seq_id) - 1 AS position
        FROM lane_with_work
        JOIN futures_lane AS l ON l.id = lane_with_work.lane_id AND l.ordered
            AND (l.worker_id IS NULL OR l.worker_id = %(worker_id)s)
            AND l.owner_id <> ALL (%(passed_over)s::bigint[])
        CROSS JOIN LATERAL (
            SELECT id, seq_id, state, cost, {is_suspect} AS is_suspect, created_at
            FROM futures_future
            WHERE lane_id = l.id AND seq_id >= l.next_seq_id
            ORDER BY seq_id LIMIT %(window)s
        ) AS f
    ) AS looked_at
    WHERE seq_id = next_seq_id + position
), anywhere AS MATERIALIZED (                                                             -- 3
    SELECT f.id, l.id AS lane_id, l.owner_id, f.seq_id, f.cost, f.is_suspect,
        f.created_at AS runnable_at
    FROM lane_with_work
    JOIN futures_lane AS l ON l.id = lane_with_work.lane_id AND NOT l.ordered
        AND l.owner_id <> ALL (%(passed_over)s::bigint[])
    CROSS JOIN LATERAL (
        SELECT id, seq_id, cost, {is_suspect} AS is_suspect, created_at FROM futures_future
        WHERE queue = %(queue)s AND state = 'pending' AND lane_id = l.id
        ORDER BY seq_id LIMIT %(window)s
    ) AS f
    UNION ALL
    SELECT f.id, NULL, f.owner_id, NULL, f.cost, f.is_suspect, f.created_at
    FROM owner_without_lane
    CROSS JOIN LATERAL (
        SELECT id, owner_id, cost, {is_suspect} AS is_suspect, created_at FROM futures_future
        WHERE queue = %(queue)s AND state = 'pending' AND lane_id IS NULL
            AND owner_id = owner_without_lane.owner_id
        ORDER BY created_at LIMIT %(window)s
    ) AS f
    WHERE f.owner_id <> ALL (%(passed_over)s::bigint[])
), free_lane AS MATERIALIZED (
    SELECT lane_id, owner_id, min(runnable_at) AS runnable_at
    FROM stretch WHERE is_free AND state = 'pending' GROUP BY lane_id, owner_id
), crew AS MATERIALIZED (
    SELECT id, (SELECT count(*) FROM futures_lane WHERE worker_id = w.id) AS leases
    FROM futures_worker AS w
    WHERE NOT %(only_leased)s
        AND ((queue = %(queue)s AND state = 'live') OR id = %(worker_id)s)
), share AS MATERIALIZED (
    SELECT count(*) AS workers,
        ceil((sum(leases) + (SELECT count(*) FROM free_lane)) / nullif(count(*), 0))
            - sum(leases) FILTER (WHERE id = %(worker_id)s) AS lanes,
        ceil((SELECT count(*) FROM anywhere)::numeric / nullif(count(*), 0)) AS futures
    FROM crew
), offered AS MATERIALIZED (
    SELECT lane_id, id, place <= share.lanes OR {has_waited} AS is_mine
    FROM (
        SELECT lane_id, NULL::text AS id, runnable_at, row_number() OVER (
            ORDER BY turn, {served}, runnable_at, lane_id
        ) AS place
        FROM (
            SELECT *, row_number() OVER (
                PARTITION BY owner_id ORDER BY runnable_at, lane_id
            ) AS turn
            FROM free_lane
        ) AS in_turns
    ) AS placed, share
    UNION ALL
    SELECT lane_id, id, place <= share.futures OR {has_waited}
    FROM (
        SELECT *, row_number() OVER (ORDER BY turn, {served}, runnable_at, id) AS place
        FROM (
            SELECT *, row_number() OVER (PARTITION BY owner_id ORDER BY runnable_at, id) AS turn
            FROM anywhere
        ) AS in_turns
    ) AS placed, share
), runnable AS MATERIALIZED (
    SELECT id, lane_id, true AS ordered, owner_id, seq_id, cost, is_suspect, runnable_at
    FROM stretch
    WHERE state = 'pending' AND (NOT is_free OR lane_id IN (
        SELECT lane_id FROM offered WHERE id IS NULL AND is_mine
    ))
    UNION ALL
    SELECT id, lane_id, false, owner_id, seq_id, cost, is_suspect, runnable_at
    FROM anywhere WHERE id IN (SELECT id FROM offered WHERE is_mine)
), in_order AS MATERIALIZED (                                                             -- 4
    SELECT *, sum(cost) OVER (ORDER BY place) AS spent
    FROM (
        SELECT *, row_number() OVER (
            ORDER BY turn, served, runnable_at, lane_id, seq_id, id
        ) AS place
        FROM (
            SELECT *, row_number() OVER (
                PARTITION BY owner_id ORDER BY runnable_at, lane_id, seq_id, id
            ) AS turn, {served} AS served
            FROM runnable
        ) AS in_turns
    ) AS placed
), suspect AS (                                                                           -- 5
    SELECT id, lane_id, ordered FROM in_order WHERE is_suspect ORDER BY place LIMIT 1
), chosen AS MATERIALIZED (
    (SELECT in_order.id, in_order.lane_id, in_order.ordered, in_order.place
     FROM in_order JOIN suspect
        ON in_order.id = suspect.id OR (suspect.ordered AND in_order.lane_id = suspect.lane_id)
     WHERE NOT (SELECT holds FROM held)
     ORDER BY in_order.place LIMIT 1)
    UNION ALL
    SELECT id, lane_id, ordered, place FROM in_order
    WHERE NOT EXISTS (SELECT FROM suspect)
        AND place <= %(max_futures)s AND (spent <= %(max_cost)s OR place = 1)
), to_lease AS MATERIALIZED (                                                             -- 6
    SELECT id FROM futures_lane
    WHERE id = ANY (ARRAY(
        SELECT lane_id FROM chosen JOIN free_lane USING (lane_id) WHERE ordered
    )) AND worker_id IS NULL
    FOR NO KEY UPDATE SKIP LOCKED
), goes_on AS (
    SELECT lane_id, next_seq_id AS before, is_free,
        bool_or(id IN (SELECT id FROM chosen)) AS is_chosen, coalesce(
            min(seq_id) FILTER (WHERE state = 'pending' AND id NOT IN (SELECT id FROM chosen)),
            max(seq_id) + 1
        ) AS next_seq_id
    FROM stretch GROUP BY lane_id, next_seq_id, is_free
), moved AS (
    UPDATE futures_lane AS l
    SET next_seq_id = goes_on.next_seq_id,
        worker_id = CASE WHEN is_chosen THEN %(worker_id)s ELSE l.worker_id END
    FROM goes_on
    WHERE l.id = goes_on.lane_id AND l.next_seq_id = goes_on.before
        AND goes_on.before < goes_on.next_seq_id
        AND CASE
            WHEN NOT goes_on.is_free THEN l.worker_id = %(worker_id)s
            WHEN is_chosen THEN l.worker_id IS NULL AND l.id = ANY (ARRAY(SELECT id FROM to_lease))
            ELSE l.worker_id IS NULL
        END
    RETURNING l.id
), to_run AS MATERIALIZED (
    SELECT id FROM futures_future
    WHERE id = ANY (ARRAY(SELECT id FROM chosen WHERE NOT ordered)) AND state = 'pending'
    FOR NO KEY UPDATE SKIP LOCKED
), claimed AS (                                                                           -- 7
    UPDATE futures_future
    SET state = 'running', worker_id = %(worker_id)s, started_at = statement_timestamp()
    WHERE id = ANY (ARRAY(
        SELECT id FROM to_run
        UNION ALL
        SELECT chosen.id FROM chosen JOIN moved ON moved.id = chosen.lane_id WHERE ordered
    )) AND state = 'pending'
    RETURNING *
)
SELECT EXISTS (SELECT FROM epoch), (SELECT count(*) FROM moved),
    (SELECT suspect FROM held)                                                            -- 8
    OR (SELECT count(*) FROM in_order) > (SELECT count(*) FROM chosen)
    OR EXISTS (
        SELECT FROM stretch WHERE position = %(window)s - 1 AND lane_id NOT IN (
            SELECT lane_id FROM offered WHERE id IS NULL AND NOT is_mine
        )
    )
    OR EXISTS (
        SELECT FROM runnable WHERE NOT ordered
        GROUP BY lane_id, owner_id HAVING count(*) >= %(window)s
    ),
    EXISTS (SELECT FROM offered WHERE NOT is_mine),
    chosen.ordered, {columns}
FROM (SELECT) AS always
LEFT JOIN (claimed JOIN chosen USING (id)) ON true
ORDER BY chosen.place
"""
_COLUMNS = tuple(column.attname for column in Future._meta.concrete_fields)
_CLAIM = _CLAIM.replace(
    "{served}", "coalesce(array_position(%(served)s::bigint[], owner_id), 0)"
).replace(
    # A time in the future is that of a submitter whose clock is ahead.
    "{has_waited}",
    "abs(extract(epoch FROM statement_timestamp() - runnable_at)) > %(patience_seconds)s",
)
_CLAIM = _CLAIM.replace("{columns}", ", ".join(f"claimed.{column}" for column in _COLUMNS))
_CLAIM = _CLAIM.replace("{is_suspect}", "(attempts > 0 OR interruptions >= %(interruptions)s)")
_FACTS = 4  # about the claim as a whole, in front of each row
_ORDERED = _FACTS
_FIRST = _FACTS + 1  # of the row's columns
_ID = _FIRST + _COLUMNS.index("id")
_LANE = _FIRST + _COLUMNS.index("lane_id")
_SUMMARY = _FIRST + _COLUMNS.index("summary")


def future_claim(
    *,
    worker: Worker,
    max_futures: int,
    max_cost: int,
    passed_over: Collection[int] = (),
    only_leased: bool = False,
) -> list[Future]:
    """Take the futures that may run now, in the order in which to run them, with payloads.

    This answers the queue's doorbells, so the caller must claim again while ``worker.more_waits``
    is true, after PATIENCE_SECONDS if ``worker.left_to_others`` is, and after that whenever it is
    notified. A caller that passes owners over must claim
    again when they may be served, whatever ``more_waits`` says. One statement, whose commit
    does not wait for the disk: ``futures.finishing.futures_finish`` detects a claim that a power
    failure has undone.

    Args:
        worker: Its epoch takes the futures.
        max_futures: Most futures to take.
        max_cost: Highest total cost, except that the first future is always taken.
        passed_over: Owners whose futures are not taken this time.
        only_leased: Look only at the lanes that the worker leases already, which costs less than to
            look at all. It says nothing about ``left_to_others``.

    Raises:
        Fenced: The worker was replaced.
    """
    while True:
        rows = execute(
            _CLAIM,
            {
                "queue": worker.queue,
                "worker_id": worker.pk,
                "window": min(max(MIN_WINDOW, max_futures), MAX_WINDOW),
                "max_futures": max_futures,
                "max_cost": max_cost,
                "served": list(worker.owners_served),
                "passed_over": list(passed_over),
                "interruptions": SUSPECT_INTERRUPTIONS,
                "suspect_seconds": SUSPECT_SECONDS,
                "patience_seconds": PATIENCE_SECONDS,
                "only_leased": only_leased,
            },
        )
        is_live, moved, worker.more_waits, left_to_others = rows[0][:_FACTS]
        if not is_live:
            raise Fenced
        if not only_leased:
            worker.left_to_others = left_to_others
        if rows[0][_ID] is not None:
            claimed = [_future(row) for row in rows]
            worker.leases.update(row[_LANE] for row in rows if row[_ORDERED])
            _note_served(worker, claimed)
            return claimed
        if not moved:
            return []
        # Only final rows were skipped; rows behind them may run.


def _note_served(worker: Worker, claimed: Sequence[Future]) -> None:
    now = list(dict.fromkeys(future.owner_id for future in claimed))
    before = [owner_id for owner_id in worker.owners_served if owner_id not in now]
    worker.owners_served = (before + now)[-MAX_SERVED:]


def _future(row: tuple[Any, ...]) -> Future:
    values = list(row)
    values[_SUMMARY] = orjson.loads(values[_SUMMARY])
    return Future.from_db(alias(), _COLUMNS, values[_FIRST:])
