"""Save, load, delete and expire checkpoints."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

from django.conf import settings
from django.utils import timezone

from training.errors import InvalidRequest
from training.kinds import Kind
from training.models import Checkpoint
from training.paths import TinkerPath, check_name
from training.selectors import checkpoint_get, run_get
from training.services.runs import run_lora_config
from training.services.submission import Submission, submit_in_lane


def save_weights_submit(
    *,
    owner_id: int,
    model_id: str,
    name: str,
    kind: Literal["training", "sampler"],
    overwrite: bool = False,
    ttl_seconds: int | None = None,
    user_metadata: Mapping[str, str] | None = None,
    seq_id: int | None = None,
    idempotency_key: str | None = None,
) -> Submission:
    """Ask for a checkpoint under a name; it holds the run as it is when its turn comes.

    Raises:
        InvalidRequest: The name may not stand in a path. (400)
        RunNotFound: (404)
    """
    run = run_get(owner_id=owner_id, model_id=model_id)
    payload = {
        "name": check_name(name, field="name"),
        "kind": kind,
        "overwrite": overwrite,
        "ttl_seconds": ttl_seconds,
        "user_metadata": dict(user_metadata or {}),
    }
    return submit_in_lane(
        run,
        Kind.SAVE_WEIGHTS,
        payload,
        summary={"path": str(TinkerPath(run.name, kind, name))},
        seq_id=seq_id,
        idempotency_key=idempotency_key,
    )


def load_weights_submit(
    *,
    owner_id: int,
    model_id: str,
    path: str,
    optimizer: bool = True,
    seq_id: int | None = None,
    idempotency_key: str | None = None,
) -> Submission:
    """Ask that an existing run become what a checkpoint of the owner holds.

    Args:
        optimizer: False loads the weights and starts the optimizer anew.

    Raises:
        RunNotFound, CheckpointNotFound: (404)
        InvalidRequest: The checkpoint is of another base model, or has no optimizer state
            and it was asked for. (400)
    """
    run = run_get(owner_id=owner_id, model_id=model_id)
    parsed = TinkerPath.parse(path)
    checkpoint = checkpoint_get(owner_id=owner_id, path=parsed)
    if checkpoint.run.base_model != run.base_model:
        raise InvalidRequest(
            f"path: {parsed} is of base model {checkpoint.run.base_model}, "
            f"but {model_id!r} trains {run.base_model}"
        )
    if run_lora_config(checkpoint.run) != replace(run_lora_config(run), seed=checkpoint.run.seed):
        raise InvalidRequest(
            f"path: {parsed} holds an adapter of rank {checkpoint.run.rank} and alpha "
            f"{checkpoint.run.alpha:g}; {model_id!r} must be made with the same rank, alpha and "
            "modules to load it"
        )
    if optimizer and checkpoint.kind != Checkpoint.Kind.TRAINING:
        raise InvalidRequest(
            f"optimizer: {parsed} holds no optimizer state; load a .../weights/... path "
            "or send optimizer: false"
        )
    return submit_in_lane(
        run,
        Kind.LOAD_WEIGHTS,
        {"checkpoint": checkpoint.pk, "path": str(parsed), "optimizer": optimizer},
        summary={"path": str(parsed)},
        seq_id=seq_id,
        idempotency_key=idempotency_key,
    )


def checkpoint_delete(*, checkpoint_id: int) -> None:
    """Delete a checkpoint: the row first, so that nobody finds it, then its files.

    A crash in between leaves files that no row names, never a row without files.
    """
    checkpoint = Checkpoint.objects.filter(pk=checkpoint_id).first()
    if checkpoint is None:
        return
    checkpoint.delete()
    shutil.rmtree(settings.DATA_DIR / checkpoint.directory, ignore_errors=True)


def checkpoints_expire() -> int:
    """Delete the checkpoints whose time is up; say how many. The worker calls it when idle."""
    expired = list(
        Checkpoint.objects.filter(expires_at__lte=timezone.now()).values_list("pk", flat=True)
    )
    for checkpoint_id in expired:
        checkpoint_delete(checkpoint_id=checkpoint_id)
    return len(expired)
