"""The admin's front page: what runs, what waits, what failed, and how full the disk is.

Reads only, a fixed number of queries, each on an index. A staff user who is no superuser sees
the numbers of what is theirs; workers are everybody's, for everybody waits for them.
"""

from __future__ import annotations

import shutil
from datetime import timedelta
from typing import Any

from django.conf import settings
from django.db.models import Count, Q, QuerySet, Sum
from django.db.models.functions import TruncHour
from django.http import HttpRequest
from django.template.defaultfilters import filesizeformat
from django.templatetags.static import static
from django.urls import reverse
from django.utils import timezone

from futures.admin.futures import request_link, summary_text
from futures.admin.workers import is_silent, worker_memory
from futures.display import bar_chart, changelist_url, link, moment, one_line, state_label
from futures.models import Future, FutureQuerySet, Worker
from futures.transitions import State
from training.admin.runs import short_loss
from training.base_models import base_models
from training.models import Checkpoint, Run, Snapshot
from training.progress import with_progress

HOURS = 24
NEWEST_ROWS = 8
STATE_COLOURS = {
    State.READY: "var(--color-green-500)",
    State.FAILED: "var(--color-red-500)",
    State.CANCELLED: "var(--color-base-400)",
    State.RUNNING: "var(--color-orange-500)",
    State.PENDING: "var(--color-blue-500)",
}

Context = dict[str, Any]


def dashboard(request: HttpRequest, context: Context) -> Context:
    """Unfold's DASHBOARD_CALLBACK: the context of ``templates/admin/index.html``."""
    futures: FutureQuerySet = _owned(Future.objects.without_bodies(), request, "owner")
    runs = _owned(Run.objects.live(), request, "owner")
    hourly = _futures_per_hour(futures)
    context.update(
        title="Dashboard",
        tiles=_tiles(futures, hourly),
        futures_chart=_futures_chart(hourly),
        workers=_workers_table(request),
        runs=_runs_table(runs),
        failures=_failures_table(futures),
        storage=_storage(request),
    )
    return context


def _owned(rows: Any, request: HttpRequest, owner_path: str) -> Any:
    """The rows that this person may know of."""
    return rows if request.user.is_superuser else rows.filter(**{owner_path: request.user.pk})


def _futures_per_hour(futures: QuerySet[Future]) -> dict[tuple[Any, str], int]:
    """(hour, state) to the number of futures submitted in the last 24 hours."""
    rows = (
        futures.filter(created_at__gte=_first_hour())
        .annotate(hour=TruncHour("created_at"))
        .values_list("hour", "state")
        .annotate(number=Count("pk"))
        .order_by()
    )
    return {(hour, state): number for hour, state, number in rows}


def _first_hour() -> Any:
    this_hour = timezone.now().replace(minute=0, second=0, microsecond=0)
    return this_hour - timedelta(hours=HOURS - 1)


def _tiles(futures: FutureQuerySet, hourly: dict[tuple[Any, str], int]) -> list[Context]:
    """The numbers at the top: what is open now, and what became of the last day's requests."""
    waiting = futures.open().order_by().values_list("state").annotate(number=Count("pk"))
    numbers = {str(state): 0 for state in State} | dict(waiting)
    for state in (State.READY, State.FAILED, State.CANCELLED):
        numbers[state] = sum(number for (_, of), number in hourly.items() if of == state)
    return [
        {
            "state": str(state),
            "label": state_label(state),
            "number": f"{numbers[state]:,}",
            "note": "now" if state in (State.PENDING, State.RUNNING) else f"{HOURS} hours",
            "url": f"{changelist_url(Future)}?state__exact={state}",
        }
        for state in State
    ]


def _futures_chart(hourly: dict[tuple[Any, str], int]) -> str:
    hours = [_first_hour() + timedelta(hours=hour) for hour in range(HOURS)]
    return bar_chart(
        [f"{timezone.localtime(hour):%H:%M}" for hour in hours],
        {
            str(state): ([hourly.get((hour, state), 0) for hour in hours], colour)
            for state, colour in STATE_COLOURS.items()
        },
    )


