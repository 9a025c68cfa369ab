"""Copies of the user's own or another user's checkpoints.

A copy needs a run to belong to. That run never had an adapter: it is deleted from the start,
so that only its checkpoint can be used.
"""

from __future__ import annotations

import hashlib
from datetime import timedelta

from django.contrib.auth import get_user_model
from django.db import IntegrityError, transaction
from django.utils import timezone

from training.audit import audit_checkpoint
from training.errors import CheckpointNotFound, InvalidRequest, StorageQuotaExceeded
from training.models import Checkpoint, Run, Session, new_session_id
from training.paths import TinkerPath
from training.selectors import checkpoint_get
from training.services.sessions import session_open
from training.storage.chosen import storage
from training.storage.interface import CHECKPOINTS, new_name
from training.storage_quota import storage_check

COPY_CLIENT = "copy"
"""The client version of a session that exists for one copy."""


def checkpoint_copy(
    *,
    owner_id: int,
    source: TinkerPath,
    lender_id: int | None = None,
    session_id: str | None = None,
    model_seq_id: int | None = None,
    project_id: str = "",
    ttl_seconds: int | None = None,
    idempotency_key: str | None = None,
) -> TinkerPath:
    """Copy a checkpoint that the owner may read; return the copy's path.

    Files are hard-linked if the disk supports it, because they never change. The copy expires
    after ``ttl_seconds``, independently of the source. It becomes the model ``model_seq_id``
    of the session, or the only model of a new session in the project; a repeat for the same
    model, or with the same idempotency key, returns the first copy.

    Raises:
        CheckpointNotFound, SessionNotFound: (404)
        InvalidRequest: One of session id and number is missing, or the number is taken. (400)
        StorageQuotaExceeded: The owner's storage limit is reached. (413)
    """
    if (session_id is None) != (model_seq_id is None):
        raise InvalidRequest("session_id, model_seq_id: give both of them or none")
    if session_id is not None:
        session_open(owner_id=owner_id, session_id=session_id)
    else:
        session_id = _session_id(owner_id, idempotency_key)
    run_id = f"{session_id}:train:{model_seq_id or 0}"
    if path := _made_before(owner_id, run_id, source):
        return path
    original = checkpoint_get(owner_id=owner_id, path=source, lender_id=lender_id, with_files=True)
    directory = new_name(CHECKPOINTS)
    try:
        storage().copy(original.directory, directory)
    except CheckpointNotFound as error:
        raise CheckpointNotFound("source_path: it was deleted while it was copied") from error
    try:
        with transaction.atomic():
            session, _ = Session.objects.get_or_create(
                id=session_id,
                owner_id=owner_id,
                defaults={"sdk_version": COPY_CLIENT, "project_id": project_id},
            )
            # One copy at a time per owner, so that concurrent ones do not exceed the quota.
            get_user_model().objects.select_for_update(no_key=True).get(pk=owner_id)
            storage_check(owner_id=owner_id, more_bytes=original.size_bytes)
            audit_checkpoint("copy", original, actor_id=owner_id)
            checkpoint = _rows(
                original, str(source), session, run_id, model_seq_id or 0, directory, ttl_seconds
            )
    except StorageQuotaExceeded:
        storage().delete(directory)
        raise
    except IntegrityError:  # the same request, at the same time
        storage().delete(directory)
        if path := _made_before(owner_id, run_id, source):
            return path
        raise
    return checkpoint.path


def _session_id(owner_id: int, idempotency_key: str | None) -> str:
    """A new session's id, the same one for the same key."""
    if idempotency_key is None:
        return new_session_id()
    return hashlib.sha256(f"copy:{owner_id}:{idempotency_key}".encode()).hexdigest()[:32]


def _made_before(owner_id: int, run_id: str, source: TinkerPath) -> TinkerPath | None:
    run = Run.objects.owned_by(owner_id).filter(id=run_id).first()
    if run is None:
        return None
    if run.user_metadata.get("copy_of") != str(source):
        raise InvalidRequest(f"model_seq_id: the session has another model under it, {run_id}")
    return TinkerPath(run.name, source.kind, source.name)


def _rows(
    original: Checkpoint,
    copy_of: str,
    session: Session,
    run_id: str,
    model_seq_id: int,
    directory: str,
    ttl_seconds: int | None,
) -> Checkpoint:
    now, of = timezone.now(), original.run
    run = Run.objects.create(
        id=run_id,
        name=run_id,
        owner_id=session.owner_id,
        session=session,
        model_seq_id=model_seq_id,
        base_model=of.base_model,
        rank=of.rank,
        alpha=of.alpha,
        seed=of.seed,
        train_mlp=of.train_mlp,
        train_attn=of.train_attn,
        train_unembed=of.train_unembed,
        target_modules=of.target_modules,
        share_across_experts=of.share_across_experts,
        state=Run.RunState.DELETED,
        deleted_at=now,
        step=original.step,
        user_metadata={"copy_of": copy_of},
    )
    return Checkpoint.objects.create(
        run=run,
        owner_id=run.owner_id,
        path_run=run.name,
        kind=original.kind,
        name=original.name,
        seq_id=0,
        step=original.step,
        directory=directory,
        size_bytes=original.size_bytes,
        user_metadata=original.user_metadata,
        created_at=now,
        expires_at=None if ttl_seconds is None else now + timedelta(seconds=ttl_seconds),
    )
