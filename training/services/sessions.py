"""The SDK's sessions and the models made in them.

A session is one client process. It makes models by number, and the model's id consists of
both, so that the client can compute it: ``<session>:train:<model_seq_id>``. Such a model's lane
begins at 0, its creation; the client numbers later requests from 1.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from django.db import IntegrityError, transaction
from django.utils import timezone

from futures.models import Future, Lane
from futures.services import Refusal, future_submit, lane_create
from training.base_models import base_model_get
from training.client_silence import ENDS_SESSION
from training.errors import SessionFinished
from training.kinds import CreateRun
from training.models import Run, Session
from training.selectors import run_get, session_get
from training.services.removal import submit_removal
from training.services.runs import adapter_limit_check
from training.services.submission import Submission, run_target, submit
from training.types import LoraConfig

CREATION_SEQ_ID = 0
"""The number of a model's creation, by ``create_model`` or by loading a checkpoint."""


def session_create(
    *,
    owner_id: int,
    sdk_version: str,
    tags: Sequence[str] = (),
    user_metadata: Mapping[str, Any] | None = None,
    project_id: str = "",
    display_name: str = "",
) -> Session:
    """Begin a session; its id is the server's choice."""
    return Session.objects.create(
        owner_id=owner_id,
        sdk_version=sdk_version,
        tags=sorted(tags),
        user_metadata=dict(user_metadata or {}),
        project_id=project_id,
        display_name=display_name,
    )


def session_heartbeat(*, owner_id: int, session_id: str) -> Session:
    """Record that the session's client lives, unless it has finished the session.

    Raises:
        SessionNotFound: (404)
    """
    session = session_get(owner_id=owner_id, session_id=session_id)
    now = timezone.now()
    Session.objects.filter(pk=session.pk, finished_at__isnull=True).update(heartbeat_at=now)
    return session


@transaction.atomic
def session_finish(*, owner_id: int, session_id: str, reason: str, detail: str = "") -> Session:
    """End a session; the first reason stays. Requests submitted before still run.

    After that its models' memory and snapshots are freed, because they accept no further
    requests. The models stay in lists, and their checkpoints stay.

    Raises:
        SessionNotFound: (404)
    """
    session = session_get(owner_id=owner_id, session_id=session_id)
    finished = Session.objects.filter(pk=session.pk, finished_at__isnull=True).update(
        finished_at=timezone.now(), finish_reason=reason, finish_detail=detail
    )
    if finished:
        for run in session.runs.live():
            submit_removal(run)
    session.refresh_from_db()
    return session


def sessions_expire() -> int:
    """Finish sessions without a heartbeat for very long; return their number.

    The worker calls it regularly. A client that comes back later gets an error.
    """
    silent = Session.objects.filter(
        finished_at__isnull=True, heartbeat_at__lt=timezone.now() - ENDS_SESSION
    )
    for session in silent:
        session_finish(
            owner_id=session.owner_id,
            session_id=session.pk,
            reason=Session.FinishReason.INTERRUPTED,
            detail=f"Its client sent no heartbeat for {ENDS_SESSION.days} days.",
        )
    return len(silent)


def session_set_project(*, owner_id: int, session_id: str, project_id: str) -> None:
    """Move a session to a project; projects are labels and need not be made first.

    Raises:
        SessionNotFound: (404)
    """
    session = session_get(owner_id=owner_id, session_id=session_id)
    Session.objects.filter(pk=session.pk).update(project_id=project_id)


def session_open(*, owner_id: int, session_id: str) -> Session:
    """The owner's session, which must not be finished.

    Raises:
        SessionNotFound: (404)
        SessionFinished: (400)
    """
    session = session_get(owner_id=owner_id, session_id=session_id)
    if session.finished_at is not None:
        raise SessionFinished
    return session


