"""Make runs, remove them, and rebuild them from their logs."""

from __future__ import annotations

import secrets

from django.conf import settings
from django.contrib.auth import get_user_model
from django.db import IntegrityError, transaction
from django.db.models import Q
from django.utils import timezone

from futures.models import Future
from futures.payload import EncodedPayload
from futures.services import future_submit, lane_create
from training.audit import audit_record
from training.base_models import base_model_get
from training.client_silence import FREES_QUOTA
from training.errors import LimitExceeded, RunExists, RunNotFound
from training.kinds import CompareRuns, CreateRun
from training.models import Run
from training.paths import check_name, check_run_name
from training.selectors import run_get, run_live
from training.services.removal import submit_removal
from training.services.submission import Submission, run_repeated, run_target, submit
from training.types import LoraConfig

SUBMITTED_FACTS = ("datums", "loss_fn", "learning_rate", "path")
"""Of the summaries of logged requests, what is known before they run (``Request.summary``)."""


@transaction.atomic
def run_create_submit(
    *,
    owner_id: int,
    model_id: str | None,
    base_model: str | None,
    lora_config: LoraConfig,
    idempotency_key: str | None = None,
) -> Submission:
    """Submit the creation of an adapter; its name is taken from now on, unless the creation fails.

    Args:
        model_id: None lets the server choose a name.

    Raises:
        RunExists: The owner has a live run of this name. (409)
        BaseModelNotFound: (404)
        LimitExceeded: The owner has reached the limit of adapters. (400)
    """
    run = run_repeated(owner_id, idempotency_key)
    name = model_id or (run.name if run else f"model_{secrets.token_hex(8)}")
    if run is None:
        check_run_name(name, field="model_id")
        run = run_make(owner_id, name, base_model, lora_config)
    if run is None:
        raise RunExists(f"model_id: you already have a model named {name!r}; remove it first")
    return _submit_creation(run, name, lora_config, idempotency_key)


@transaction.atomic
def run_remove_submit(
    *, owner_id: int, model_id: str, idempotency_key: str | None = None
) -> Submission:
    """Remove a run: its name is free at once, its memory when the request runs.

    Requests submitted before still run. Checkpoints stay. If the server no longer serves the run's
    base model, the removal is complete when this returns, and requests submitted before fail.

    Raises:
        RunNotFound: (404)
    """
    if first := run_repeated(owner_id, idempotency_key):
        return submit_removal(first, idempotency_key=idempotency_key)
    run = run_get(owner_id=owner_id, model_id=model_id)
    # First, so that a creation that fails below finds the run removed already.
    deleted = (
        Run.objects.live()
        .filter(id=run.id)
        .update(state=Run.RunState.DELETED, deleted_at=timezone.now())
    )
    if not deleted:  # another request removed it between our read and our write
        raise RunNotFound(f"model_id: no model named {model_id!r}")
    return submit_removal(run, idempotency_key=idempotency_key)


@transaction.atomic
def run_describe(run: Run, *, actor_id: int | None, title: str, tags: str, notes: str) -> None:
    """Write down what people call a run and know of it; its ``model_id`` stays."""
    Run.objects.filter(pk=run.pk).update(title=title, tags=tags, notes=notes)
    audit_record(
        "run_describe", actor_id=actor_id, owner_id=run.owner_id, model_id=run.name, title=title
    )


def run_get_or_create(owner_id: int, model_id: str, *, idempotency_key: str | None = None) -> Run:
    """The owner's live run of this name, made on the default base model if it does not exist; for a
    repeated request, the run of the first one.

    Raises:
        InvalidRequest: The name is not allowed in a path. (400)
        LimitExceeded: The owner has reached the limit of adapters. (400)
    """
    name = check_name(model_id, field="model_id")
    first = run_repeated(owner_id, idempotency_key)
    if first is not None and first.name == name:
        return first
    if run := run_live(owner_id=owner_id, name=name):
        return run
    check_run_name(name, field="model_id")
    config = LoraConfig()
    # One transaction: the run must not be visible before its creation is first in its lane.
    with transaction.atomic():
        if run := run_make(owner_id, name, None, config):
            _submit_creation(run, name, config, None)
            return run
    # Another request made it between our read and our write.
    return run_get(owner_id=owner_id, model_id=name)


