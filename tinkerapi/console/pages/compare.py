"""Some runs beside each other: their curves in the same charts, and the settings that differ."""

from __future__ import annotations

from typing import Any

from django.contrib.admin.sites import AdminSite
from django.db.models import QuerySet
from django.http import HttpRequest, HttpResponse
from django.template.response import TemplateResponse
from django.urls import reverse
from django.utils.http import urlencode

from tinkerapi.console.kit.display import link, page_url, state_label
from training.activity import activity
from training.models import Run

MAX_RUNS = 10
ADDRESS = "admin:training_run_compare"


def compare_url(run_ids: list[str]) -> str:
    """The address of the page for these runs."""
    return f"{reverse(ADDRESS)}?{urlencode({'run': run_ids}, doseq=True)}"


def compare_page(request: HttpRequest, site: AdminSite, runs: QuerySet[Run]) -> HttpResponse:
    """The page of the runs that the address names.

    Args:
        runs: Those that this person may see, with their activity.
    """
    asked = request.GET.getlist("run")[:MAX_RUNS]
    found = {run.pk: run for run in runs.filter(pk__in=[id_ for id_ in asked if "\0" not in id_])}
    chosen = [found[run_id] for run_id in dict.fromkeys(asked) if run_id in found]
    context = {
        **site.each_context(request),
        "title": "Compare runs",
        "runs": [
            {
                "name": run.shown_title,
                "link": link(run, run.shown_title),
                "state": state_label(activity(run)),
                "curves_url": page_url(run, "curves/"),
            }
            for run in chosen
        ],
        "rows": setting_rows(chosen),
        "max_runs": MAX_RUNS,
    }
    return TemplateResponse(request, "admin/training/run/compare.html", context)


def setting_rows(runs: list[Run]) -> list[dict[str, Any]]:
    """Settings and totals of the runs, those first that differ."""
    tables = [_settings(run) for run in runs]
    names = dict.fromkeys(name for table in tables for name in table)
    rows = [
        {"name": name, "values": values, "differs": len(set(values)) > 1}
        for name in names
        if any(values := [table.get(name, "") for table in tables])
    ]
    return sorted(rows, key=lambda row: not row["differs"])


def _settings(run: Any) -> dict[str, str]:
    """Name to value, as text."""
    parts = {"attn": run.train_attn, "mlp": run.train_mlp, "unembed": run.train_unembed}
    trains = run.target_modules or [name for name, is_trained in parts.items() if is_trained]
    own = {
        "Base model": run.base_model,
        "Rank": str(run.rank),
        "Alpha": f"{run.alpha:g}",
        "Seed": str(run.seed),
        "Trains": ", ".join(trains),
        "Steps": f"{run.step:,}",
        "Trained tokens": f"{run.tokens:,}",
        "Tags": run.tags,
        "Notes": run.notes,
    }
    sources = [run.user_metadata, run.session.user_metadata if run.session else {}]
    metadata = {
        f"metadata.{name}"[:120]: str(value)[:200]
        for source in reversed(sources)
        if isinstance(source, dict)
        for name, value in source.items()
    }
    return {**own, **metadata}