@transaction.atomic
def session_run_create(
    *,
    owner_id: int,
    session_id: str,
    model_seq_id: int,
    base_model: str | None,
    lora_config: LoraConfig,
    user_metadata: Mapping[str, str] | None = None,
) -> Run:
    """The session's model of this number, made now unless it was made before.

    The caller submits its creation in the same transaction, at ``CREATION_SEQ_ID``: the lane
    begins there. A repeat finds the run of the first, whose shape may differ from the one requested
    now; the creation's digest ensures that the requests are equal.

    Raises:
        SessionNotFound, BaseModelNotFound: (404)
        SessionFinished: (400)
        LimitExceeded: The owner has reached the limit of adapters. (400)
    """
    made = Run.objects.filter(session_id=session_id, owner_id=owner_id, model_seq_id=model_seq_id)
    if run := made.first():
        return run
    session_get(owner_id=owner_id, session_id=session_id)
    # Locked until the commit: a session that is being finished waits for this model, or ends first.
    session = Session.objects.select_for_update(no_key=True).get(pk=session_id)
    if session.finished_at is not None:
        raise SessionFinished
    served = base_model_get(base_model)
    adapter_limit_check(owner_id)
    run_id = f"{session.id}:train:{model_seq_id}"
    try:
        with transaction.atomic():
            run = Run.objects.create(
                id=run_id,
                name=run_id,
                owner_id=owner_id,
                session=session,
                model_seq_id=model_seq_id,
                base_model=served.name,
                rank=lora_config.rank,
                alpha=lora_config.alpha,
                seed=lora_config.seed,
                train_mlp=lora_config.train_mlp,
                train_attn=lora_config.train_attn,
                train_unembed=lora_config.train_unembed,
                target_modules=lora_config.target_modules,
                share_across_experts=lora_config.share_across_experts,
                user_metadata=dict(user_metadata or {}),
            )
    except IntegrityError:  # the same request, at the same time
        return made.get()
    lane_create(lane_id=run_id, owner_id=owner_id, queue=served.queue, first_seq_id=CREATION_SEQ_ID)
    return run


@transaction.atomic
def model_create_submit(
    *,
    owner_id: int,
    session_id: str,
    model_seq_id: int,
    base_model: str,
    lora_config: LoraConfig,
    user_metadata: Mapping[str, str] | None = None,
) -> Submission:
    """Submit the creation of the session's model of this number; a repeat makes no second one.

    Raises:
        SessionNotFound, BaseModelNotFound: (404)
        SessionFinished: (400)
        LimitExceeded: The owner has reached the limit of adapters. (400)
        SeqIdReused: The session made another model under this number. (422)
    """
    run = session_run_create(
        owner_id=owner_id,
        session_id=session_id,
        model_seq_id=model_seq_id,
        base_model=base_model,
        lora_config=lora_config,
        user_metadata=user_metadata,
    )
    creation = CreateRun(model_id=run.name, base_model=base_model, lora_config=lora_config)
    return submit(creation, run_target(run, seq_id=CREATION_SEQ_ID))


def seeded(
    config: LoraConfig, *, seed: int | None, session_id: str, model_seq_id: int
) -> LoraConfig:
    """The config with this seed, or with one that depends on the model, so that a
    repeated request is equal."""
    if seed is None:
        digest = hashlib.sha256(f"{session_id}:train:{model_seq_id}".encode()).digest()
        seed = int.from_bytes(digest[:4], "little") >> 1
    return replace(config, seed=seed)


def refused_submit(
    *, owner_id: int, model_id: str, seq_id: int, body_digest: str, refusal: Refusal
) -> Future:
    """Use the seq id of a request that will never run: its future has failed.

    Args:
        body_digest: Digest of the body; sending it again gives the same future.

    Raises:
        RunNotFound: (404)
        SeqIdReused: The number was used for another request. (422)
    """
    run = run_get(owner_id=owner_id, model_id=model_id)
    return future_submit(
        owner_id=owner_id,
        queue=Lane.objects.values_list("queue", flat=True).get(pk=run.id),
        kind="refused",
        payload={"body_digest": body_digest},
        lane_id=run.id,
        seq_id=seq_id,
        refusal=refusal,
    )
