"""Writes: every request of a client becomes a future here, and the rows it needs with it.

Each function is one transaction. None of them waits, and none of them touches the engine:
what a future does when its turn comes is ``training.worker.operations``.
"""

from __future__ import annotations

import hashlib
import secrets
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from django.conf import settings
from django.contrib.auth import get_user_model
from django.db import IntegrityError, transaction
from django.utils import timezone

from futures.models import Future
from futures.payload import EncodedPayload
from futures.services import future_submit, lane_create
from training import payloads
from training.base_models import base_model_get
from training.errors import InvalidRequest, LimitExceeded, RunExists, RunNotFound
from training.kinds import Kind
from training.models import Checkpoint, Run
from training.paths import TinkerPath, check_name
from training.selectors import checkpoint_get, run_get
from training.types import (
    AdamParams,
    Conversation,
    Datum,
    LoraConfig,
    Prompt,
    SamplingParams,
)

_SEED_BITS = 31  # any client and any generator can hold it


@dataclass(frozen=True, kw_only=True)
class Submission:
    """An accepted request."""

    future: Future
    model_id: str | None
    """The run's name, None for requests that concern no run."""


@transaction.atomic
def run_create_submit(
    *,
    owner_id: int,
    model_id: str | None,
    base_model: str | None,
    lora_config: LoraConfig,
    idempotency_key: str | None = None,
) -> Submission:
    """Ask for a new adapter; its name is taken from now on.

    Args:
        model_id: None lets the server choose a name.

    Raises:
        RunExists: The owner has a live run of this name. (409)
        BaseModelNotFound: (404)
        LimitExceeded: The owner has as many adapters as one may have. (400)
    """
    run = _repeated(owner_id, idempotency_key)
    name = model_id or (run.name if run else f"model_{secrets.token_hex(8)}")
    check_name(name, field="model_id")
    if run is None:
        run = _run_create(owner_id, name, base_model, lora_config)
    if run is None:
        raise RunExists(f"model_id: you already have a model named {name!r}; remove it first")
    return _submit_creation(run, name, lora_config, idempotency_key)


@transaction.atomic
def run_remove_submit(
    *, owner_id: int, model_id: str, idempotency_key: str | None = None
) -> Submission:
    """Remove a run: its name is free at once, its memory when its turn in the lane comes.

    What was submitted before still runs. Checkpoints stay.

    Raises:
        RunNotFound: (404)
    """
    if first := _repeated(owner_id, idempotency_key):
        return _submit_in_lane(first, Kind.REMOVE_RUN, {}, idempotency_key=idempotency_key)
    run = run_get(owner_id=owner_id, model_id=model_id)
    submission = _submit_in_lane(run, Kind.REMOVE_RUN, {}, idempotency_key=idempotency_key)
    deleted = (
        Run.objects.live()
        .filter(id=run.id)
        .update(state=Run.RunState.DELETED, error="", deleted_at=timezone.now())
    )
    if not deleted:  # another request removed it between our read and our write
        raise RunNotFound(f"model_id: no model named {model_id!r}")
    return submission


@transaction.atomic
def forward_backward_submit(
    *,
    owner_id: int,
    model_id: str,
    data: Sequence[Conversation | Datum],
    loss_fn: str,
    loss_fn_config: Mapping[str, float],
    train_on: str = "auto",
    forward_only: bool = False,
    idempotency_key: str | None = None,
) -> Submission:
    """Ask for a loss and, unless ``forward_only``, its gradient.

    An unknown ``model_id`` makes a run of that name on the default base model, so that a
    first request needs no set-up.

    Raises:
        LimitExceeded: The owner has as many adapters as one may have. (400)
        QueueFull: The owner has as many waiting futures as one may have. (429)
    """
    run = _run_get_or_create(owner_id, model_id)
    payload = {
        "data": payloads.data_to_payload(data),
        "loss_fn": loss_fn,
        "loss_fn_config": dict(loss_fn_config),
        "train_on": train_on,
    }
    return _submit_in_lane(
        run,
        Kind.FORWARD if forward_only else Kind.FORWARD_BACKWARD,
        payload,
        cost=payloads.data_cost(data),
        summary={"datums": len(data)},
        idempotency_key=idempotency_key,
    )


