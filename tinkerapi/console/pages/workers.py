"""Workers in the admin: state, device, and the futures that they ran."""

from __future__ import annotations

from typing import Any

from django.contrib import admin
from django.db.models import Model
from django.http import HttpRequest
from django.template.defaultfilters import filesizeformat
from django.utils.safestring import SafeString
from unfold.contrib.filters.admin import (
    ChoicesCheckboxFilter,
)

from futures.models import Future, Worker
from futures.overview import worker_running
from tinkerapi.console.kit.console_admin import ConsoleAdmin
from tinkerapi.console.kit.display import duration, list_link, moment, preformatted, state_label
from tinkerapi.console.kit.filters import MomentFilter
from tinkerapi.console.kit.preview import value_preview
from training.server_figures import DEVICE_FIGURES, worker_state


@admin.register(Worker)
class WorkerAdmin(ConsoleAdmin):
    """Workers' lives. Everybody may see the queue, but not the futures that a worker holds."""

    owner_path = None
    list_display = (
        "name",
        "state_label",
        "queue",
        "heartbeat",
        "device",
        "memory",
        "hostname",
        "pid",
        "started",
        "lived",
    )
    list_filter = (("state", ChoicesCheckboxFilter), ("started_at", MomentFilter))
    list_filter_submit = True
    search_fields = ("queue", "hostname")
    ordering = ("-id",)
    sortable_by = ()
    fieldsets = (
        (
            None,
            {
                "fields": (
                    ("name", "state_label"),
                    ("queue", "heartbeat"),
                    ("device", "memory"),
                    "adapters",
                    ("hostname", "pid"),
                    ("started", "lived"),
                    ("running", "futures"),
                )
            },
        ),
        ("Figures", {"fields": ("all_figures",)}),
    )

    def get_fieldsets(self, request: HttpRequest, obj: Model | None = None) -> Any:
        """Only superusers see the resident adapters, because these have other users' names."""
        fieldsets = super().get_fieldsets(request, obj)
        return fieldsets if request.user.is_superuser else fieldsets[:1]

    @admin.display(description="Worker")
    def name(self, worker: Worker) -> str:
        return f"#{worker.pk}"

    @admin.display(description="State")
    def state_label(self, worker: Worker) -> SafeString:
        return state_label(worker_state(worker))

    @admin.display(description="Heartbeat")
    def heartbeat(self, worker: Worker) -> SafeString | None:
        return moment(worker.heartbeat_at)

    @admin.display(description="Device")
    def device(self, worker: Worker) -> str | None:
        return str(worker.figures.get("device") or "") or None

    @admin.display(description="Memory")
    def memory(self, worker: Worker) -> str | None:
        return worker_memory(worker)

    @admin.display(description="Adapters in memory")
    def adapters(self, worker: Worker) -> str | None:
        return worker_adapters(worker)

    @admin.display(description="Started")
    def started(self, worker: Worker) -> SafeString | None:
        return moment(worker.started_at)

    @admin.display(description="Lived")
    def lived(self, worker: Worker) -> str | None:
        """Until its stop, or its last heartbeat."""
        return duration((worker.stopped_at or worker.heartbeat_at) - worker.started_at)

    @admin.display(description="Running now")
    def running(self, worker: Worker) -> int:
        return worker_running(worker)

    @admin.display(description="Futures")
    def futures(self, worker: Worker) -> SafeString:
        return list_link(Future, "futures it ran", worker__id__exact=worker.pk)

    @admin.display(description="Reported figures")
    def all_figures(self, worker: Worker) -> SafeString:
        return preformatted(value_preview(worker.figures))


def worker_memory(worker: Worker) -> str | None:
    """The worker's last reported memory, and that of its GPU; None if it reported none."""
    taken = worker.figures.get("memory_bytes")
    of_gpu, all_of_gpu = (worker.figures.get(name) for name in DEVICE_FIGURES)
    parts = [filesizeformat(taken)] if isinstance(taken, int | float) else []
    if isinstance(of_gpu, int) and isinstance(all_of_gpu, int):
        parts.append(f"GPU {filesizeformat(of_gpu)} of {filesizeformat(all_of_gpu)}")
    return ", ".join(parts) or None


def worker_adapters(worker: Worker) -> str | None:
    """The number of adapters in the worker's memory, and their share of its limit."""
    names = ("resident_adapters", "adapter_bytes", "adapter_cache_bytes")
    count, taken, budget = (worker.figures.get(name) for name in names)
    if not (isinstance(count, int) and isinstance(taken, int) and isinstance(budget, int)):
        return None
    return f"{count}, {filesizeformat(taken)} of {filesizeformat(budget)}"