def _workers_table(request: HttpRequest) -> Context:
    """The newest worker of every base model that is served, and all that live or say so."""
    queues = [base_model.queue for base_model in base_models()]
    newest = Worker.objects.filter(queue__in=queues).order_by("queue", "-id").distinct("queue")
    living = Q(state__in=[Worker.WorkerState.STARTING, Worker.WorkerState.LIVE])
    shown = Worker.objects.filter(living | Q(pk__in=newest.values("pk")))
    workers = list(shown.order_by("queue")) or list(Worker.objects.order_by("-id")[:1])
    return {
        "headers": ["Worker", "State", "Queue", "Heartbeat", "Device", "Memory"],
        "rows": [
            [
                link(worker, f"#{worker.pk}"),
                state_label("silent" if is_silent(worker) else worker.state),
                worker.queue,
                moment(worker.heartbeat_at),
                worker.figures.get("device", "-"),
                worker_memory(worker) or "-",
            ]
            for worker in workers
        ],
    }


def _runs_table(runs: QuerySet[Run]) -> Context:
    newest = with_progress(runs).select_related("owner").order_by("-newest_request_at")
    return {
        "headers": ["Run", "Owner", "Base model", "Steps", "Tokens", "Last loss", "Last request"],
        "rows": [
            [
                link(run),
                run.owner.get_username(),
                run.base_model,
                f"{run.step:,}",
                f"{run.tokens:,}",
                short_loss(run) or "-",
                moment(getattr(run, "newest_request_at", None)),
            ]
            for run in newest[:NEWEST_ROWS]
        ],
    }


def _failures_table(futures: QuerySet[Future]) -> Context:
    since = timezone.now() - timedelta(hours=HOURS)
    failed = futures.filter(state=State.FAILED, created_at__gte=since).order_by("-created_at")
    return {
        "headers": ["Request", "Kind", "Fault", "Error", "Submitted"],
        "rows": [
            [
                request_link(future),
                future.kind,
                future.category,
                one_line(summary_text(future)),
                moment(future.created_at),
            ]
            for future in failed[:NEWEST_ROWS]
        ],
    }


def _storage(request: HttpRequest) -> Context:
    """How full the data folder's disk is, and how much of that is what people saved."""
    try:
        disk = shutil.disk_usage(settings.DATA_DIR)
    except OSError:
        return {"is_known": False}
    saved = {
        "checkpoints": _owned(Checkpoint.objects.all(), request, "run__owner"),
        "snapshots": _owned(Snapshot.objects.all(), request, "run__owner"),
    }
    return {
        "is_known": True,
        "title": f"{filesizeformat(disk.free)} free of {filesizeformat(disk.total)}",
        "used_percent": round(100 * (disk.total - disk.free) / disk.total),
        "saved": [
            (name, filesizeformat(rows.aggregate(size=Sum("size_bytes"))["size"] or 0))
            for name, rows in saved.items()
        ],
    }


def stylesheet(request: HttpRequest) -> str:
    """The address of the few rules that unfold has no class for."""
    return static("tinkerapi/admin.css")


def favicon(request: HttpRequest) -> str:
    """The address of the icon: a falling loss."""
    return static("tinkerapi/favicon.svg")


def navigation(request: HttpRequest) -> list[Context]:
    """The sidebar: the console first, then who may use it, then the queue's inside."""
    superuser = bool(request.user.is_superuser)

    def item(title: str, icon: str, name: str) -> Context:
        return {"title": title, "icon": icon, "link": reverse(f"admin:{name}")}

    groups: list[Context] = [
        {
            "title": "Training",
            "items": [
                item("Dashboard", "dashboard", "index"),
                item("Runs", "model_training", "training_run_changelist"),
                item("Futures", "schedule_send", "futures_future_changelist"),
                item("Checkpoints", "save", "training_checkpoint_changelist"),
                item("Sessions", "terminal", "training_session_changelist"),
                item("Snapshots", "settings_backup_restore", "training_snapshot_changelist"),
            ],
        },
        {
            "title": "Serving",
            "items": [
                item("Workers", "memory", "futures_worker_changelist"),
                item("Sampling sessions", "forum", "training_samplingsession_changelist"),
                item("Lanes", "format_list_numbered", "futures_lane_changelist"),
            ],
        },
        {"title": "Access", "items": [item("API keys", "key", "tinkerapi_apikey_changelist")]},
    ]
    if superuser:
        groups[-1]["items"] += [
            item("Users", "person", "auth_user_changelist"),
            item("Audit log", "history", "training_auditevent_changelist"),
        ]
        groups.append(
            {
                "title": "Task queue",
                "collapsible": True,
                "items": [
                    item("Doorbells", "notifications", "django_q_ormq_changelist"),
                    item("Schedules", "calendar_month", "django_q_schedule_changelist"),
                    item("Failed tasks", "error", "django_q_failure_changelist"),
                    item("Finished tasks", "task_alt", "django_q_success_changelist"),
                ],
            }
        )
    return groups
