"""The two statements of a claim: one looks at all lanes of the queue, one only at the worker's own.

They differ in where they look and whether they lease; what a suspect is, the order and the budgets
are shared pieces. The second is not the first with a switch: to start and end the parts of a plan
that find nothing took most of its time.

Numbered as in the statements:

0. The epoch, locked, so that a claim and the end of its epoch are serialized: a claim that
   waited for that end finds no epoch and takes nothing. The futures that the epoch
   holds. The doorbells are deleted; one that this statement does not see stays. The
   commit does not wait for the disk.
1. The lanes and the owners that have pending futures, found by skipping from one to the next
   in the partial indexes, so that ten thousand rows of one lane cost one step. Or only the lanes
   that this worker leases.
2. The rows of each lane from its next seq id on, and of each owner without a lane.
3. The futures that may run, and since when; of those that any worker may run, this one's share.
4. Their order, and the prefix within the budgets.
5. A suspect, alone, or the future that must run before it in its lane.
6. The free lanes that no other claim is taking, and the futures without an ordered lane that none
   is taking; whoever has locked one first gets it. The lanes are leased and moved past all rows
   that are claimed or final; one that has changed since this statement began stays as it is.
7. The compare-and-set.
8. Whether any future is left that this worker may run, now or after the held ones, and whether
   some are left to others.

``= ANY (ARRAY(...))`` makes Postgres look up rows by key, whatever row count it estimates.
"""

from __future__ import annotations

from futures.models import Future

COLUMNS = tuple(column.attname for column in Future._meta.concrete_fields)

_EPOCH = """
epoch AS MATERIALIZED (                                                                   -- 0
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
)
"""

_STRETCH = """
stretch AS MATERIALIZED (                                                                 -- 2
    SELECT * FROM (
        SELECT l.id AS lane_id, l.next_seq_id, l.worker_id IS NULL AS is_free, f.id, l.owner_id,
            f.seq_id, f.state, f.cost, f.is_suspect,
            max(f.created_at) OVER (PARTITION BY l.id ORDER BY f.seq_id) AS runnable_at,
            row_number() OVER (PARTITION BY l.id ORDER BY f.seq_id) - 1 AS position
        FROM {lanes}
        CROSS JOIN LATERAL (
            SELECT id, seq_id, state, cost, {is_suspect} AS is_suspect, created_at
            FROM futures_future
            WHERE lane_id = l.id AND seq_id >= l.next_seq_id
            ORDER BY seq_id LIMIT %(window)s
        ) AS f
    ) AS looked_at
    WHERE seq_id = next_seq_id + position
)
"""

_LANES_ANYWHERE = """
any_lane_with_work (lane_id) AS (                                                         -- 1
    (SELECT lane_id FROM futures_future
     WHERE queue = %(queue)s AND state = 'pending' AND lane_id IS NOT NULL
        AND EXISTS (SELECT FROM may_claim)
     ORDER BY lane_id LIMIT 1)
    UNION ALL
    SELECT (
        SELECT f.lane_id FROM futures_future AS f
        WHERE f.queue = %(queue)s AND f.state = 'pending' AND f.lane_id > before.lane_id
        ORDER BY f.lane_id LIMIT 1
    ) FROM any_lane_with_work AS before WHERE before.lane_id IS NOT NULL
), lane_with_work AS MATERIALIZED (
    SELECT lane_id FROM any_lane_with_work
), owner_without_lane (owner_id) AS (
    (SELECT owner_id FROM futures_future
     WHERE queue = %(queue)s AND state = 'pending' AND lane_id IS NULL
        AND EXISTS (SELECT FROM may_claim)
     ORDER BY owner_id LIMIT 1)
    UNION ALL
    SELECT (
        SELECT f.owner_id FROM futures_future AS f
        WHERE f.queue = %(queue)s AND f.state = 'pending' AND f.lane_id IS NULL
            AND f.owner_id > before.owner_id
        ORDER BY f.owner_id LIMIT 1
    ) FROM owner_without_lane AS before WHERE before.owner_id IS NOT NULL
)
"""

_SHARE = """
anywhere AS MATERIALIZED (                                                                -- 3
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
    WHERE (queue = %(queue)s AND state = 'live') OR id = %(worker_id)s
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
)
"""

_LEASED_RUNNABLE = """
runnable AS (                                                                             -- 3
    SELECT id, lane_id, true AS ordered, owner_id, seq_id, cost, is_suspect, runnable_at
    FROM stretch WHERE state = 'pending'
)
"""

_ORDER = """
in_order AS MATERIALIZED (                                                                -- 4
    SELECT *, row_number() OVER places AS place, sum(cost) OVER places AS spent
    FROM (
        SELECT *, row_number() OVER (
            PARTITION BY owner_id ORDER BY runnable_at, lane_id, seq_id, id
        ) AS turn, {served} AS served
        FROM runnable
    ) AS in_turns
    WINDOW places AS (
        ORDER BY turn, served, runnable_at, lane_id, seq_id, id ROWS UNBOUNDED PRECEDING
    )
), suspect AS (                                                                           -- 5
    SELECT id, lane_id, ordered FROM in_order WHERE is_suspect ORDER BY place LIMIT 1
), chosen AS MATERIALIZED (
    (SELECT in_order.id, in_order.lane_id, in_order.ordered, in_order.place
     FROM in_order JOIN suspect
        ON in_order.id = suspect.id OR (suspect.ordered AND in_order.lane_id = suspect.lane_id)
     WHERE NOT (SELECT holds FROM held) AND EXISTS (SELECT FROM suspect)
     ORDER BY in_order.place LIMIT 1)
    UNION ALL
    SELECT id, lane_id, ordered, place FROM in_order
    WHERE NOT EXISTS (SELECT FROM suspect)
        AND place <= %(max_futures)s AND (spent <= %(max_cost)s OR place = 1)
)
"""

