"""Imports: an adapter that peft trained elsewhere becomes a checkpoint.

The files are kept as a checkpoint without a path until the worker, which knows the base model, has
read them. As with a copy, the checkpoint needs a run to belong to. That run is removed from the
start: it is made from the files, saved and dropped, three requests in its lane.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from functools import partial
from pathlib import Path

from django.conf import settings
from django.contrib.auth import get_user_model
from django.db import transaction
from django.utils import timezone

from futures.errors import IdempotencyKeyReused
from futures.services import lane_create
from training.atomic_directory import new_directory
from training.audit import audit_record
from training.base_models import ServedBaseModel, base_model_get
from training.errors import LimitExceeded
from training.kinds import CreateRun, SaveWeights
from training.models import Checkpoint, Run
from training.paths import TinkerPath, check_name, check_run_name
from training.peft_import.config import CONFIG_NAME
from training.peft_import.files import WEIGHTS_NAME, PeftFiles, read_peft_files
from training.services.removal import submit_removal
from training.services.submission import Submission, run_repeated, run_target, submit
from training.storage.chosen import storage
from training.storage.interface import CHECKPOINTS, new_name
from training.storage_quota import storage_check

IMPORTED = "imported"
"""The checkpoint's name if the client gives none."""

UPLOAD_NAME = "~upload"
"""The name of the checkpoint that holds the files; no client can request it."""


def adapter_import_submit(
    *,
    owner_id: int,
    write_files: Callable[[Path], None],
    base_model: str | None = None,
    model_id: str | None = None,
    name: str = IMPORTED,
    overwrite: bool = False,
    actor_id: int | None = None,
    idempotency_key: str | None = None,
) -> Submission:
    """Submit the import of an adapter as ``tinker://<model_id>/weights/<name>``.

    The checkpoint has the adapter's function, step 0 and no moments. The returned future is that of
    its save. A repeat with the same key returns the first one's future.

    Args:
        write_files: Writes ``adapter_config.json`` and ``adapter_model.safetensors`` into a folder.
        model_id: The name of the checkpoint's model; None lets the server choose. No model of this
            name is made, and one that exists is not touched.
        actor_id: The user who asked for it; None for somebody at the console.

    Raises:
        InvalidRequest: The files are not those of an adapter that is computed here. (400)
        BaseModelNotFound: (404)
        StorageQuotaExceeded: The owner's storage limit is reached. (413)
        LimitExceeded: Its rank is higher than this server allows. (400)
        IdempotencyKeyReused: The key names another request. (409)
        StorageFull, StorageFailed: The files cannot be kept. (500)
    """
    check_name(name, field="name")
    if model_id is not None:
        check_run_name(model_id, field="model_id")
    served = base_model_get(base_model)
    directory = new_name(CHECKPOINTS)
    files, sha256, size_bytes = storage().write(directory, partial(_take, write_files))
    save = SaveWeights(
        checkpoint_kind="training",
        name=name,
        overwrite=overwrite,
        user_metadata={"imported_from": files.config.base_model, "sha256": sha256},
    )
    is_kept = False
    try:
        with transaction.atomic():
            # One at a time per owner: concurrent ones do not exceed the quota.
            get_user_model().objects.select_for_update(no_key=True).get(pk=owner_id)
            if first := run_repeated(owner_id, idempotency_key):
                if model_id not in (None, first.name) or first.base_model != served.name:
                    raise IdempotencyKeyReused
                return submit(save, run_target(first), idempotency_key=idempotency_key)
            storage_check(owner_id=owner_id, more_bytes=size_bytes)
            run = _run_create(owner_id, served, model_id, files)
            upload = _upload_create(run, directory, size_bytes)
            audit_record(
                "checkpoint_import",
                actor_id=actor_id,
                owner_id=owner_id,
                tinker_path=str(TinkerPath(run.name, save.checkpoint_kind, name)),
                sha256=sha256,
            )
            submission = _submit(run, files, upload, save, idempotency_key)
        is_kept = True
        return submission
    finally:
        if not is_kept:
            storage().delete(directory)


def _take(write_files: Callable[[Path], None], target: Path) -> tuple[PeftFiles, str, int]:
    """Make the folder of an adapter that may be imported.

    Returns:
        What its files say, their SHA-256 and their bytes.
    """
    with new_directory(target) as temporary:
        write_files(temporary)
        files = read_peft_files(temporary)
        rank = files.lora_config.rank
        if rank > settings.MAX_LORA_RANK:
            raise LimitExceeded(
                f"{CONFIG_NAME}: r: {rank} is too large; this server takes up to "
                f"{settings.MAX_LORA_RANK}"
            )
        sha256 = files.sha256()
        size_bytes = sum((temporary / part).stat().st_size for part in (CONFIG_NAME, WEIGHTS_NAME))
    return files, sha256, size_bytes


def _run_create(
    owner_id: int, served: ServedBaseModel, model_id: str | None, files: PeftFiles
) -> Run:
    """The run that the checkpoint belongs to, removed from the start."""
    config, now = files.lora_config, timezone.now()
    run = Run.objects.create(
        owner_id=owner_id,
        name=model_id or f"import_{secrets.token_hex(8)}",
        base_model=served.name,
        rank=config.rank,
        alpha=config.alpha,
        seed=config.seed,
        target_modules=config.target_modules,
        share_across_experts=config.share_across_experts,
        state=Run.RunState.DELETED,
        deleted_at=now,
        user_metadata={"imported_from": files.config.base_model},
    )
    lane_create(lane_id=run.id, owner_id=owner_id, queue=served.queue)
    return run


def _upload_create(run: Run, directory: str, size_bytes: int) -> Checkpoint:
    return Checkpoint.objects.create(
        run=run,
        owner_id=run.owner_id,
        path_run=run.name,
        kind=Checkpoint.Kind.EXTERNAL,
        ephemeral=True,
        name=UPLOAD_NAME,
        seq_id=0,
        step=0,
        directory=directory,
        size_bytes=size_bytes,
    )


def _submit(
    run: Run, files: PeftFiles, upload: Checkpoint, save: SaveWeights, idempotency_key: str | None
) -> Submission:
    creation = CreateRun(model_id=run.name, lora_config=files.lora_config, upload=upload.pk)
    submit(creation, run_target(run))
    path = TinkerPath(run.name, save.checkpoint_kind, save.name or "")
    saving = submit(
        save, run_target(run), summary={"path": str(path)}, idempotency_key=idempotency_key
    )
    submit_removal(run)
    return saving
