"""The frame of every console page: its sidebar, its stylesheet, its icon."""

from __future__ import annotations

from typing import Any

from django.http import HttpRequest
from django.templatetags.static import static
from django.urls import reverse

Context = dict[str, Any]


def stylesheet(request: HttpRequest) -> str:
    """The address of our few CSS rules for which unfold has no class."""
    return static("tinkerapi/admin.css")


def favicon(request: HttpRequest) -> str:
    """The address of the icon: a falling loss."""
    return static("tinkerapi/favicon.svg")


def navigation(request: HttpRequest) -> list[Context]:
    """The sidebar: the console first, then users and keys, then the queue's internals."""
    superuser = bool(request.user.is_superuser)

    def item(title: str, icon: str, name: str) -> Context:
        return {"title": title, "icon": icon, "link": reverse(f"admin:{name}")}

    # Their addresses lie below that of the checkpoints, of which unfold marks both otherwise.
    playground = item("Playground", "forum", "training_checkpoint_playground")
    storage = item("Storage", "hard_drive", "training_checkpoint_storage")
    checkpoints = item("Checkpoints", "save", "training_checkpoint_changelist")
    checkpoints["active"] = request.path.startswith(checkpoints["link"]) and (
        request.path not in (playground["link"], storage["link"])
    )
    groups: list[Context] = [
        {
            "title": "Training",
            "items": [
                item("Dashboard", "dashboard", "index"),
                item("Runs", "model_training", "training_run_changelist"),
                item("Futures", "schedule_send", "futures_future_changelist"),
                checkpoints,
                playground,
                item("Sessions", "terminal", "training_session_changelist"),
                item("Snapshots", "settings_backup_restore", "training_snapshot_changelist"),
            ],
        },
        {
            "title": "Use",
            "items": [
                item("Usage", "bar_chart", "training_dailyusage_changelist"),
                storage,
            ],
        },
        {
            "title": "Serving",
            "items": [
                item("Workers", "memory", "futures_worker_changelist"),
                item("Sampling sessions", "stacks", "training_samplingsession_changelist"),
                item("Lanes", "format_list_numbered", "futures_lane_changelist"),
            ],
        },
        {"title": "Access", "items": [item("API keys", "key", "tinkerapi_apikey_changelist")]},
    ]
    if superuser:
        groups[-1]["items"] += [
            item("Users", "person", "auth_user_changelist"),
            item("Audit log", "history", "training_auditevent_changelist"),
            item("Webhook", "webhook", "tinkerapi_delivery_changelist"),
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
