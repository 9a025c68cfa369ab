"""Where runs come from: checkpoints that were loaded into them, and replays."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime

from django.db.models import Q

from futures.models import Future, FutureQuerySet
from futures.transitions import State
from training.kinds import Kind
from training.models import Run
from training.paths import TinkerPath

FIRST_REQUESTS = 3
"""A run that continues another loads its checkpoint with one of its first requests."""
MAX_ROWS = 50


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A checkpoint that was loaded into a run."""

    run: Run
    source: Run | None
    """The run that saved it; None if it is another owner's."""
    path: str
    at: datetime


def run_loads(run: Run) -> list[Loaded]:
    """The checkpoints that were loaded into a run, the first one first; two queries."""
    loads = _loads().filter(lane_id=run.pk).order_by("seq_id")[:MAX_ROWS]
    named = {_run_part(load) for load in loads}
    runs = Run.objects.owned_by(run.owner_id).filter(Q(pk__in=named) | Q(name__in=named))
    sources = _by_name(runs.select_related("owner", "session").order_by("created_at"))
    return [_loaded(load, run, sources.get(_run_part(load))) for load in loads]


def run_children(run: Run) -> list[Loaded]:
    """The runs of the same owner that began with a checkpoint of this one, the newest first."""
    paths = Q(summary__path__startswith=f"tinker://{run.pk}/")
    paths |= Q(summary__path__startswith=f"tinker://{run.name}/")
    others = Run.objects.owned_by(run.owner_id).exclude(pk=run.pk)
    loads = _loads().filter(
        paths,
        lane_id__in=others.values("pk"),
        seq_id__lte=FIRST_REQUESTS,
        created_at__gt=run.created_at,  # an earlier run may have had the name
    )
    found = {load.lane_id: load for load in loads.order_by("-created_at")[:MAX_ROWS]}
    children = others.filter(pk__in=found).select_related("owner", "session")
    return [_loaded(found[child.pk], child, run) for child in children.order_by("-created_at")]


def run_replays(run: Run) -> list[Run]:
    """The runs that were rebuilt from this one's log, the newest first."""
    replays = Run.objects.filter(replay_of=run).select_related("owner", "session")
    return list(replays.order_by("-created_at")[:MAX_ROWS])


def _loads() -> FutureQuerySet:
    loads: FutureQuerySet = Future.objects.without_bodies()
    return loads.filter(kind=Kind.LOAD_WEIGHTS, state=State.READY)


def _loaded(load: Future, run: Run, source: Run | None) -> Loaded:
    return Loaded(
        run=run, source=source, path=str(load.summary.get("path", "")), at=load.created_at
    )


def _run_part(load: Future) -> str:
    """The run in the path that a request loaded."""
    return TinkerPath.parse(str(load.summary["path"]), field="path").run


def _by_name(runs: Iterable[Run]) -> dict[str, Run]:
    """Name or id to run; of several of one name the newest."""
    return {key: run for run in runs for key in (run.name, run.pk)}
