"""Usage: tokens, worker time and cost by day, user and run, and the same as CSV."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from datetime import date, timedelta
from typing import Any

from django.conf import settings
from django.contrib import admin
from django.contrib.auth.models import User
from django.http import HttpRequest, HttpResponse
from django.template.response import TemplateResponse

from tinkerapi.console.kit.charts import bar_chart
from tinkerapi.console.kit.console_admin import ConsoleAdmin
from tinkerapi.console.kit.display import link, link_to
from training.models import DailyUsage
from training.usage import Period, Used, today, tokens_used, used_together

PERIODS = (7, 30, 90)
"""Days to choose from."""
ROWS = 50
"""Most users and runs in the tables; the CSV has all."""
COLOURS = {
    "trained on": "var(--color-primary-500)",
    "read as prompts": "var(--color-base-400)",
    "sampled": "var(--color-green-500)",
}

Context = dict[str, Any]


@admin.register(DailyUsage)
class UsageAdmin(ConsoleAdmin):
    """One page in the place of a list."""

    def has_view_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return super().has_view_permission(request) and obj is None

    def changelist_view(self, request: HttpRequest, extra_context: Any = None) -> HttpResponse:
        owner_id = None if request.user.is_superuser else request.user.pk
        days = _days(request)
        period = Period(owner_id, days=days)
        if request.GET.get("format") == "csv":
            return _csv(period)
        context = {
            **self.admin_site.each_context(request),
            "title": "Usage",
            "days": days,
            "periods": PERIODS,
            **_figures(period, by_user=owner_id is None),
            "quota": _quota(request.user.pk or 0),
        }
        return TemplateResponse(request, "admin/training/usage.html", context)


def _days(request: HttpRequest) -> int:
    asked = request.GET.get("days", "")
    return int(asked) if asked in map(str, PERIODS) else PERIODS[1]


def _figures(period: Period, *, by_user: bool) -> Context:
    by_day = period.by_day()
    total = used_together(by_day.values())
    return {
        "tiles": [
            {"key": "training", "label": "Tokens trained on", "number": f"{total.training:,}"},
            {"key": "prefill", "label": "Tokens read as prompts", "number": f"{total.prefill:,}"},
            {"key": "sampling", "label": "Tokens sampled", "number": f"{total.sampling:,}"},
            {"label": "Worker time", "number": hours(total.seconds)},
            *([{"label": "Cost", "number": cost(total.seconds)}] if has_price() else []),
        ],
        "chart": _chart(period.first, by_day),
        "users": _users_table(period) if by_user else None,
        "runs": _runs_table(period, with_owner=by_user),
        "is_empty": not total.requests,
    }


def _chart(first: date, by_day: Mapping[date, Used]) -> str:
    count = (today() - first).days + 1
    days = [first + timedelta(days=number) for number in range(count)]
    used = [by_day.get(day) for day in days]
    values = {
        "trained on": [item.training if item else 0 for item in used],
        "read as prompts": [item.prefill if item else 0 for item in used],
        "sampled": [item.sampling if item else 0 for item in used],
    }
    return bar_chart(
        [f"{day:%d %b}" for day in days],
        {name: (values[name], colour) for name, colour in COLOURS.items()},
    )


def _headers(*first: str) -> list[str]:
    priced = ["Cost"] if has_price() else []
    return [*first, "Requests", "Trained on", "Prompts", "Sampled", "Worker time", *priced]


def _cells(used: Used) -> list[str]:
    tokens = [f"{number:,}" for number in (used.training, used.prefill, used.sampling)]
    priced = [cost(used.seconds)] if has_price() else []
    return [f"{used.requests:,}", *tokens, hours(used.seconds), *priced]


def _users_table(period: Period) -> Context:
    rows = [
        [link_to(User, owner_id, name), *_cells(used)]
        for owner_id, name, used in period.by_owner(limit=ROWS)
    ]
    return {"headers": _headers("User"), "rows": rows}


def _runs_table(period: Period, *, with_owner: bool) -> Context:
    rows = [
        [
            link(run, run.shown_title) if run else "base model or others' checkpoints",
            *([name] if with_owner else []),
            *_cells(used),
        ]
        for run, name, used in period.by_run(limit=ROWS)
    ]
    return {"headers": _headers("Run", *(["User"] if with_owner else [])), "rows": rows}


def _quota(owner_id: int) -> Context | None:
    """This person's tokens of today, and the limit."""
    limit: int = settings.USER_TOKENS_PER_DAY
    if not limit:
        return None
    used = tokens_used(owner_id, today())
    return {
        "percent": min(100, round(100 * used / limit)),
        "title": f"You today (UTC): {used:,} of {limit:,} tokens",
    }


def has_price() -> bool:
    """Whether the operator has set the price of a worker's hour."""
    return bool(settings.WORKER_HOUR_CENTS)


def hours(seconds: float) -> str:
    """Worker time, in the unit that suits it."""
    if seconds >= 3600:
        return f"{seconds / 3600:,.1f} h"
    return f"{seconds / 60:.1f} min" if seconds >= 60 else f"{seconds:.1f} s"


def cost(seconds: float) -> str:
    """The price of this worker time."""
    return f"${seconds / 3600 * settings.WORKER_HOUR_CENTS / 100:,.2f}"


def _csv(period: Period) -> HttpResponse:
    """A line for each day, user, run and kind of work."""
    response = HttpResponse(content_type="text/csv; charset=utf-8")
    response["Content-Disposition"] = f'attachment; filename="usage-{period.first}.csv"'
    writer = csv.writer(response)
    writer.writerow(["day", "user", "run", "work", "requests", "tokens", "worker_seconds"])
    writer.writerows(period.lines())
    return response
