"""Rebuild a run from its log beside the run: to compare both, or to continue from one of its steps.

The new run's lane gets the same requests in the same order, so its worker computes what it
computed the first time. Nothing here waits for that; ``training.replays`` reads how far it is.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass

from django.conf import settings
from django.db import transaction
from django.db.models import BigIntegerField, F, Func, Q
from django.utils import timezone

from futures.copying import futures_copy
from futures.errors import IdempotencyKeyReused
from futures.models import Future
from futures.transitions import State
from training.audit import audit_record
from training.errors import InvalidRequest, LimitExceeded, RunExists, RunLost
from training.kinds import CompareRuns, CreateRun, Kind, LoadWeights, SaveWeights
from training.models import Checkpoint, Run
from training.paths import TinkerPath
from training.selectors import CHANGED_ITS_RUN
from training.services.runs import SUBMITTED_FACTS, run_lora_config, run_replay_create
from training.services.submission import run_repeated, run_target, submit
from training.storage_quota import storage_reserve
from training.token_quota import token_quota_check

MOST_COPIED_BYTES = 2**30
"""Of requests in one replay: they are copied while a page waits."""

UNTIL = "log_until"
"""In the summary of a comparison: the last request of the original's log that was replayed."""
FORKED_STEP = "forked_step"
"""In the metadata of a fork: at which step of the other run it begins."""


@dataclass(frozen=True, kw_only=True)
class _Log:
    request_ids: list[str]
    size_bytes: int
    tokens: int


def run_replay(*, run: Run, actor_id: int | None, key: str) -> Run:
    """A new run of the same owner that repeats this one's log and then compares both.

    Args:
        key: Names this wish: with the same one the first replay is returned.

    Raises:
        RunLost: A part of the log was pruned.
        LimitExceeded: The log is too long, or the owner has reached a limit.
        BaseModelNotFound: It is not served any more.
    """

    def fill(copy: Run) -> None:
        _copy_log(_log(run, until=run.applied_seq_id), run, copy)
        comparison = CompareRuns(other=run.id)
        summary = {UNTIL: run.applied_seq_id}
        submit(comparison, run_target(copy), summary=summary, idempotency_key=key)

    return _once(run, fill, verb="replay", actor_id=actor_id, key=key, title=f"Replay of {run}")


def run_fork(*, run: Run, step: int, actor_id: int | None, key: str) -> Run:
    """A new run of the same owner with this one's weights and optimizer state after a step.

    It begins with the newest training checkpoint of that step if there is one, else with the log
    up to it. At the end its state is saved as ``weights/step-<step>``, for clients that
    begin with a checkpoint.

    Args:
        key: Names this wish: with the same one the first fork is returned.

    Raises:
        InvalidRequest: The run has no such step, or has taken it back by loading a checkpoint.
        RunLost: A part of the log was pruned, and no checkpoint has this step.
        LimitExceeded: The log is too long, or the owner has reached a limit.
        BaseModelNotFound: It is not served any more.
    """
    if not 1 <= step <= run.step:
        has = f"expected 1 to {run.step}, got {step}" if run.step else "the run has made none yet"
        raise InvalidRequest(f"step: {has}")

    def fill(copy: Run) -> None:
        end = _end_of_step(run, step)
        checkpoint = _checkpoint_at(run, step, after=end)
        if checkpoint is not None:
            path = str(checkpoint.path)
            source = LoadWeights(checkpoint=checkpoint.pk, path=path, optimizer=True)
            config = run_lora_config(copy)
            creation = CreateRun(model_id=copy.name, lora_config=config, source=source)
            submit(creation, run_target(copy), summary={"path": path})
        else:
            _copy_log(_log(run, until=end), run, copy)
        name = f"step-{step}"
        submit(
            SaveWeights(
                checkpoint_kind="training",
                name=name,
                overwrite=False,
                ttl_seconds=None,
                user_metadata={},
                recipients=(),
            ),
            run_target(copy),
            summary={"path": str(TinkerPath(copy.name, "training", name))},
            idempotency_key=key,
        )

    title = f"{run}, from step {step}"
    metadata = {FORKED_STEP: str(step)}
    return _once(run, fill, verb="fork", actor_id=actor_id, key=key, title=title, metadata=metadata)