@transaction.atomic
def run_replay_create(*, run: Run, name: str | None = None, verb: str = "replay") -> Run:
    """A new run of the same shape with an empty log, to rebuild ``run`` in.

    Args:
        verb: Part of the name if none is given.

    Raises:
        RunExists: The name is taken.
    """
    number = run.run_set.count() + 1
    name = check_run_name(name or f"{run.name[:100]}-{verb}-{number}", field="name")
    copy = run_make(run.owner_id, name, run.base_model, run_lora_config(run), replay_of=run)
    if copy is None:
        raise RunExists(f"{name!r} exists already; remove it or choose another name")
    return copy


def run_replay_submit(*, run: Run, original: Future) -> Future:
    """Submit a logged request of another run to this one, at the end of its lane."""
    return future_submit(
        owner_id=run.owner_id,
        queue=original.queue,
        kind=original.kind,
        payload=EncodedPayload(bytes(original.payload or b""), bytes(original.payload_digest)),
        lane_id=run.id,
        cost=original.cost,
        summary={
            name: original.summary[name] for name in SUBMITTED_FACTS if name in original.summary
        },
        replay_of=original,
    )


def run_compare_submit(*, run: Run, other: Run) -> Future:
    """Submit a comparison of two runs' weights and moments."""
    return submit(CompareRuns(other=other.id), run_target(run)).future


def adapter_limit_check(owner_id: int) -> None:
    """Refuse a model beyond the user's limit; call it inside the transaction that makes the model.

    Models of ended SDK sessions do not count, and neither do those whose client sends no heartbeats
    any
    more: most scripts end without closing, and the SDK has no way to remove a model.

    Raises:
        LimitExceeded: (400)
    """
    # One creation at a time per owner, so that the count below stays valid.
    get_user_model().objects.select_for_update(no_key=True).get(pk=owner_id)
    heard_of = Q(session__isnull=True) | Q(
        session__finished_at__isnull=True, session__heartbeat_at__gt=timezone.now() - FREES_QUOTA
    )
    if Run.objects.owned_by(owner_id).live().filter(heard_of).count() >= settings.MAX_ADAPTERS:
        raise LimitExceeded(
            f"you have {settings.MAX_ADAPTERS} models, as many as this server allows; remove one"
        )


def run_lora_config(run: Run) -> LoraConfig:
    """The shape of a run's adapter."""
    modules = run.target_modules
    return LoraConfig(
        rank=run.rank,
        alpha=run.alpha,
        seed=run.seed,
        train_mlp=run.train_mlp,
        train_attn=run.train_attn,
        train_unembed=run.train_unembed,
        target_modules=None if modules is None else tuple(modules),
        share_across_experts=run.share_across_experts,
    )


def run_make(
    owner_id: int,
    name: str,
    base_model: str | None,
    config: LoraConfig,
    replay_of: Run | None = None,
) -> Run | None:
    """A run and its lane, or None if the name is taken; the database decides which was first."""
    served = base_model_get(base_model)
    adapter_limit_check(owner_id)
    try:
        with transaction.atomic():
            run = Run.objects.create(
                owner_id=owner_id,
                name=name,
                base_model=served.name,
                rank=config.rank,
                alpha=config.alpha,
                seed=config.seed,
                train_mlp=config.train_mlp,
                train_attn=config.train_attn,
                train_unembed=config.train_unembed,
                target_modules=config.target_modules,
                share_across_experts=config.share_across_experts,
                replay_of=replay_of,
            )
    except IntegrityError:
        return None
    lane_create(lane_id=run.id, owner_id=owner_id, queue=served.queue)
    return run


def _submit_creation(
    run: Run, name: str, config: LoraConfig, idempotency_key: str | None
) -> Submission:
    creation = CreateRun(model_id=name, lora_config=config)
    return submit(creation, run_target(run), idempotency_key=idempotency_key)
