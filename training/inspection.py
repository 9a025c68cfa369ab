"""Training examples and samples token by token, for people.

Reads one stored request and its result. Tokens become text by the table that the worker stored
(``training.vocabulary``), so no tokenizer is loaded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

from numpy.typing import NDArray

from futures.models import Future
from futures.payload import decode
from futures.transitions import State
from training.base_models import base_model_get
from training.errors import BaseModelNotFound
from training.kinds import (
    ForwardBackward,
    ForwardBackwardResult,
    Kind,
    Sample,
    SampleResult,
    stored_request,
    stored_result,
)
from training.models import RenderedData, Run
from training.token_view import TokenView, example_view, sample_view
from training.types import Datum
from training.vocabulary import TokenTable, vocabulary_find

MAX_BYTES = 64 * 1024**2
"""Larger requests, compressed and with their results, are not shown."""


@dataclass(frozen=True, kw_only=True)
class InspectedPass:
    """One datum of a forward or forward_backward."""

    future: Future
    loss_fn: str
    num_datums: int
    number: int
    view: TokenView


def passes_listed(run: Run, *, limit: int) -> list[Future]:
    """The newest passes of a run whose requests are stored, without their bodies."""
    return list(_passes(run).order_by("-seq_id")[:limit])


def pass_neighbours(run: Run, seq_id: int) -> tuple[str | None, str | None]:
    """The ids of the passes before and after the one of this number."""
    before = _passes(run).filter(seq_id__lt=seq_id).order_by("-seq_id")
    after = _passes(run).filter(seq_id__gt=seq_id).order_by("seq_id")
    return _first_id(before), _first_id(after)


def pass_inspect(run: Run, *, request_id: str | None, number: int) -> InspectedPass | None:
    """One datum of a pass of a run; None if there is no such pass, or its request was pruned
    or is very large.

    Args:
        request_id: None for the newest pass.
        number: Of the datum; one beyond the last is the last.
    """
    passes = Future.objects.filter(
        lane_id=run.pk, kind__in=[Kind.FORWARD, Kind.FORWARD_BACKWARD], payload__isnull=False
    )
    if request_id is not None:
        passes = passes.filter(pk=request_id)
    future = passes.order_by("-seq_id").first()
    if future is None or _is_large(future):
        return None
    request = cast(ForwardBackward, stored_request(future.kind, bytes(future.payload or b"")))
    number = min(number, len(request.data) - 1)
    logprobs = _trained_logprobs(future)
    own = logprobs[number] if number < len(logprobs) else None
    item = request.data[number]
    return InspectedPass(
        future=future,
        loss_fn=request.loss_fn,
        num_datums=len(request.data),
        number=number,
        view=example_view(item, own, token_table_of(run), _rendered(future, number)),
    )


def _rendered(future: Future, number: int) -> Datum | None:
    """The tokens that the worker made of one example; None if it was sent as tokens."""
    row = RenderedData.objects.filter(pk=future.pk).first()
    examples = decode(bytes(row.data)) if row is not None else []
    return Datum(**examples[number]) if number < len(examples) else None


def sample_inspect(run: Run, future: Future, *, number: int) -> TokenView | None:
    """One sequence of a finished sample, with its prompt; None if its bodies were pruned."""
    if future.payload is None or future.result is None or _is_large(future):
        return None
    request = cast(Sample, stored_request(future.kind, bytes(future.payload)))
    result = cast(SampleResult, stored_result(future.kind, bytes(future.result)))
    if not 0 <= number < len(result.sequences):
        return None
    prompt = request.prompts[min(number // request.num_samples, len(request.prompts) - 1)]
    return sample_view(prompt, result.sequences[number], token_table_of(run))


def token_table_of(run: Run) -> TokenTable | None:
    """The tokens of a run's base model; None until its worker has stored them."""
    try:
        return vocabulary_find(base_model_get(run.base_model).queue)
    except BaseModelNotFound:
        return None


def _is_large(future: Future) -> bool:
    """Whether its bodies would take too much memory of the web process."""
    return len(future.payload or b"") + len(future.result or b"") > MAX_BYTES


def _trained_logprobs(future: Future) -> list[NDArray[Any]]:
    """The trainer's log-probabilities of each datum; none unless the pass is finished."""
    if future.state != State.READY or future.result is None:
        return []
    result = cast(ForwardBackwardResult, stored_result(future.kind, bytes(future.result)))
    return list(result.logprobs)


def _passes(run: Run) -> Any:
    """The passes of a run that can be shown, without their bodies."""
    return Future.objects.without_bodies().filter(
        lane_id=run.pk,
        kind__in=[Kind.FORWARD, Kind.FORWARD_BACKWARD],
        pruned_at__isnull=True,
    )


def _first_id(futures: Any) -> str | None:
    found: str | None = futures.values_list("pk", flat=True).first()
    return found
