"""The admin's front page: what is wrong, what happened, requests, runs, disk usage.

It only reads, with a fixed number of queries, each on an index. Staff users who are not superusers
see the figures of their own objects. Everybody sees workers, because everybody waits for them.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any

from django.conf import settings
from django.http import HttpRequest
from django.template.defaultfilters import filesizeformat
from django.utils import timezone

from futures.models import Future, Worker
from futures.overview import futures_failed, futures_open, workers_of
from futures.transitions import State
from tinkerapi.console.kit.charts import bar_chart
from tinkerapi.console.kit.display import changelist_url, link, moment, one_line, state_label
from tinkerapi.console.pages.futures import request_link, summary_text
from tinkerapi.console.pages.run_sections import last_result
from tinkerapi.console.pages.workers import worker_memory
from tinkerapi.console.quickstart import quickstart
from tinkerapi.console.server_events import events
from tinkerapi.console.server_problems import disk_full_in, problems
from tinkerapi.selectors import api_key_newest
from training.base_models import base_models
from training.overview import bytes_saved, runs_newest
from training.request_hours import beginning, requests_by_hour
from training.server_figures import worker_state

HOURS = 24
NEWEST_ROWS = 8
NEWEST_EVENTS = 12
STATE_COLOURS = {
    State.READY: "var(--color-green-500)",
    State.FAILED: "var(--color-red-500)",
    State.CANCELLED: "var(--color-base-400)",
    State.RUNNING: "var(--color-orange-500)",
    State.PENDING: "var(--color-blue-500)",
}

Context = dict[str, Any]
Hourly = Mapping[tuple[datetime, str], int]


def dashboard(request: HttpRequest, context: Context) -> Context:
    """Unfold's DASHBOARD_CALLBACK: the context of ``templates/admin/index.html``."""
    owner_id = None if request.user.is_superuser else request.user.pk
    hourly = requests_by_hour(owner_id, since=_first_hour())
    still_open = futures_open(owner_id)
    runs = runs_newest(owner_id, limit=NEWEST_ROWS)
    is_empty = not (runs or still_open or hourly)
    workers = workers_of([base_model.queue for base_model in base_models()])
    is_operator = bool(request.user.is_superuser)
    context.update(
        title="Dashboard",
        quickstart=quickstart(request) if is_empty else None,
        api_key=api_key_newest(request.user.pk or 0) if is_empty else None,
        tiles=_tiles(still_open, hourly),
        futures_chart=_futures_chart(hourly),
        problems=problems(workers, for_operator=is_operator),
        events=events(for_operator=is_operator, limit=NEWEST_EVENTS),
        workers=_workers_table(workers),
        runs=_runs_table(runs),
        failures=_failures_table(owner_id),
        storage=_storage(owner_id),
    )
    return context


def _first_hour() -> datetime:
    return beginning(timezone.now()) - timedelta(hours=HOURS - 1)


def _tiles(still_open: dict[str, int], hourly: Hourly) -> list[Context]:
    """The figures at the top: open requests, and the outcomes of the last day's requests."""
    numbers = {str(state): 0 for state in State} | still_open
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


def _futures_chart(hourly: Hourly) -> str:
    hours = [_first_hour() + timedelta(hours=hour) for hour in range(HOURS)]
    return bar_chart(
        [f"{timezone.localtime(hour):%H:%M}" for hour in hours],
        {
            str(state): ([hourly.get((hour, state), 0) for hour in hours], colour)
            for state, colour in STATE_COLOURS.items()
        },
    )


def _workers_table(workers: Sequence[Worker]) -> Context:
    """The newest worker of every served base model, and all that live or are marked live."""
    return {
        "headers": ["Worker", "State", "Queue", "Heartbeat", "Device", "Memory"],
        "rows": [
            [
                link(worker, f"#{worker.pk}"),
                state_label(worker_state(worker)),
                worker.queue,
                moment(worker.heartbeat_at),
                worker.figures.get("device", "-"),
                worker_memory(worker) or "-",
            ]
            for worker in workers
        ],
    }


def _runs_table(runs: Sequence[Any]) -> Context:
    return {
        "headers": [
            "Run",
            "Owner",
            "Base model",
            "Steps",
            "Tokens",
            "Loss or reward",
            "Last request",
        ],
        "rows": [
            [
                link(run, run.shown_title),
                run.owner.get_username(),
                run.base_model,
                f"{run.step:,}",
                f"{run.tokens:,}",
                last_result(run) or "-",
                moment(getattr(run, "newest_request_at", None)),
            ]
            for run in runs
        ],
    }


def _failures_table(owner_id: int | None) -> Context:
    since = timezone.now() - timedelta(hours=HOURS)
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
            for future in futures_failed(owner_id, since=since, limit=NEWEST_ROWS)
        ],
    }


def forecast_text(left: timedelta | None) -> str:
    """When the disk will be full, in words; empty without a forecast."""
    if left is None:
        return ""
    days = left / timedelta(days=1)
    when = f"{days:.0f} days" if days >= 2 else f"{left / timedelta(hours=1):.0f} hours"
    return f"Full in about {when} at the growth of the last days"


def _storage(owner_id: int | None) -> Context:
    """Usage of the data folder's disk, and the part of it that users saved."""
    try:
        disk = shutil.disk_usage(settings.DATA_DIR)
    except OSError:
        return {"is_known": False}
    return {
        "is_known": True,
        "title": f"{filesizeformat(disk.free)} free of {filesizeformat(disk.total)}",
        "forecast": forecast_text(disk_full_in(disk.free)),
        "used_percent": round(100 * (disk.total - disk.free) / disk.total),
        "saved": [
            (name, filesizeformat(size_bytes)) for name, size_bytes in bytes_saved(owner_id).items()
        ],
    }
