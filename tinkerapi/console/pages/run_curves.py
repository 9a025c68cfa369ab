"""The numbers of a run's curves: as JSON for its page, as CSV and JSON lines for downloads."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

from django.http import HttpRequest, HttpResponse, JsonResponse

from tinkerapi.console.kit.curve_charts import chart_groups
from tinkerapi.console.kit.display import page_url
from tinkerapi.console.kit.parameters import number_of
from tinkerapi.console.pages.run_status import run_status
from training.curves import (
    COLUMNS,
    client_curves,
    client_metric_names,
    client_metric_steps,
    run_curves,
    run_steps,
    sampled_curves,
)
from training.models import Run
from training.overview import checkpoints_listed

MAX_MARKS = 200
"""Checkpoints that are marked in the curves."""
LATE_STEPS = 5
"""A client may still add metrics to this many of the newest steps."""


def curves_json(request: HttpRequest, run: Run) -> JsonResponse:
    """The curves, or what came since an earlier answer: ``after`` is its last seq id, ``metrics``
    and ``sampled`` are its last steps. With ``until`` only a part of the steps, in more detail."""
    after, until = number_of(request, "after") or 0, number_of(request, "until")
    curves = run_curves(run, after=after, until=until)
    if until is not None:
        return JsonResponse({"own": asdict(curves)})
    return JsonResponse(
        {
            "own": asdict(curves),
            "client": client_curves(
                run, from_step=max(0, (number_of(request, "metrics") or 0) - LATE_STEPS)
            ),
            "sampled": sampled_curves(run, from_step=number_of(request, "sampled") or 0),
            "groups": [] if after else [g.as_json() for g in chart_groups(curves.loss_fns)],
            "checkpoints": [
                {
                    "step": checkpoint.step,
                    "name": checkpoint.name,
                    "kind": checkpoint.kind,
                    "url": page_url(checkpoint),
                }
                for checkpoint in checkpoints_listed(run, limit=MAX_MARKS)
            ],
            "status": run_status(run),
        }
    )


def curves_csv(run: Run) -> HttpResponse:
    """All steps, one a line, with the client's metrics in columns ``client/<name>``."""
    names = client_metric_names(run)
    header = ["step", "time", "tokens", *COLUMNS, *(f"client/{name}" for name in names)]

    def lines() -> Iterator[str]:
        writer = csv.writer(_Echo())
        yield writer.writerow(header)
        for row in _rows(run):
            own = [row.get(name) for name in ("step", "time", "tokens", *COLUMNS)]
            metrics = row.get("metrics", {})
            yield writer.writerow([*own, *(metrics.get(name) for name in names)])

    return _download(lines(), "text/csv", f"{run.name}.csv")


def curves_jsonl(run: Run) -> HttpResponse:
    """All steps, one JSON object a line, with the client's ``metrics``."""
    lines = (f"{json.dumps(row)}\n" for row in _rows(run))
    return _download(lines, "application/jsonl", f"{run.name}.jsonl")


class _Echo:
    """A file for csv's writer that returns each line instead of keeping it."""

    def write(self, line: str) -> str:
        return line


def _rows(run: Run) -> Iterator[dict[str, Any]]:
    """Own steps and client metrics, joined by step, in the order of the steps."""
    metrics = client_metric_steps(run)
    waiting = next(metrics, None)
    for own in run_steps(run):
        while waiting is not None and waiting[0] < own["step"]:
            yield {"step": waiting[0], "time": _iso(waiting[1]), "metrics": waiting[2]}
            waiting = next(metrics, None)
        row = {**own, "time": _iso(own["time"])}
        if waiting is not None and waiting[0] == own["step"]:
            row["metrics"] = waiting[2]
            waiting = next(metrics, None)
        yield row
    while waiting is not None:
        yield {"step": waiting[0], "time": _iso(waiting[1]), "metrics": waiting[2]}
        waiting = next(metrics, None)


def _iso(seconds: float | None) -> str | None:
    return None if seconds is None else datetime.fromtimestamp(seconds, UTC).isoformat()


def _download(lines: Iterator[str], content_type: str, name: str) -> HttpResponse:
    safe = re.sub(r"[^A-Za-z0-9._-]", "-", name)
    headers = {"Content-Disposition": f'attachment; filename="{safe}"'}
    return HttpResponse(lines, content_type=content_type, headers=headers)


def curves_export(request: HttpRequest, run: Run) -> HttpResponse:
    """The download in the format that the address asks for."""
    export = curves_jsonl if request.GET.get("format") == "jsonl" else curves_csv
    return export(run)
