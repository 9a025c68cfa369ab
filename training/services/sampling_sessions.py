"""The SDK's sampling sessions, each of one fixed model, and their samples.

A session samples from a base model or from one checkpoint and never changes: if a path
later means another checkpoint, the session keeps the first. Its lane has no order, so its numbers,
of 64 bits, only identify requests.
"""

from __future__ import annotations

from django.db import IntegrityError, transaction
from django.db.models import F

from futures.errors import SeqIdReused
from futures.models import Future
from futures.services import lane_create
from training.base_models import base_model_get
from training.errors import (
    CheckpointNotFound,
    InvalidRequest,
    SessionFinished,
)
from training.images import Chunks
from training.models import SamplingSession
from training.paths import TinkerPath
from training.selectors import checkpoint_get, checkpoints_kept, sampling_session_get
from training.services.recorded_samples import stable_reinforce_check
from training.services.sampling import sample_request
from training.services.sessions import session_open
from training.services.submission import Target, submit
from training.types import SamplingParams, ScoringParams, TokenIds


@transaction.atomic
def sampling_session_create(
    *,
    owner_id: int,
    session_id: str,
    sampling_session_seq_id: int,
    base_model: str | None,
    model_path: str | None,
) -> SamplingSession:
    """The session's sampling session of this number; a repeat makes no second one.

    Either kind of path is accepted: a training checkpoint can be sampled from too.

    Raises:
        SessionNotFound, CheckpointNotFound, BaseModelNotFound: (404)
        SessionFinished: (400)
        InvalidRequest: Neither a model nor a path, or a path of another model. (400)
        SeqIdReused: The number means another sampling session. (422)
    """
    session = session_open(owner_id=owner_id, session_id=session_id)
    checkpoint = None
    if model_path is not None:
        path = TinkerPath.parse(model_path, field="model_path")
        checkpoint = checkpoint_get(owner_id=owner_id, path=path, field="model_path")
        if base_model not in (None, checkpoint.run.base_model):
            raise InvalidRequest(
                f"base_model: {path} is of base model {checkpoint.run.base_model}, not {base_model}"
            )
        base_model = checkpoint.run.base_model
    elif base_model is None:
        raise InvalidRequest("base_model, model_path: give one of them to say what to sample from")
    served = base_model_get(base_model)
    sampling_session_id = f"{session.id}:sample:{sampling_session_seq_id}"
    try:
        with transaction.atomic():
            made = SamplingSession.objects.create(
                id=sampling_session_id,
                session=session,
                seq_id=sampling_session_seq_id,
                base_model=served.name,
                checkpoint=checkpoint,
                model_path=model_path or "",
            )
            lane_create(lane_id=made.id, owner_id=owner_id, queue=served.queue, ordered=False)
    except IntegrityError:
        made = SamplingSession.objects.get(pk=sampling_session_id)
        if (made.base_model, made.model_path) != (served.name, model_path or ""):
            raise SeqIdReused(
                f"sampling_session_seq_id: {sampling_session_seq_id} already means another "
                "sampling session"
            ) from None
    return made


@transaction.atomic
def sampling_session_join(*, owner_id: int, sampling_session_id: str) -> int:
    """A unique number for another client of a sampling session.

    Raises:
        SamplingSessionNotFound: (404)
    """
    found = sampling_session_get(owner_id=owner_id, sampling_session_id=sampling_session_id)
    row = SamplingSession.objects.filter(pk=found.pk)
    row.update(num_clients=F("num_clients") + 1)
    return row.values_list("num_clients", flat=True).get() - 1


def session_sample_submit(
    *,
    owner_id: int,
    sampling_session_id: str,
    seq_id: int,
    prompt: TokenIds | Chunks,
    num_samples: int,
    sampling_params: SamplingParams,
    prompt_logprobs: bool,
    scoring: ScoringParams,
    record: bool = False,
) -> Future:
    """Submit a sample of one prompt; a repeat under the same number returns the first future.

    Args:
        record: Record the sequences for the loss stable_reinforce, for the models of the same
            session.

    Raises:
        InvalidRequest: Recording was requested, and this server refuses that loss. (400)
        SamplingSessionNotFound, CheckpointNotFound: (404)
        SessionFinished: (400)
        SeqIdReused: The number was used for another request. (422)
        QueueFull: The owner has reached the limit of waiting requests. (429)
    """
    sampling_session = sampling_session_get(
        owner_id=owner_id, sampling_session_id=sampling_session_id
    )
    if sampling_session.session.finished_at is not None:
        raise SessionFinished
    checkpoint_id = sampling_session.checkpoint_id
    if sampling_session.model_path and (
        checkpoint_id is None or not checkpoints_kept().filter(pk=checkpoint_id).exists()
    ):
        raise CheckpointNotFound(f"the checkpoint {sampling_session.model_path} was deleted")
    if record:
        stable_reinforce_check()
        if isinstance(prompt, Chunks):
            raise InvalidRequest(
                "prompt: has an image; sequences are recorded after prompts of tokens only"
            )
    request = sample_request(
        prompts=[prompt],
        num_samples=num_samples,
        sampling_params=sampling_params,
        prompt_logprobs=prompt_logprobs,
        scoring=scoring,
        request_name=f"{sampling_session_id}:{seq_id}",
        checkpoint=checkpoint_id,
        record_for=sampling_session.session_id if record else None,
    )
    path = sampling_session.model_path
    target = Target(
        owner_id=owner_id,
        base_model=sampling_session.base_model,
        lane_id=sampling_session_id,
        seq_id=seq_id,
    )
    return submit(request, target, summary={"path": path} if path else {}).future
