"""The tabs of a run's page: which there are, and what each reads. Only the chosen one is read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from django.http import HttpRequest

from tinkerapi.console.kit.display import page_url, state_label, tab_url
from tinkerapi.console.kit.preview import value_preview
from tinkerapi.console.pages.rollouts import rollouts_tab
from tinkerapi.console.pages.run_data import data_tab
from tinkerapi.console.pages.run_sections import (
    checkpoints_table,
    lineage_tables,
    requests_table,
    snapshots_table,
)
from tinkerapi.console.pages.run_status import OWN_OBJECTIVE, run_status
from training.models import Run

Context = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Tab:
    """One part of a run's page."""

    title: str
    template: str = ""
    has_form: bool = False
    """Whether it shows the run's fields."""
    context: Callable[[HttpRequest, Run], Context] = lambda request, run: {}


def _overview(request: HttpRequest, run: Run) -> Context:
    tags = [state_label(tag) for part in run.tags.split(",") if (tag := part.strip())]
    return {
        "status": run_status(run),
        "tags": tags,
        "objective": OWN_OBJECTIVE if run.own_objective else "",
        "curves_url": page_url(run, "curves/"),
        "export_url": page_url(run, "export/"),
    }


def _checkpoints(request: HttpRequest, run: Run) -> Context:
    return {"tables": [checkpoints_table(run), snapshots_table(run)]}


def _requests(request: HttpRequest, run: Run) -> Context:
    return {"tables": [requests_table(run)]}


def _settings(request: HttpRequest, run: Run) -> Context:
    return {"metadata": value_preview(run.user_metadata) if run.user_metadata else ""}


def _lineage(request: HttpRequest, run: Run) -> Context:
    return {"tables": lineage_tables(run)}


_FOLDER = "admin/training/run"
TABS: Mapping[str, Tab] = {
    "overview": Tab(title="Overview", template=f"{_FOLDER}/overview.html", context=_overview),
    "rollouts": Tab(title="Rollouts", template=f"{_FOLDER}/rollouts.html", context=rollouts_tab),
    "data": Tab(title="Data", template=f"{_FOLDER}/data.html", context=data_tab),
    "checkpoints": Tab(
        title="Checkpoints", template=f"{_FOLDER}/sections.html", context=_checkpoints
    ),
    "requests": Tab(title="Requests", template=f"{_FOLDER}/sections.html", context=_requests),
    "settings": Tab(
        title="Settings", template=f"{_FOLDER}/sections.html", has_form=True, context=_settings
    ),
    "lineage": Tab(title="Lineage", template=f"{_FOLDER}/sections.html", context=_lineage),
}


def tab_context(request: HttpRequest, run: Run) -> Context:
    """The tabs, and what the chosen one shows; an unknown name chooses the overview."""
    name = request.GET.get("tab", "overview")
    chosen = name if name in TABS else "overview"
    tabs = [
        {"title": tab.title, "url": tab_url(run, key), "is_current": key == chosen}
        for key, tab in TABS.items()
    ]
    return {"tabs": tabs, "tab": TABS[chosen], **TABS[chosen].context(request, run)}
