"""Runs, checkpoints and sessions in the form of the SDK's lists."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from django.utils import timezone

from tinkerapi.api.renderers import timestamp, to_json
from training.listings import ACTIVE, Page
from training.models import Checkpoint, Run, Session

Json = dict[str, Any]


def user_urn(username: str) -> str:
    """A user's URN in the SDK's form, also used in tokens."""
    return f"tml:user:{username}"


def texts(metadata: Mapping[str, Any]) -> dict[str, str]:
    """Metadata in the SDK's form: every value is a text, others are converted to JSON text."""
    return {
        name: value if isinstance(value, str) else to_json(value).decode()
        for name, value in metadata.items()
    }


def checkpoint_description(checkpoint: Checkpoint) -> Json:
    path = checkpoint.path
    return {
        "checkpoint_id": path.checkpoint_id,
        "checkpoint_type": checkpoint.kind,
        "time": timestamp(checkpoint.created_at),
        "tinker_path": str(path),
        "size_bytes": checkpoint.size_bytes,
        "public": checkpoint.public,
        "user_metadata": texts(checkpoint.user_metadata),
        "expires_at": timestamp(checkpoint.expires_at),
    }


def published_description(checkpoint: Checkpoint) -> Json:
    """The path of a checkpoint for its owner and, if it is public, for everybody; for the
    quick reference's clients, whose model names are not unique among users."""
    return {
        "public": checkpoint.public,
        "tinker_path": str(checkpoint.path),
        "global_path": str(checkpoint.global_path),
    }


def run_description(run: Any, newest: Mapping[tuple[str, str], Checkpoint]) -> Json:
    """A run that was read by ``training.listings``, with its newest checkpoints."""
    training = newest.get((run.id, Checkpoint.Kind.TRAINING))
    sampler = newest.get((run.id, Checkpoint.Kind.SAMPLER))
    return {
        "training_run_id": run.name,
        "base_model": run.base_model,
        "model_owner": run.owner.get_username(),
        "is_lora": True,
        "lora_rank": run.rank,
        "corrupted": run.state == Run.RunState.FAILED,
        "last_request_time": timestamp(run.newest_request_at),
        "last_checkpoint": training and checkpoint_description(training),
        "last_sampler_checkpoint": sampler and checkpoint_description(sampler),
        "user_metadata": texts(run.user_metadata),
    }


def cursor_description(page: Page) -> Json:
    return {"offset": page.offset, "limit": page.limit, "total_count": page.total_count}


def session_description(session: Any) -> Json:
    """A session that ``session_search`` found."""
    return {
        "session_id": session.id,
        "created_at": timestamp(session.created_at),
        "owner": user_urn(session.owner.get_username()),
        "project_id": session.project_id,
        "status": _status(session),
        "checkpoints_count": session.checkpoints_count,
        "checkpoint_storage_bytes": session.checkpoint_bytes or 0,
        "display_name": session.display_name or None,
        "user_metadata": texts(session.user_metadata),
    }


def _status(session: Session) -> Json | None:
    """None: its heartbeats ended without a reason."""
    if session.finished_at is not None:
        return {
            "type": "client_finished",
            "reason": {"type": session.finish_reason},
            "detail": session.finish_detail or None,
        }
    lives = session.heartbeat_at > timezone.now() - ACTIVE
    return {"type": "active"} if lives else None
