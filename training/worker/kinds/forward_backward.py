"""forward and forward_backward: losses of some data, with or without their gradients.

Requests of many runs share a pass over the base model, so these kinds run together.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from futures.finishing import Outcome
from futures.models import Future
from training.custom_loss_graph import CustomLossGraph, check_graph, graph_as_sent
from training.engine.interface import ForwardBackwardJob, Trainer
from training.errors import TrainingError
from training.kinds import ForwardBackward, ForwardBackwardResult, Kind
from training.loss_fns import (
    ADVANTAGES,
    DEFAULT_LOSS_FN,
    LOSS_FNS,
    STABLE_REINFORCE,
    TARGET_TOKENS,
    takes_advantages,
)
from training.models import Run
from training.pass_figures import pass_figures
from training.selectors import custom_loss_get
from training.services.rollouts import RenderedRequest, rollouts_join
from training.types import Datum, ForwardBackwardOutput, PassMemory
from training.worker import outcomes
from training.worker.effects import Effects
from training.worker.rollouts import sequence_advantages
from training.worker.text_work import Item

MAX_SHOWN_TOKENS = 1_000_000
"""The tokens of a larger request that was sent as text are not kept for people."""


@dataclass(frozen=True, kw_only=True)
class PassAnswer:
    """The trainer's result for one request."""

    data: Sequence[Datum]
    """The request's data as tokens, in order; empty if it could not be rendered."""
    output: ForwardBackwardOutput | TrainingError


TakeTokens = Callable[[Future, ForwardBackward], Sequence[Item]]
"""The datums of a request in tokens; ``Texts.take``, or ``Texts.render`` in a replay."""


def apply(
    trainer: Trainer,
    requests: Sequence[tuple[str, Future, ForwardBackward]],
    take_tokens: TakeTokens,
    *,
    is_replay: bool = False,
) -> list[PassAnswer]:
    """Run requests of these adapters together; one bad future fails alone.

    Args:
        is_replay: The requests were answered before, and are computed again to rebuild a run.

    Returns:
        One answer per request, in order.
    """
    errors: dict[int, TrainingError] = {}
    jobs: dict[int, ForwardBackwardJob] = {}
    for number, (adapter_name, future, request) in enumerate(requests):
        try:
            items = take_tokens(future, request) if request.has_text else request.data
            jobs[number] = ForwardBackwardJob(
                adapter_name=adapter_name,
                data=[item for item in items if isinstance(item, Datum)],
                loss_fn=request.loss_fn,
                loss_fn_config=request.loss_fn_config,
                forward_only=request.kind == Kind.FORWARD,
                custom_loss=_custom_loss(request.loss_id),
                is_replay=is_replay,
            )
        except TrainingError as error:
            errors[number] = error
    outputs = trainer.forward_backward(list(jobs.values())) if jobs else []
    answers = {number: PassAnswer(data=[], output=error) for number, error in errors.items()}
    for (number, job), output in zip(jobs.items(), outputs, strict=True):
        answers[number] = PassAnswer(data=job.data, output=output)
    return [answers[number] for number in range(len(requests))]


def run(
    trainer: Trainer,
    requests: Sequence[tuple[Run, Future, ForwardBackward]],
    take_tokens: TakeTokens,
    effects: Effects,
) -> None:
    """Run requests of runs whose adapters are in memory, and record their outcomes."""
    begin = time.monotonic()
    asked = [(run.id, future, request) for run, future, request in requests]
    answers = apply(trainer, asked, take_tokens)
    seconds = time.monotonic() - begin
    total = sum(future.cost for _, future, _ in requests)
    for (run, future, request), answer in zip(requests, answers, strict=True):
        if isinstance(answer.output, TrainingError):
            effects.outcomes.append(outcomes.failed(future, answer.output))
            continue
        figures = {}
        if takes_advantages(request.loss_fn):
            figures = pass_figures(
                answer.data,
                answer.output.logprobs,
                loss_fn=request.loss_fn,
                loss_fn_config=request.loss_fn_config,
            )
        facts = _Facts.of(request.loss_fn, answer.data)
        memory = _memory_figures(answer.output.memory)
        outcome = _ready(
            run, outcomes.backend(trainer), future, facts, answer.output, {**figures, **memory}
        )
        effects.outcomes.append(outcome)
        if request.has_text and facts.num_tokens <= MAX_SHOWN_TOKENS:
            effects.rendered.append(
                RenderedRequest(run_id=run.id, request_id=future.id, data=answer.data)
            )
        if figures and future.kind == Kind.FORWARD_BACKWARD:
            join = partial(
                rollouts_join,
                run_id=run.id,
                request_id=future.id,
                advantages=sequence_advantages(answer.data),
            )
            effects.writes.append((future, join))
        if future.kind == Kind.FORWARD_BACKWARD:
            run.tokens += outcome.summary["tokens"]
            effects.changed(run, future, seconds * future.cost / total)