@transaction.atomic
def optim_step_submit(
    *,
    owner_id: int,
    model_id: str,
    adam_params: AdamParams,
    idempotency_key: str | None = None,
) -> Submission:
    """Ask for one AdamW step with the gradient accumulated so far.

    Raises:
        RunNotFound: (404)
    """
    return _submit_in_lane(
        run_get(owner_id=owner_id, model_id=model_id),
        Kind.OPTIM_STEP,
        {"adam_params": payloads.adam_params_to_payload(adam_params)},
        summary={"learning_rate": adam_params.learning_rate},
        idempotency_key=idempotency_key,
    )


@transaction.atomic
def sample_submit(
    *,
    owner_id: int,
    model_id: str | None,
    base_model: str | None,
    model_path: str | None,
    prompts: Sequence[Prompt],
    num_samples: int,
    sampling_params: SamplingParams,
    prompt_logprobs: bool = False,
    idempotency_key: str | None = None,
) -> Submission:
    """Ask for completions of one or more prompts.

    With ``model_id`` the sample has its place in the run's order: it sees the steps
    submitted before it and none after. A path or a base model has no order to keep.
    A seed and a length are chosen here if the client named none, so that a repeat after a
    crash says the same.

    Raises:
        InvalidRequest: Not exactly one of model_id, base_model and model_path. (400)
        RunNotFound, CheckpointNotFound, BaseModelNotFound: (404)
    """
    if sum(value is not None for value in (model_id, base_model, model_path)) != 1:
        raise InvalidRequest(
            "model_id, base_model, model_path: give exactly one of them to say what to sample from"
        )
    sampling_params = replace(
        sampling_params,
        seed=_new_seed(idempotency_key) if sampling_params.seed is None else sampling_params.seed,
        max_tokens=sampling_params.max_tokens or settings.DEFAULT_MAX_TOKENS,
    )
    payload: dict[str, Any] = {
        "prompts": [payloads.prompt_to_payload(prompt) for prompt in prompts],
        "num_samples": num_samples,
        "sampling_params": payloads.sampling_params_to_payload(sampling_params),
        "prompt_logprobs": prompt_logprobs,
        "checkpoint": None,
    }
    cost = sum(payloads.prompt_cost(prompt) for prompt in prompts)
    summary = {"prompts": len(prompts), "samples": num_samples}
    if model_id is not None:
        run = run_get(owner_id=owner_id, model_id=model_id)
        return _submit_in_lane(
            run, Kind.SAMPLE, payload, cost=cost, summary=summary, idempotency_key=idempotency_key
        )
    if model_path is not None:
        path = TinkerPath.parse(model_path, field="model_path")
        checkpoint = checkpoint_get(owner_id=owner_id, path=path)
        payload["checkpoint"] = checkpoint.pk
        base_model = checkpoint.run.base_model
        summary["path"] = str(path)
    future = future_submit(
        owner_id=owner_id,
        queue=base_model_get(base_model).queue,
        kind=Kind.SAMPLE,
        payload=payload,
        cost=cost,
        summary=summary,
        idempotency_key=idempotency_key,
        max_pending=settings.MAX_PENDING,
    )
    return Submission(future=future, model_id=None)


