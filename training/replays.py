"""How far a replayed run is, and whether it equals the run whose log it repeats."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

from futures.database import execute
from futures.models import Future
from futures.transitions import State
from training.kinds import CompareRunsResult, Kind, stored_result
from training.models import Run
from training.selectors import CHANGED_ITS_RUN
from training.services.replays import UNTIL

_COMPARED = """
SELECT count(*), count(*) FILTER (WHERE is_final), min(seq_id) FILTER (WHERE is_final AND differs)
FROM (
    SELECT again.seq_id, again.state IN ('ready', 'failed', 'cancelled') AS is_final,
        again.state <> first.state OR again.error_code <> first.error_code
        OR again.summary->'loss' IS DISTINCT FROM first.summary->'loss'
        OR again.summary->'grad_norm' IS DISTINCT FROM first.summary->'grad_norm' AS differs
    FROM futures_future AS again JOIN futures_future AS first ON first.id = again.replay_of_id
    WHERE again.lane_id = %(lane_id)s
) AS compared
"""
"""Numbers are compared as Postgres stores them, which loses nothing of a float."""


@dataclass(frozen=True, kw_only=True)
class Replay:
    """A run beside the run whose log it repeats."""

    requests: int
    """Of the log."""
    finished: int
    first_difference: Future | None
    """The repeated request whose end, loss or gradient norm was the first to differ; with
    ``replay_of``."""
    comparison: Future | None
    """The request that compares both runs' weights; None in a fork, which has none."""
    has_moved_on: bool
    """Whether the original was trained further before that."""

    @property
    def weights(self) -> CompareRunsResult | None:
        """The result of the comparison, once there is one."""
        if self.comparison is None or self.comparison.result is None:
            return None
        stored = stored_result(self.comparison.kind, bytes(self.comparison.result))
        return cast(CompareRunsResult, stored)


def replay_of(run: Run) -> Replay:
    """The run's replay, which it must be; at most four queries."""
    [(requests, finished, differs)] = execute(_COMPARED, {"lane_id": run.pk})
    lane = Future.objects.filter(lane_id=run.pk)
    difference = None
    if differs is not None:
        rows = lane.without_bodies().select_related("replay_of")
        difference = rows.defer("replay_of__payload", "replay_of__result").get(seq_id=differs)
    comparison = lane.filter(kind=Kind.COMPARE_RUNS).defer("payload").order_by("seq_id").first()
    return Replay(
        requests=requests,
        finished=finished,
        first_difference=difference,
        comparison=comparison,
        has_moved_on=comparison is not None and _moved_on(run, comparison),
    )


def _moved_on(run: Run, comparison: Future) -> bool:
    """Whether the original was changed after the replayed log and before the comparison."""
    until = comparison.summary.get(UNTIL)
    if until is None or comparison.finished_at is None or run.replay_of_id is None:
        return False
    later: Any = Future.objects.filter(
        CHANGED_ITS_RUN,
        lane_id=run.replay_of_id,
        seq_id__gt=until,
        finished_at__lte=comparison.finished_at,
    )
    return bool(later.exists())


def replay_sentence(replay: Replay) -> str:
    """What a person would say of it."""
    done = f"{replay.finished:,} of {replay.requests:,} requests are repeated"
    if replay.first_difference is not None:
        return f"{done}; {_difference(replay.first_difference)}."
    if replay.finished < replay.requests:
        return f"{done}, all equal so far." if replay.finished else f"{done}."
    if replay.comparison is None:
        return f"{done}, all equal."
    if replay.weights is None:
        if replay.comparison.state == State.FAILED:
            return f"{done}, all equal; its weights were not compared: {replay.comparison.error}"
        return f"{done}, all equal; its weights are not compared yet."
    if replay.weights.is_identical:
        return (
            f"Equal to the last bit: {done}, with the same losses and gradient norms, and all "
            "weights, gradients and optimizer moments are the same."
        )
    if replay.has_moved_on:
        return f"{done}, all equal; the original was trained further, so its weights differ."
    apart = ", ".join(
        f"{name} by up to {difference:.3g}"
        for name, difference in replay.weights.largest_difference.items()
        if difference
    )
    return f"{done}, all equal, but the weights differ: {apart or 'their steps do'}."


def _difference(again: Future) -> str:
    """Where and how a repeated request differs from the first."""
    first = again.replay_of
    if first is None:  # it was deleted
        return f"request {again.seq_id} ({again.kind}) differs"
    what = f"request {first.seq_id} ({again.kind}) differs"
    if (again.state, again.error_code) != (first.state, first.error_code):
        reason = f": {again.error}" if again.error else ""
        return f"{what}: it is {again.state}, and was {first.state}{reason}"
    for name, words in (("loss", "loss"), ("grad_norm", "gradient norm")):
        old, new = first.summary.get(name), again.summary.get(name)
        if old != new:
            return f"{what}: {words} {new!r}, and was {old!r}"
    return what