def _once(
    run: Run,
    fill: Callable[[Run], None],
    *,
    verb: str,
    actor_id: int | None,
    key: str,
    title: str,
    metadata: dict[str, str] | None = None,
) -> Run:
    """Make the new run and its requests, or return that of the same wish.

    The last request has the key, so of two wishes at once one finds the other's when that is
    committed, and is rolled back.
    """
    if first := run_repeated(run.owner_id, key):
        return first
    if run.state != Run.RunState.READY:
        raise InvalidRequest(f"{run.name!r} is {run.state}; only a live model can be repeated")
    try:
        with transaction.atomic():
            copy = _make(run, verb)
            Run.objects.filter(pk=copy.pk).update(title=title[:200], user_metadata=metadata or {})
            fill(copy)
            audit_record(
                f"run_{verb}",
                actor_id=actor_id,
                owner_id=run.owner_id,
                model_id=run.name,
                new_model_id=copy.name,
            )
            return copy
    except IdempotencyKeyReused:
        if first := run_repeated(run.owner_id, key):
            return first
        raise


def _make(run: Run, verb: str) -> Run:
    """A run of the same shape with an empty log, under a free name."""
    try:
        return run_replay_create(run=run, verb=verb)
    except RunExists:
        name = f"{run.name[:100]}-{verb}-{secrets.token_hex(4)}"
        return run_replay_create(run=run, name=name)


def _checkpoint_at(run: Run, step: int, *, after: int) -> Checkpoint | None:
    """The newest checkpoint that holds the run's whole state after the step that a request made.

    One of the same step that was saved before is of steps that the run has taken back.
    """
    kept = Q(expires_at__isnull=True) | Q(expires_at__gt=timezone.now())
    found = run.checkpoints.filter(kept, kind=Checkpoint.Kind.TRAINING, step=step, seq_id__gt=after)
    return found.order_by("-created_at").first()


def _end_of_step(run: Run, step: int) -> int:
    """The number of the request that made this step, the last one if there are several."""
    steps = Future.objects.filter(
        lane_id=run.pk, kind=Kind.OPTIM_STEP, state=State.READY, summary__step=step
    )
    last = steps.order_by("-seq_id").values_list("seq_id", flat=True).first()
    if last is None:
        raise InvalidRequest(
            f"step: {run.name!r} did not make step {step} itself; begin with the checkpoint that "
            "it loaded"
        )
    loads = Future.objects.filter(lane_id=run.pk, kind=Kind.LOAD_WEIGHTS, state=State.READY)
    load = loads.filter(seq_id__gt=last).order_by("seq_id").first()
    if load is not None:
        raise InvalidRequest(
            f"step: after step {step} {run.name!r} has loaded {load.summary.get('path')}, so it is "
            "not clear which state is meant; begin with a checkpoint instead"
        )
    return int(last)


def _log(run: Run, *, until: int) -> _Log:
    """The requests of the run's log up to a number."""
    size = Func(F("payload"), function="octet_length", output_field=BigIntegerField())
    log = Future.objects.filter(
        CHANGED_ITS_RUN, lane_id=run.pk, seq_id__lte=min(until, run.applied_seq_id)
    )
    rows = list(
        log.annotate(size=size).order_by("seq_id").values_list("pk", "size", "kind", "cost")
    )
    if any(size is None for _, size, _, _ in rows):
        raise RunLost("a part of its log was pruned, so it cannot be repeated")
    return _Log(
        request_ids=[pk for pk, *_ in rows],
        size_bytes=sum(size for _, size, _, _ in rows),
        tokens=sum(cost for _, _, kind, cost in rows if kind == Kind.FORWARD_BACKWARD),
    )


def _copy_log(log: _Log, run: Run, copy: Run) -> None:
    number = len(log.request_ids)
    waiting = Future.objects.filter(owner_id=run.owner_id, state=State.PENDING)
    room = settings.MAX_PENDING - waiting.count() - 1
    if number > room or log.size_bytes > MOST_COPIED_BYTES:
        raise LimitExceeded(
            f"its log has {number:,} requests of {log.size_bytes:,} bytes; now at most "
            f"{max(0, room):,} of at most {MOST_COPIED_BYTES:,} bytes can be repeated here. "
            "`manage.py replayrun` on the server has no limit"
        )
    storage_reserve(owner_id=run.owner_id, more_bytes=log.size_bytes)
    token_quota_check(owner_id=run.owner_id, needed=log.tokens)
    copied = futures_copy(request_ids=log.request_ids, lane_id=copy.pk, facts=SUBMITTED_FACTS)
    if copied != number:
        raise RunLost("a part of its log was pruned meanwhile, so it cannot be repeated")