@transaction.atomic
def save_weights_submit(
    *,
    owner_id: int,
    model_id: str,
    name: str,
    kind: Literal["training", "sampler"],
    overwrite: bool = False,
    ttl_seconds: int | None = None,
    user_metadata: Mapping[str, str] | None = None,
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
    return _submit_in_lane(
        run,
        Kind.SAVE_WEIGHTS,
        payload,
        summary={"path": str(TinkerPath(run.name, kind, name))},
        idempotency_key=idempotency_key,
    )


@transaction.atomic
def load_weights_submit(
    *,
    owner_id: int,
    model_id: str,
    path: str,
    optimizer: bool = True,
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
    return _submit_in_lane(
        run,
        Kind.LOAD_WEIGHTS,
        {"checkpoint": checkpoint.pk, "path": str(parsed), "optimizer": optimizer},
        summary={"path": str(parsed)},
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


@transaction.atomic
def run_replay_create(*, run: Run, name: str | None = None) -> Run:
    """A new run of the same shape with an empty log, to rebuild ``run`` in. (``replayrun``)

    Raises:
        RunExists: The name is taken.
    """
    number = run.run_set.count() + 1
    name = check_name(name or f"{run.name[:100]}-replay-{number}", field="name")
    copy = _run_create(run.owner_id, name, run.base_model, run_lora_config(run), replay_of=run)
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
        replay_of=original,
    )


def run_compare_submit(*, run: Run, other: Run) -> Future:
    """Ask the worker whether two runs' weights and moments are equal."""
    return _submit_in_lane(run, Kind.COMPARE_RUNS, {"other": other.id}).future


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
    )


def _run_get_or_create(owner_id: int, model_id: str) -> Run:
    name = check_name(model_id, field="model_id")
    live = Run.objects.owned_by(owner_id).live().filter(name=name)
    if run := live.first():
        return run
    config = LoraConfig()
    if run := _run_create(owner_id, name, None, config):
        _submit_creation(run, name, config, None)
        return run
    return live.get()  # another request made it between our read and our write


def _run_create(
    owner_id: int,
    name: str,
    base_model: str | None,
    config: LoraConfig,
    replay_of: Run | None = None,
) -> Run | None:
    """A run and its lane, or None if the name is taken; the database decides who was first."""
    served = base_model_get(base_model)
    # One creation at a time per owner, so that the count below cannot be overtaken.
    get_user_model().objects.select_for_update(no_key=True).get(pk=owner_id)
    if Run.objects.owned_by(owner_id).live().count() >= settings.MAX_ADAPTERS:
        raise LimitExceeded(
            f"you have {settings.MAX_ADAPTERS} models, as many as this server allows; remove one"
        )
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
                replay_of=replay_of,
            )
    except IntegrityError:
        return None
    lane_create(lane_id=run.id, owner_id=owner_id, queue=served.queue)
    return run


def _submit_creation(
    run: Run, name: str, config: LoraConfig, idempotency_key: str | None
) -> Submission:
    # The name is in it so that one Idempotency-Key cannot mean two models.
    payload = {"model_id": name, "lora_config": payloads.lora_config_to_payload(config)}
    return _submit_in_lane(run, Kind.CREATE_RUN, payload, idempotency_key=idempotency_key)


def _submit_in_lane(
    run: Run,
    kind: Kind,
    payload: Mapping[str, Any],
    *,
    cost: int = 1,
    summary: Mapping[str, Any] | None = None,
    idempotency_key: str | None = None,
) -> Submission:
    future = future_submit(
        owner_id=run.owner_id,
        queue=base_model_get(run.base_model).queue,
        kind=kind,
        payload=payload,
        lane_id=run.id,
        cost=cost,
        summary=summary,
        idempotency_key=idempotency_key,
        max_pending=settings.MAX_PENDING,
    )
    return Submission(future=future, model_id=run.name)


def _repeated(owner_id: int, idempotency_key: str | None) -> Run | None:
    """The run that an earlier request with this key was about."""
    if idempotency_key is None:
        return None
    first = Future.objects.filter(owner_id=owner_id, idempotency_key=idempotency_key).first()
    return Run.objects.filter(id=first.lane_id).first() if first and first.lane_id else None


def _new_seed(idempotency_key: str | None) -> int:
    """31 random bits, or the same ones for the same key: a repeat must be the same request."""
    if idempotency_key is None:
        return secrets.randbits(_SEED_BITS)
    digest = hashlib.sha256(idempotency_key.encode()).digest()
    return int.from_bytes(digest[:4], "little") >> (32 - _SEED_BITS)
