"""Save checkpoints and load them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from django.db import IntegrityError, transaction

from futures.database import violated_constraint
from training.age import check_recipients
from training.audit import audit_checkpoint
from training.errors import CheckpointExists, InvalidRequest
from training.kinds import CreateRun, LoadWeights, SaveWeights
from training.models import Checkpoint
from training.paths import TinkerPath, check_name
from training.selectors import checkpoint_at, checkpoint_get, run_get
from training.services.runs import run_lora_config
from training.services.sessions import CREATION_SEQ_ID, session_run_create
from training.services.submission import Submission, run_asked, run_target, submit
from training.storage.chosen import storage
from training.storage_quota import storage_check

ONE_OF_A_PATH = ("checkpoint_path_means_one", "checkpoint_run_kind_name")
"""The constraints that make paths unique."""


def save_weights_submit(
    *,
    owner_id: int,
    model_id: str,
    name: str,
    kind: Literal["training", "sampler", "external"],
    overwrite: bool = False,
    ttl_seconds: int | None = None,
    user_metadata: Mapping[str, str] | None = None,
    recipients: Sequence[str] = (),
    seq_id: int | None = None,
    idempotency_key: str | None = None,
) -> Submission:
    """Submit a save under a name; it contains the run's state when the request runs.

    Args:
        kind: The kind of checkpoint. ``external`` writes files for peft.
        overwrite: Whether to replace a checkpoint of this name.
        recipients: age public keys for which the files of an external checkpoint are encrypted.

    Raises:
        InvalidRequest: The name is not allowed in a path, or a recipient is invalid. (400)
        RunNotFound: (404)
    """
    run = run_asked(owner_id=owner_id, model_id=model_id, idempotency_key=idempotency_key)
    check_recipients(recipients)
    return submit(
        SaveWeights(
            checkpoint_kind=kind,
            name=check_name(name, field="name"),
            overwrite=overwrite,
            ttl_seconds=ttl_seconds,
            user_metadata=user_metadata or {},
            recipients=recipients,
        ),
        run_target(run, seq_id=seq_id),
        summary={"path": str(TinkerPath(run.name, kind, name))},
        idempotency_key=idempotency_key,
    )


def save_for_sampling_session_submit(
    *, owner_id: int, model_id: str, sampling_session_seq_id: int, seq_id: int
) -> Submission:
    """Submit a save for a sampling session of the model's state when the request runs.

    Its checkpoint has no path and is in no list. The SDK's kind ``inflight``, a session
    that may change to newer weights, also gets a fixed one: no session serves
    older weights than the save that made it.

    Raises:
        RunNotFound: (404)
        InvalidRequest: The model belongs to no session. (400)
    """
    run = run_get(owner_id=owner_id, model_id=model_id)
    if run.session_id is None:
        raise InvalidRequest(f"model_id: {model_id!r} was not made in a session of the SDK")
    return submit(
        SaveWeights(checkpoint_kind="sampler", sampling_session_seq_id=sampling_session_seq_id),
        run_target(run, seq_id=seq_id),
        summary={"sampling_session": f"{run.session_id}:sample:{sampling_session_seq_id}"},
    )


def checkpoint_check_free(*, owner_id: int, path: TinkerPath, overwrite: bool) -> None:
    """Refuse a save whose path is taken, before its files are written.

    Raises:
        CheckpointExists: Another checkpoint has the path, and ``overwrite`` is false.
    """
    _check_replaceable(checkpoint_at(owner_id=owner_id, path=path), path, overwrite)


def checkpoint_place(checkpoint: Checkpoint, *, overwrite: bool) -> None:
    """Insert a checkpoint whose files are written, replacing the one that has its path.

    Of several at once the database decides which is first: the others replace it, or are refused.
    The files of a replaced checkpoint are deleted when the caller's transaction commits.

    Raises:
        CheckpointExists: Another checkpoint has the path, and ``overwrite`` is false; nothing is
            changed.
        StorageQuotaExceeded: It would exceed its owner's quota; nothing is changed.
    """
    path = checkpoint.path
    while True:
        try:
            with transaction.atomic():
                old = checkpoint_at(owner_id=checkpoint.owner_id, path=path)
                _check_replaceable(old, path, overwrite)
                storage_check(
                    owner_id=checkpoint.owner_id,
                    more_bytes=checkpoint.size_bytes,
                    freed_bytes=old.size_bytes if old is not None else 0,
                )
                if old is not None:
                    _replace(old)
                checkpoint.save(force_insert=True)
            return
        except IntegrityError as error:  # another was saved there since the check
            if violated_constraint(error) not in ONE_OF_A_PATH:
                raise


def load_weights_submit(
    *,
    owner_id: int,
    model_id: str,
    path: str,
    optimizer: bool = True,
    lender_id: int | None = None,
    seq_id: int | None = None,
    idempotency_key: str | None = None,
) -> Submission:
    """Submit the loading of a checkpoint, which the owner may read, into an existing run.

    Args:
        optimizer: False loads the weights and resets the optimizer.
        lender_id: Another user whose checkpoints may be read too.

    Raises:
        RunNotFound, CheckpointNotFound: (404)
        InvalidRequest: The checkpoint is of another base model, or has no optimizer state
            and it was requested. (400)
    """
    run = run_asked(owner_id=owner_id, model_id=model_id, idempotency_key=idempotency_key)
    parsed = TinkerPath.parse(path)
    checkpoint = checkpoint_get(owner_id=owner_id, path=parsed, lender_id=lender_id)
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
    _check_optimizer(checkpoint, parsed, optimizer)
    checkpoint_audit_read(checkpoint, reader_id=owner_id, purpose="load")
    return submit(
        LoadWeights(checkpoint=checkpoint.pk, path=str(parsed), optimizer=optimizer),
        run_target(run, seq_id=seq_id),
        idempotency_key=idempotency_key,
    )


@transaction.atomic
def model_load_submit(
    *,
    owner_id: int,
    session_id: str,
    model_seq_id: int,
    path: str,
    optimizer: bool,
    base_model: str | None = None,
    user_metadata: Mapping[str, Any] | None = None,
    lender_id: int | None = None,
) -> Submission:
    """Submit the creation of the session's model of this number from a checkpoint.

    The adapter's shape is the checkpoint's.

    Args:
        optimizer: False loads the weights and resets the optimizer.
        base_model: The client's assumption of the checkpoint's base model.
        lender_id: Another user whose checkpoints may be read too.

    Raises:
        SessionNotFound, CheckpointNotFound, BaseModelNotFound: (404)
        InvalidRequest: The checkpoint is of another base model, or has no optimizer state
            and it was requested. (400)
        SessionFinished, LimitExceeded: (400)
        SeqIdReused: The session made another model under this number. (422)
    """
    parsed = TinkerPath.parse(path)
    checkpoint = checkpoint_get(owner_id=owner_id, path=parsed, lender_id=lender_id)
    if base_model not in (None, checkpoint.run.base_model):
        raise InvalidRequest(
            f"base_model: {parsed} is of base model {checkpoint.run.base_model}, not {base_model}"
        )
    _check_optimizer(checkpoint, parsed, optimizer)
    checkpoint_audit_read(checkpoint, reader_id=owner_id, purpose="load")
    config = run_lora_config(checkpoint.run)
    run = session_run_create(
        owner_id=owner_id,
        session_id=session_id,
        model_seq_id=model_seq_id,
        base_model=checkpoint.run.base_model,
        lora_config=config,
        user_metadata=user_metadata,
    )
    creation = CreateRun(
        model_id=run.name,
        lora_config=config,
        source=LoadWeights(checkpoint=checkpoint.pk, path=str(parsed), optimizer=optimizer),
    )
    return submit(creation, run_target(run, seq_id=CREATION_SEQ_ID))


def checkpoint_audit_read(checkpoint: Checkpoint, *, reader_id: int, purpose: str) -> None:
    """Record in its owner's audit log that another user reads it."""
    if checkpoint.run.owner_id != reader_id:
        audit_checkpoint("read", checkpoint, actor_id=reader_id, purpose=purpose)


def _check_replaceable(old: Checkpoint | None, path: TinkerPath, overwrite: bool) -> None:
    if old is not None and not (overwrite or old.has_expired):
        of = "" if old.run.deleted_at is None else f", of a model {old.run.name!r} that was removed"
        # A model of the SDK is saved by its client, which can only overwrite with save_state.
        knows_overwrite = old.run.session_id is None or path.kind == "training"
        hint = "send overwrite: true to replace it" if knows_overwrite else "delete it"
        raise CheckpointExists(f"{path} exists already{of}; {hint}, or choose another name")


def _replace(old: Checkpoint) -> None:
    directory = old.directory
    transaction.on_commit(lambda: storage().delete(directory))
    audit_checkpoint("overwrite", old, actor_id=old.owner_id)
    old.delete()


def _check_optimizer(checkpoint: Checkpoint, path: TinkerPath, optimizer: bool) -> None:
    if optimizer and checkpoint.kind != Checkpoint.Kind.TRAINING:
        raise InvalidRequest(
            f"optimizer: {path} holds no optimizer state; load a .../weights/... path "
            "or send optimizer: false"
        )
