"""The parts of a run's page that are read from other rows: curves and tables."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from django.template.defaultfilters import filesizeformat

from futures.models import Future
from futures.overview import lane_newest
from tinkerapi.console.kit.charts import line_chart
from tinkerapi.console.kit.display import duration, link, list_link, moment, one_line, state_label
from tinkerapi.console.pages.futures import summary_text
from training.models import Checkpoint, Run, Snapshot
from training.overview import checkpoints_newest, snapshots_newest
from training.progress import MAX_REQUESTS, Progress

NEWEST_ROWS = 10
"""Rows in each table on a run's page."""


def progress_charts(progress: Progress) -> list[dict[str, Any]]:
    """Title, last value and data of the curves that have any value."""
    steps = [point.step for point in progress.points]
    curves = {
        "Loss": ("nats per token", [point.loss for point in progress.points]),
        "Gradient norm": ("before clipping", [point.grad_norm for point in progress.points]),
    }
    extent = (
        "each step"
        if progress.steps_per_point == 1
        else (f"means of {progress.steps_per_point} steps")
    )
    if not progress.is_whole:
        extent += f", newest {MAX_REQUESTS:,} requests"
    return [
        {
            "title": title,
            "note": f"{note}, {extent}",
            "last": f"{last:.4g}",
            "data": line_chart(steps, values, name=title),
        }
        for title, (note, values) in curves.items()
        if (last := next((value for value in reversed(values) if value is not None), None))
        is not None
    ]


def run_tables(run: Run) -> list[dict[str, Any]]:
    """The newest requests, checkpoints and snapshots of a run, as unfold's tables."""
    return [
        {
            "title": "Newest requests",
            "more": list_link(Future, "all", lane__id__exact=run.pk),
            "table": {
                "headers": ["Number", "Kind", "State", "Summary", "Submitted"],
                "rows": [
                    [
                        link(future, str(future.seq_id)),
                        future.kind,
                        state_label(future.state),
                        one_line(summary_text(future)),
                        moment(future.created_at),
                    ]
                    for future in lane_newest(run.pk, limit=NEWEST_ROWS)
                ],
            },
        },
        {
            "title": "Checkpoints",
            "more": list_link(Checkpoint, "all", run__id__exact=run.pk),
            "table": {
                "headers": ["Name", "Kind", "Step", "Size", "Saved"],
                "rows": [
                    [
                        link(checkpoint, checkpoint.name),
                        checkpoint.kind,
                        checkpoint.step,
                        filesizeformat(checkpoint.size_bytes),
                        moment(checkpoint.created_at),
                    ]
                    for checkpoint in checkpoints_newest(run, limit=NEWEST_ROWS)
                ],
            },
        },
        {
            "title": "Snapshots",
            "more": list_link(Snapshot, "all", run__id__exact=run.pk),
            "table": {
                "headers": ["Up to request", "Step", "Size", "Written in", "Taken"],
                "rows": [
                    [
                        link(snapshot, str(snapshot.seq_id)),
                        snapshot.step,
                        filesizeformat(snapshot.size_bytes),
                        duration(timedelta(seconds=snapshot.write_seconds)),
                        moment(snapshot.created_at),
                    ]
                    for snapshot in snapshots_newest(run, limit=NEWEST_ROWS)
                ],
            },
        },
    ]


def short_loss(run: Run) -> str | None:
    """The last loss of a run that was read by ``with_progress``."""
    try:
        return f"{float(getattr(run, 'last_loss', None) or ''):.4f}"
    except ValueError:
        return None