def _memory_figures(memory: PassMemory | None) -> dict[str, float]:
    """The memory of a large pass, for its summary."""
    if memory is None:
        return {}
    figures: dict[str, float] = {
        "planned_bytes": memory.planned_bytes,
        "recomputed": memory.recomputed,
    }
    return figures if memory.peak_bytes is None else {**figures, "peak_bytes": memory.peak_bytes}


def _custom_loss(loss_id: str | None) -> CustomLossGraph | None:
    """The uploaded loss that a request names; permission was checked at the submission.

    Its id contains its session, because a replay's run may have no session.

    Raises:
        InvalidRequest: It was deleted.
    """
    if loss_id is None:
        return None
    row = custom_loss_get(session_id=loss_id.rpartition(":loss:")[0], loss_id=loss_id)
    return check_graph(row.name, row.inputs, graph_as_sent(row.graph))


def _ready(
    run: Run,
    backend: str,
    future: Future,
    facts: _Facts,
    output: ForwardBackwardOutput,
    figures: Mapping[str, float],
) -> Outcome:
    """The request's result; its summary has the figures too."""
    loss = output.loss / facts.divisor
    metrics = {
        **output.metrics,
        "loss:sum": output.loss,
        **{f"not_read/{name}:sum": count for name, count in facts.not_read.items()},
    }
    if facts.loss_fn == STABLE_REINFORCE:
        # Two names, because the SDK only shows metrics whose reduction it knows.
        metrics |= {"stable_reinforce:ours": 1, "stable_reinforce/ours:min": 1}
    if facts.loss_fn == DEFAULT_LOSS_FN:
        metrics["perplexity"] = math.exp(min(loss, 700.0))  # exp(710) overflows
    result = ForwardBackwardResult(
        model_id=run.name,
        backend=backend,
        loss=loss,
        num_tokens=facts.num_tokens,
        num_weighted_tokens=facts.num_weighted_tokens,
        metrics=metrics,
        logprobs=output.logprobs,
    )
    return outcomes.ready(
        future,
        result,
        tokens=facts.num_tokens,
        trained_tokens=facts.num_weighted_tokens,
        loss=loss,
        **figures,
    )


@dataclass(frozen=True, kw_only=True)
class _Facts:
    """Counts over a request's data, for its answer."""

    loss_fn: str
    num_tokens: int
    num_weighted_tokens: int
    """Trained tokens: the weight (cross_entropy) or advantage (the others) is not zero."""
    divisor: float
    """The loss's sum by this is its mean. That of cross_entropy is weighted: sum(-w * lp) / sum(w),
    or per trained token if the sum of the weights is not positive."""
    not_read: Mapping[str, int]
    """The datums that have an input which the loss does not read, by its name."""

    @classmethod
    def of(cls, loss_fn: str, data: Sequence[Datum]) -> _Facts:
        spec = LOSS_FNS.get(loss_fn)  # None for a client's own
        factor_name = spec.factor if spec else ADVANTAGES
        num_weighted, total, not_read = 0, 0.0, Counter[str]()
        for datum in data:
            inputs = datum.loss_fn_inputs
            factor = inputs.get(factor_name)
            if factor is None:  # 1 for each target; with a custom loss 1 for each token
                factor = np.ones(inputs[TARGET_TOKENS].shape if spec else len(datum.model_input))
            num_weighted += int(np.count_nonzero(factor))
            total += float(factor.sum(dtype=np.float64))
            not_read.update(name for name in inputs if spec and not spec.takes(name))
        is_weighted = spec is not None and spec.mean_is_weighted and total > 0
        return cls(
            loss_fn=loss_fn,
            num_tokens=sum(len(datum.model_input) for datum in data),
            num_weighted_tokens=num_weighted,
            divisor=total if is_weighted else max(num_weighted, 1),
            not_read=dict(sorted(not_read.items())),
        )
