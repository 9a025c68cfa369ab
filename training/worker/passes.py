"""forward and forward_backward futures as one call of the trainer, and its answers as theirs.

Used for new requests and for the replay of old ones, so that both compute the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from futures.models import Future
from futures.payload import decode
from training.custom_loss_graph import CustomLossGraph, check_graph, graph_as_sent
from training.engine.interface import ForwardBackwardJob, Trainer
from training.errors import TrainingError
from training.kinds import Kind
from training.selectors import custom_loss_get
from training.types import Datum, ForwardBackwardOutput
from training.worker.text_work import Item


@dataclass(frozen=True, kw_only=True)
class PassAnswer:
    """What the trainer said of one future."""

    future: Future
    loss_fn: str
    data: list[Datum]
    """The future's data as tokens, in order; empty if it could not be rendered."""
    output: ForwardBackwardOutput | TrainingError


TakeTokens = Callable[[Future, Mapping[str, Any]], Sequence[Item]]
"""The datums of a future with this payload, in tokens; ``Texts.take``, or ``Texts.render``
in a replay."""


def run_passes(
    trainer: Trainer,
    requests: Sequence[tuple[str, Future]],
    take_tokens: TakeTokens,
    *,
    is_replay: bool = False,
) -> list[PassAnswer]:
    """Run (adapter name, future) pairs together; one bad future fails alone.

    Args:
        is_replay: They were answered before, and are computed again to rebuild a run.

    Returns:
        One answer per pair, in order.
    """
    answers: list[PassAnswer | None] = []
    jobs: list[ForwardBackwardJob] = []
    for adapter_name, future in requests:
        payload = decode(bytes(future.payload or b""))
        try:
            items = take_tokens(future, payload)
            data = [item for item in items if isinstance(item, Datum)]
            custom_loss = _custom_loss(payload.get("loss_id"))
        except TrainingError as error:
            answers.append(
                PassAnswer(future=future, loss_fn=payload["loss_fn"], data=[], output=error)
            )
            continue
        answers.append(None)
        jobs.append(
            ForwardBackwardJob(
                adapter_name=adapter_name,
                data=data,
                loss_fn=payload["loss_fn"],
                loss_fn_config=payload["loss_fn_config"],
                forward_only=future.kind == Kind.FORWARD,
                custom_loss=custom_loss,
                is_replay=is_replay,
            )
        )
    outputs = iter(zip(jobs, trainer.forward_backward(jobs) if jobs else [], strict=True))
    complete = []
    for (_, future), answer in zip(requests, answers, strict=True):
        if answer is None:
            job, output = next(outputs)
            answer = PassAnswer(
                future=future, loss_fn=job.loss_fn, data=list(job.data), output=output
            )
        complete.append(answer)
    return complete


def _custom_loss(loss_id: str | None) -> CustomLossGraph | None:
    """The uploaded loss that a request names; that it may, was checked when it was submitted.

    Its session is part of its id: a replay asks for it from a run of no session.

    Raises:
        InvalidRequest: It is gone.
    """
    if loss_id is None:
        return None
    row = custom_loss_get(session_id=loss_id.rpartition(":loss:")[0], loss_id=loss_id)
    return check_graph(row.name, row.inputs, graph_as_sent(row.graph))
