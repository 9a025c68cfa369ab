"""The tables on a run's page: its requests, its checkpoints, its snapshots, its relatives."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from django.template.defaultfilters import filesizeformat

from futures.models import Future
from futures.overview import lane_newest
from tinkerapi.console.kit.display import (
    copyable,
    duration,
    link,
    list_link,
    moment,
    one_line,
    state_label,
)
from tinkerapi.console.pages.futures import summary_text
from training.lineage import Loaded, run_children, run_loads, run_replays
from training.models import Checkpoint, Run, Snapshot
from training.overview import checkpoints_listed, snapshots_newest
from training.services.replays import FORKED_STEP

NEWEST_ROWS = 50
"""Rows in each table."""
HEADERS = ["How", "Run", "Checkpoint", "When"]
"""Of the tables of relatives."""


def requests_table(run: Run) -> dict[str, Any]:
    """The newest requests of a run."""
    return {
        "title": "Newest requests",
        "more": list_link(Future, "all", lane__id__exact=run.pk),
        "empty": "No request yet.",
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
    }


def checkpoints_table(run: Run) -> dict[str, Any]:
    """The checkpoints of a run, without those of sampling sessions."""
    return {
        "title": "Checkpoints",
        "more": list_link(Checkpoint, "all", run__id__exact=run.pk),
        "empty": "None is saved. save_state and save_weights_for_sampler make them.",
        "table": {
            "headers": ["Name", "Kind", "Step", "Path", "Size", "Saved", "Expires"],
            "rows": [
                [
                    link(checkpoint, checkpoint.name),
                    checkpoint.kind,
                    f"{checkpoint.step:,}",
                    copyable(str(checkpoint.path)),
                    filesizeformat(checkpoint.size_bytes),
                    moment(checkpoint.created_at),
                    moment(checkpoint.expires_at) or "never",
                ]
                for checkpoint in checkpoints_listed(run, limit=NEWEST_ROWS)
            ],
        },
    }


def snapshots_table(run: Run) -> dict[str, Any]:
    """The snapshots from which the server rebuilds the run after a crash."""
    return {
        "title": "Snapshots",
        "more": list_link(Snapshot, "all", run__id__exact=run.pk),
        "empty": "None yet: the run would be rebuilt from its requests.",
        "table": {
            "headers": ["Up to request", "Step", "Size", "Written in", "Taken"],
            "rows": [
                [
                    link(snapshot, str(snapshot.seq_id)),
                    f"{snapshot.step:,}",
                    filesizeformat(snapshot.size_bytes),
                    duration(timedelta(seconds=snapshot.write_seconds)),
                    moment(snapshot.created_at),
                ]
                for snapshot in snapshots_newest(run, limit=NEWEST_ROWS)
            ],
        },
    }


def lineage_tables(run: Run) -> list[dict[str, Any]]:
    """Where the run's weights come from, and which runs took theirs from it."""
    return [
        {
            "title": "From",
            "empty": "It began with new weights.",
            "table": {
                "headers": HEADERS,
                "rows": [
                    *([[_how(run, "of"), link(run.replay_of), "", ""]] if run.replay_of else []),
                    *(_loaded_row(loaded, loaded.source) for loaded in run_loads(run)),
                ],
            },
        },
        {
            "title": "Runs that began from this one",
            "empty": "None.",
            "table": {
                "headers": HEADERS,
                "rows": [
                    *(_loaded_row(loaded, loaded.run) for loaded in run_children(run)),
                    *(
                        [_how(replay), link(replay, str(replay)), "", moment(replay.created_at)]
                        for replay in run_replays(run)
                    ),
                ],
            },
        },
    ]


def _how(replay: Run, more: str = "") -> str:
    """How a run repeats another's log, in words."""
    step = replay.user_metadata.get(FORKED_STEP)
    return " ".join(filter(None, ("replay" if step is None else f"fork at step {step}", more)))


def _loaded_row(loaded: Loaded, run: Run | None) -> list[Any]:
    return [
        "loaded",
        link(run, run.shown_title) if run else "another user's, or removed",
        copyable(loaded.path),
        moment(loaded.at),
    ]


def last_result(run: Run) -> str | None:
    """The last reward of a run that was read by ``with_progress``, else its last loss."""
    reward = _short(getattr(run, "last_reward", None))
    if reward is not None:
        return f"reward {reward}"
    loss, loss_fn = _short(getattr(run, "last_loss", None)), getattr(run, "last_loss_fn", None)
    return loss if loss is None or not loss_fn else f"{loss} ({loss_fn})"


def _short(number: str | None) -> str | None:
    """A number of the database in four digits; None if there is none."""
    try:
        return f"{float(number or ''):.4g}"
    except ValueError:
        return None
