"""Losses, gradients and optimizer steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain

from training.errors import InvalidDatum
from training.kinds import Forward, ForwardBackward, OptimStep
from training.loss_checks import check_loss
from training.loss_fns import STABLE_REINFORCE
from training.models import Run
from training.selectors import run_get
from training.services.custom_losses import custom_loss_check
from training.services.images import images_check
from training.services.recorded_samples import logprobs_resolve
from training.services.runs import run_get_or_create
from training.services.submission import Submission, run_asked, run_target, submit
from training.types import AdamParams, Datum, Example, Provenance, images_of


def forward_backward_submit(
    *,
    owner_id: int,
    model_id: str,
    data: Sequence[Example],
    loss_fn: str,
    loss_fn_config: Mapping[str, float],
    train_on: str = "auto",
    forward_only: bool = False,
    loss_id: str | None = None,
    provenance: Sequence[Provenance | None] = (),
    delayable: bool = False,
    seq_id: int | None = None,
    idempotency_key: str | None = None,
) -> Submission:
    """Submit a loss and, unless ``forward_only``, its gradient.

    The check that the data have the loss's inputs is made only here.

    An unknown ``model_id`` makes a run of that name on the default base model, so that a
    first request needs no set-up, unless the client numbers its requests itself.

    Args:
        loss_id: The uploaded loss of ``loss_fn="custom"``.
        provenance: The origin of each datum's tokens, for a loss that reads recorded samples.
        delayable: No client waits for the result: the worker may delay it a moment for
            batch-mates.
        seq_id: The client's number in the model's order; with None the server assigns the next.

    Raises:
        InvalidRequest: The loss does not exist, or its settings are wrong. (400)
        InvalidDatum: A datum does not fit the loss; the message names it. (400)
        RunNotFound: No such model, and ``seq_id`` was given. (404)
        LimitExceeded: The owner has reached the limit of adapters. (400)
        QueueFull: The owner has reached the limit of waiting futures. (429)
    """
    unrendered = (item for item in data if not isinstance(item, Datum))
    images_check(chain.from_iterable(map(images_of, unrendered)), "data")
    if provenance:
        _refuse_images(data)
        data = logprobs_resolve(
            owner_id=owner_id,
            model_id=model_id,
            data=[item for item in data if isinstance(item, Datum)],
            provenance=provenance,
        )
    if loss_id is not None:
        custom_loss_check(owner_id=owner_id, model_id=model_id, loss_id=loss_id, data=data)
    else:
        check_loss(
            loss_fn,
            loss_fn_config,
            data,
            forward_only=forward_only,
            has_provenance=bool(provenance),
        )
    if seq_id is None:
        run = run_get_or_create(owner_id, model_id, idempotency_key=idempotency_key)
    else:
        run = run_get(owner_id=owner_id, model_id=model_id)
    if loss_fn == STABLE_REINFORCE and not forward_only and not run.own_objective:
        Run.objects.filter(pk=run.pk).update(own_objective=True)
    return submit(
        (Forward if forward_only else ForwardBackward)(
            data=data,
            loss_fn=loss_fn,
            loss_fn_config=loss_fn_config,
            train_on=train_on,
            loss_id=loss_id,
        ),
        run_target(run, seq_id=seq_id),
        delayable=delayable,
        idempotency_key=idempotency_key,
    )


def _refuse_images(data: Sequence[Example]) -> None:
    """Refuse images beside provenance: a recorded sample has tokens only."""
    for index, item in enumerate(data):
        if images_of(item):
            raise InvalidDatum(
                f"data[{index}].model_input: has an image; {STABLE_REINFORCE} takes tokens only"
            )


def optim_step_submit(
    *,
    owner_id: int,
    model_id: str,
    adam_params: AdamParams,
    seq_id: int | None = None,
    idempotency_key: str | None = None,
) -> Submission:
    """Submit one AdamW step with the gradient accumulated so far.

    Raises:
        RunNotFound: (404)
    """
    run = run_asked(owner_id=owner_id, model_id=model_id, idempotency_key=idempotency_key)
    return submit(
        OptimStep(adam_params=adam_params),
        run_target(run, seq_id=seq_id),
        idempotency_key=idempotency_key,
    )