_MOVE = """
goes_on AS (
    SELECT lane_id, next_seq_id AS before, is_free,
        bool_or(id IN (SELECT id FROM chosen)) AS is_chosen, coalesce(
            min(seq_id) FILTER (WHERE state = 'pending' AND id NOT IN (SELECT id FROM chosen)),
            max(seq_id) + 1
        ) AS next_seq_id
    FROM stretch GROUP BY lane_id, next_seq_id, is_free
), moved AS (
    UPDATE futures_lane AS l
    SET next_seq_id = goes_on.next_seq_id{lease}
    FROM goes_on
    WHERE l.id = goes_on.lane_id AND l.next_seq_id = goes_on.before
        AND goes_on.before < goes_on.next_seq_id AND {is_as_before}
    RETURNING l.id
)
"""

_TO_LEASE = """
to_lease AS MATERIALIZED (                                                                -- 6
    SELECT id FROM futures_lane
    WHERE id = ANY (ARRAY(
        SELECT lane_id FROM chosen JOIN free_lane USING (lane_id) WHERE ordered
    )) AND worker_id IS NULL
    FOR NO KEY UPDATE SKIP LOCKED
), to_run AS MATERIALIZED (
    SELECT id FROM futures_future
    WHERE id = ANY (ARRAY(SELECT id FROM chosen WHERE NOT ordered)) AND state = 'pending'
    FOR NO KEY UPDATE SKIP LOCKED
)
"""

_TAKE = """
claimed AS (                                                                              -- 7
    UPDATE futures_future
    SET state = 'running', worker_id = %(worker_id)s, started_at = statement_timestamp()
    WHERE id = ANY (ARRAY({to_claim})) AND state = 'pending'
    RETURNING *
)
SELECT EXISTS (SELECT FROM epoch), (SELECT count(*) FROM moved),
    (SELECT suspect FROM held)                                                            -- 8
    OR (SELECT count(*) FROM in_order) > (SELECT count(*) FROM chosen){more_waits},
    {left_to_others}, chosen.ordered, {columns}
FROM (SELECT) AS always
LEFT JOIN (claimed JOIN chosen USING (id)) ON true
ORDER BY chosen.place
"""

_IN_MOVED_LANES = """
    SELECT chosen.id FROM chosen JOIN moved ON moved.id = chosen.lane_id WHERE ordered
"""


def _statement(head: str, *parts: str, **replaced: str) -> str:
    """The parts as one statement, with the terms that occur in several of them."""
    sql = f"{head} " + ", ".join(part.strip() for part in parts)
    terms = replaced | {
        "columns": ", ".join(f"claimed.{column}" for column in COLUMNS),
        "is_suspect": "(attempts > 0 OR interruptions >= %(interruptions)s)",
        "served": "coalesce(array_position(%(served)s::bigint[], owner_id), 0)",
        # A time in the future is that of a submitter whose clock is ahead.
        "has_waited": "abs(extract(epoch FROM statement_timestamp() - runnable_at))"
        " > %(patience_seconds)s",
    }
    for name, term in terms.items():
        sql = sql.replace("{" + name + "}", term)
    # psycopg keeps what it has found out about a statement only if that has 4,096 bytes at most.
    lines = (line.partition("--")[0].strip() for line in sql.splitlines())
    return " ".join(line for line in lines if line)


ANYWHERE = _statement(
    "WITH RECURSIVE",
    _EPOCH,
    _LANES_ANYWHERE,
    _STRETCH,
    _SHARE,
    _ORDER,
    _TO_LEASE,
    _MOVE,
    _TAKE,
    lanes="""lane_with_work
        JOIN futures_lane AS l ON l.id = lane_with_work.lane_id AND l.ordered
            AND (l.worker_id IS NULL OR l.worker_id = %(worker_id)s)
            AND l.owner_id <> ALL (%(passed_over)s::bigint[])""",
    lease=", worker_id = CASE WHEN is_chosen THEN %(worker_id)s ELSE l.worker_id END",
    is_as_before="""CASE
            WHEN NOT goes_on.is_free THEN l.worker_id = %(worker_id)s
            WHEN is_chosen THEN l.worker_id IS NULL AND l.id = ANY (ARRAY(SELECT id FROM to_lease))
            ELSE l.worker_id IS NULL
        END""",
    to_claim="SELECT id FROM to_run UNION ALL " + _IN_MOVED_LANES,  # noqa: S608
    more_waits="""
    OR EXISTS (
        SELECT FROM stretch WHERE position = %(window)s - 1 AND lane_id NOT IN (
            SELECT lane_id FROM offered WHERE id IS NULL AND NOT is_mine
        )
    )
    OR EXISTS (
        SELECT FROM runnable WHERE NOT ordered
        GROUP BY lane_id, owner_id HAVING count(*) >= %(window)s
    )""",
    left_to_others="EXISTS (SELECT FROM offered WHERE NOT is_mine)",
)

LEASED = _statement(
    "WITH",
    _EPOCH,
    _STRETCH,
    _LEASED_RUNNABLE,
    _ORDER,
    _MOVE,
    _TAKE,
    lanes="""(
            SELECT * FROM futures_lane
            WHERE worker_id = %(worker_id)s AND owner_id <> ALL (%(passed_over)s::bigint[])
                AND EXISTS (SELECT FROM may_claim)
        ) AS l""",
    lease="",
    is_as_before="l.worker_id = %(worker_id)s",
    to_claim=_IN_MOVED_LANES,
    more_waits=" OR EXISTS (SELECT FROM stretch WHERE position = %(window)s - 1)",
    left_to_others="NULL",
)
