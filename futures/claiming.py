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

from futures.claim_statements import ANYWHERE, COLUMNS, LEASED
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

_FACTS = 4  # about the claim as a whole, in front of each row
_ORDERED = _FACTS
_FIRST = _FACTS + 1  # of the row's columns
_ID = _FIRST + COLUMNS.index("id")
_LANE = _FIRST + COLUMNS.index("lane_id")
_SUMMARY = _FIRST + COLUMNS.index("summary")


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
            LEASED if only_leased else ANYWHERE,
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
    return Future.from_db(alias(), COLUMNS, values[_FIRST:])
