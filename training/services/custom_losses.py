"""Loss functions that clients trace and upload: one row each, and a future that is ready at once.

Graphs are checked before they come here, and only the engine runs them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from django.db import transaction

from futures.models import Future
from futures.services import Refusal, future_record, future_submit
from training.base_models import base_model_get
from training.errors import InvalidDatum
from training.kinds import CreateCustomLoss, CreateCustomLossResult
from training.models import CustomLoss, Session
from training.selectors import custom_loss_get, run_get
from training.services.sessions import session_open
from training.storage_quota import storage_admit
from training.types import Conversation, Example


@transaction.atomic
def custom_loss_create(
    *,
    owner_id: int,
    session_id: str,
    seq_id: int,
    name: str,
    inputs: Sequence[Mapping[str, Any]],
    graph: Mapping[str, Any],
) -> Future:
    """Store a checked graph under the session's number for it; a repeat stores nothing new.

    The future's result is its ``CreateCustomLossResult``.

    Raises:
        SessionNotFound: (404)
        SessionFinished: (400)
        StorageQuotaExceeded: Its owner's storage limit is reached. (413)
        IdempotencyKeyReused: The session used the number for something else. (422)
    """
    session = session_open(owner_id=owner_id, session_id=session_id)
    request = CreateCustomLoss(name=name, inputs=inputs, graph=graph)
    encoded = request.encoded()
    storage_admit(
        encoded,
        owner_id=owner_id,
        lane_id=None,
        seq_id=None,
        idempotency_key=custom_loss_id(session_id, seq_id),
    )
    # One upload at a time, so that a request and its repeat do not both insert the row.
    Session.objects.select_for_update(no_key=True).get(pk=session.pk)
    future = future_record(
        owner_id=owner_id,
        queue=base_model_get(None).queue,
        kind=request.kind,
        payload=encoded,
        result=CreateCustomLossResult(loss_id=custom_loss_id(session_id, seq_id)).encoded(),
        idempotency_key=custom_loss_id(session_id, seq_id),
        summary=request.summary,
    )
    CustomLoss.objects.get_or_create(
        session=session,
        seq_id=seq_id,
        defaults={"name": name, "inputs": list(inputs), "graph": dict(graph)},
    )
    return future


def custom_loss_refuse(
    *, owner_id: int, session_id: str, seq_id: int, body_digest: str, refusal: Refusal
) -> Future:
    """A failed future for an upload that cannot be accepted; its number is used.

    Raises:
        SessionNotFound: (404)
        SessionFinished: (400)
        IdempotencyKeyReused: The session used the number for something else. (422)
    """
    session_open(owner_id=owner_id, session_id=session_id)
    return future_submit(
        owner_id=owner_id,
        queue=base_model_get(None).queue,
        kind=CreateCustomLoss.kind,
        payload={"body_digest": body_digest},
        idempotency_key=custom_loss_id(session_id, seq_id),
        refusal=refusal,
    )


def custom_loss_check(
    *, owner_id: int, model_id: str, loss_id: str, data: Sequence[Example]
) -> None:
    """Check that the model's session has this loss, and every datum the loss's inputs.

    Raises:
        RunNotFound: (404)
        InvalidRequest: No such loss. (400)
        InvalidDatum: An input is missing or has another rank than the loss declared. (400)
    """
    run = run_get(owner_id=owner_id, model_id=model_id)
    loss = custom_loss_get(session_id=run.session_id, loss_id=loss_id)
    # The first is logprobs, which are computed and shaped like the targets.
    ranks = {item["name"]: item["rank"] for item in loss.inputs[1:]}
    ranks["target_tokens"] = loss.inputs[0]["rank"]
    for index, datum in enumerate(data):
        if isinstance(datum, Conversation):
            raise InvalidDatum(f"data[{index}]: a custom loss needs token-level datums")
        for name, rank in ranks.items():
            place = f"data[{index}].loss_fn_inputs.{name}"
            array = datum.loss_fn_inputs.get(name)
            if array is None:
                raise InvalidDatum(
                    f"{place}: the custom loss {loss.name!r} reads it; it is missing"
                )
            # A scalar travels as one value without a shape.
            if not (array.ndim == rank or (rank == 0 and array.size == 1)):
                raise InvalidDatum(
                    f"{place}: {array.ndim} dimensions; the custom loss {loss.name!r} reads {rank}"
                )


def custom_loss_id(session_id: str, seq_id: int) -> str:
    """The id of an uploaded loss in ``loss_fn_config``; ``custom_loss_get`` finds it."""
    return f"{session_id}:loss:{seq_id}"
