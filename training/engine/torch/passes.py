"""One pass over the base model for a list of checked jobs, and each job's result.

Each part of a micro-batch has a gradient of its own, and those of an adapter are added up in their
order, the accumulated one first. The caller gives the sums to the adapters if everything has
succeeded, or drops them: a failed pass changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from training.engine.custom_loss.run import CustomLossRunner, Outcome, Work
from training.engine.torch.adapters import Adapter, AdapterTensors
from training.engine.torch.at_once import compute_at_once, lots, plan_lot
from training.engine.torch.base_model import BaseModel
from training.engine.torch.gradient_sums import GradientSums
from training.engine.torch.lm_head import HeadInputs, HeadOutput, score_targets
from training.engine.torch.memory_plan import MemoryPlan, Planned
from training.engine.torch.packing.micro_batches import MicroBatch, PackedDatum, PartSpan
from training.engine.torch.packing.plan import PlannedJob
from training.engine.torch.packing.ranges import take_rows
from training.engine.torch.packing.stream import Segment
from training.engine.torch.peak_memory import PeakMemory
from training.engine.torch.sharding.rounds import rounds, run_beside_others
from training.engine.torch.to_device import to_device
from training.engine.torch.vision.placement import SequenceRows, place
from training.errors import NonFiniteResult, TrainingError
from training.types import ForwardBackwardOutput, PassMemory


@dataclass(kw_only=True, eq=False)
class JobScores:
    """One job's results of a pass, filled datum by datum."""

    logprobs: list[NDArray[np.float32]]
    """Per datum, shaped like its ``target_tokens``."""
    losses: list[float]
    """Per datum, summed over its tokens."""

    metric_sums: dict[str, float] = field(default_factory=dict)
    """A custom loss's metrics, summed over the datums, by name."""
    errors: dict[int, TrainingError] = field(default_factory=dict)
    """Errors of datums without a result, by index."""

    @property
    def error(self) -> TrainingError | None:
        """The error of the first datum without a result, or None."""
        return self.errors[min(self.errors)] if self.errors else None

    def output(self, memory: PassMemory | None = None) -> ForwardBackwardOutput:
        loss = float(sum(self.losses))
        metrics = {
            name: total / len(self.losses) if name.endswith(":mean") else total
            for name, total in self.metric_sums.items()
        }
        return ForwardBackwardOutput(
            loss=loss,
            logprobs=self.logprobs,
            metrics={**metrics, "loss:sum": loss},
            memory=memory,
        )

    def add(self, others: JobScores) -> None:
        """Add the results of datums that another rank has computed."""
        for index, logprobs in enumerate(others.logprobs):
            if logprobs.size:
                self.logprobs[index] = logprobs
                self.losses[index] = others.losses[index]
        self.errors |= others.errors
        for name, value in others.metric_sums.items():
            self.metric_sums[name] = self.metric_sums.get(name, 0.0) + value

    def add_custom(self, index: int, result: Outcome) -> None:
        """Add a custom loss's result for one datum."""
        if isinstance(result, TrainingError):
            self.errors[index] = result
            return
        for name, value in result.metrics.items():
            self.metric_sums[name] = self.metric_sums.get(name, 0.0) + value


@dataclass(kw_only=True, eq=False)
class PassResult:
    """Scores by job, and each adapter's gradient with this pass added, by name (empty if the
    pass only scored)."""

    scores: dict[PlannedJob, JobScores] = field(default_factory=dict)
    grads: dict[str, AdapterTensors] = field(default_factory=dict)
    memory: PassMemory | None = None
    """Of its largest micro-batch; None if none was planned."""


def run_pass(
    base_model: BaseModel,
    jobs: Sequence[PlannedJob],
    adapters: Mapping[str, Adapter],
    *,
    token_budget: int,
    trains: bool,
    custom_losses: CustomLossRunner,
    memory_plan: MemoryPlan,
) -> PassResult:
    """Score every datum of every job; with ``trains``, differentiate too.

    Args:
        adapters: Adapters by name, including those of the jobs.
        token_budget: Most tokens in one micro-batch.
        custom_losses: Computes clients' own losses.
        memory_plan: Says which micro-batches keep their activations.
    """
    result = PassResult()
    for planned in jobs:
        num_datums = len(planned.job.data)
        result.scores[planned] = JobScores(
            logprobs=[np.empty(0, np.float32)] * num_datums, losses=[0.0] * num_datums
        )
    scored: list[_Scored] = []
    sums = GradientSums(jobs if trains else (), adapters, base_model.group)
    work = {planned: Work(is_replay=planned.job.is_replay) for planned in jobs}

    def compute(batch: MicroBatch, *, recomputes: bool = False) -> tuple[_Scored, _PartGrads]:
        with torch.set_grad_enabled(trains):
            return _run_micro_batch(
                base_model, batch, adapters, work, custom_losses, recomputes=recomputes
            )

    def take(computed: tuple[_Scored, _PartGrads]) -> None:
        scores, grads = computed
        for part, grad in grads:
            sums.add(part, grad)
        scored.append(scores)

    def compute_alone(batch: MicroBatch | None, plan: Planned | None) -> None:
        recomputes = plan is not None and plan.recomputes
        with _memory_of(base_model, plan) as peak:
            if batch is None:
                with torch.set_grad_enabled(trains):
                    run_beside_others(base_model, recomputes=recomputes)
                return
            computed = compute(batch, recomputes=recomputes)
            result.memory = _larger(result.memory, plan, peak)
        take(computed)

    in_turn = rounds(base_model, jobs, adapters, token_budget, memory_plan, trains=trains)
    for lot in lots(base_model, in_turn):
        batches = [batch for batch, _ in lot if batch is not None]
        count, plan = plan_lot(base_model, batches, adapters, memory_plan, trains=trains)
        if count == 1:
            for batch, own_plan in lot:
                compute_alone(batch, own_plan)
            continue
        result.memory = _larger(result.memory, plan, None)
        for name in {span.part[0] for batch in batches for span in batch.part_spans}:
            # Converted once, before several threads ask for it.
            adapters[name].weights.pair(base_model.head_name, base_model.dtype)
        compute_at_once(base_model, [partial(compute, batch) for batch in batches], take, count)
    # All passes have been asked for: only now does the host wait for a GPU.
    for each in scored:
        _scatter_scores(each, result.scores)
    result.grads = sums.finish(base_model)
    group = base_model.group
    if group is not None and base_model.divides_passes:
        own = list(result.scores.values())
        for rank, scores in enumerate(group.gather(own)):
            if rank != group.rank:
                for ours, others in zip(own, scores, strict=True):
                    ours.add(others)
    return result


def _memory_of(
    base_model: BaseModel, planned: Planned | None
) -> AbstractContextManager[PeakMemory | None]:
    """Measures the peak of a planned micro-batch, where that costs nothing or saves memory."""
    if planned is None or not (planned.recomputes or base_model.device.type == "cuda"):
        return nullcontext()
    return PeakMemory(base_model.device)


def _larger(
    so_far: PassMemory | None, planned: Planned | None, peak: PeakMemory | None
) -> PassMemory | None:
    if planned is None or (so_far is not None and so_far.planned_bytes >= planned.num_bytes):
        return so_far
    return PassMemory(
        planned_bytes=planned.num_bytes,
        peak_bytes=None if peak is None else peak.peak_bytes(),
        recomputed=planned.recomputes,
    )


_PartGrads = list[tuple[tuple[str, int], AdapterTensors]]
"""A micro-batch's gradients of its parts, in order; empty if the pass only scores."""


def _run_micro_batch(
    base_model: BaseModel,
    batch: MicroBatch,
    adapters: Mapping[str, Adapter],
    work: Mapping[PlannedJob, Work],
    custom_losses: CustomLossRunner,
    *,
    recomputes: bool,
) -> tuple[_Scored, _PartGrads]:
    weights = [adapters[span.part[0]].weights for span in batch.part_spans]
    grads: list[AdapterTensors | None] = [None] * len(weights)
    if torch.is_grad_enabled():
        grads = [AdapterTensors(each.layout, torch.zeros_like(each.flat)) for each in weights]

    def segments(bounds: Callable[[PartSpan], tuple[int, int]]) -> list[Segment]:
        return [
            Segment(
                start=bounds(span)[0],
                end=bounds(span)[1],
                weights=own,
                grad=grad,
            )
            for span, own, grad in zip(batch.part_spans, weights, grads, strict=True)
        ]

    device = base_model.device
    is_long = batch.rows_longer_than(base_model.rotary_switch)
    position_ids = to_device(batch.position_ids, device)
    images = None
    if base_model.vision is not None:
        images, position_ids = place(base_model.vision, _with_images(batch), position_ids)
    hidden = base_model.sequence_states(
        to_device(batch.tokens, device),
        position_ids,
        segments(lambda span: span.rows),
        batch.row_ranges,
        None if is_long is None else to_device(is_long, device),
        images,
        recomputes=recomputes,
    )  # (T, C)
    scored = take_rows(hidden, to_device(batch.scored_rows, device))  # (S, C)
    head = score_targets(
        base_model,
        scored.detach(),
        segments(lambda span: span.scored),
        HeadInputs(
            targets=to_device(batch.targets, device),
            places=batch.places,
            inputs={n: to_device(v, device) for n, v in batch.inputs.items()},
            loss_spans=batch.loss_spans,
            work=work,
            custom_losses=custom_losses,
        ),
    )
    if scored.requires_grad:
        scored.backward(head.grad_hidden)
    parts = [span.part for span in batch.part_spans]
    of_parts = [(part, grad) for part, grad in zip(parts, grads, strict=True) if grad is not None]
    return _Scored.of(batch, head), of_parts


def _with_images(batch: MicroBatch) -> Iterator[SequenceRows]:
    """The datums with images."""
    for packed in batch.datums:
        if packed.datum.images:
            yield SequenceRows(
                tokens=packed.datum.model_input,
                images=packed.datum.images,
                start=0,
                rows=np.concatenate([np.arange(r.start, r.end) for r in packed.row_ranges]),
            )


@dataclass(frozen=True, kw_only=True, eq=False)
class _Scored:
    """A micro-batch's results, still on its device."""

    batch: MicroBatch
    logprobs: Tensor
    """(N, K) float32"""
    losses: Tensor
    """(N,) float32"""
    custom: Mapping[PackedDatum, Outcome]

    @classmethod
    def of(cls, batch: MicroBatch, head: HeadOutput) -> _Scored:
        return cls(
            batch=batch, logprobs=head.target_logprobs(), losses=head.loss, custom=head.custom
        )


def _scatter_scores(scored: _Scored, scores: Mapping[PlannedJob, JobScores]) -> None:
    batch = scored.batch
    logprobs = scored.logprobs.cpu().numpy()  # (N, K)
    losses = scored.losses.double().cpu().numpy()  # (N,)
    is_finite = np.isfinite(logprobs).all(axis=1) & np.isfinite(losses)  # padded targets included
    for packed in batch.datums:
        tokens = slice(packed.start, packed.end)
        own_logprobs = logprobs[tokens, : packed.num_targets]
        shape = packed.datum.loss_fn_inputs["target_tokens"].shape
        job_scores = scores[packed.planned]
        job_scores.logprobs[packed.index] = own_logprobs.reshape(shape).copy()
        job_scores.losses[packed.index] = float(losses[tokens].sum())
        if packed in scored.custom:
            job_scores.add_custom(packed.index, scored.custom[packed])
        if not is_finite[tokens].all():
            fault = _fault(packed, losses[tokens], own_logprobs)
            if fault is not None:
                job_scores.errors.setdefault(packed.index, fault)


def _fault(
    packed: PackedDatum, losses: NDArray[np.float64], logprobs: NDArray[np.float32]
) -> NonFiniteResult | None:
    """The error for a datum with a value that is not finite, with its position; None otherwise.

    Args:
        losses: (N,) of its tokens.
        logprobs: (N, K) of its targets.
    """
    has_logprobs = np.logical_and.reduce(np.isfinite(logprobs), axis=1)
    is_wrong = ~(has_logprobs & np.isfinite(losses))
    if not is_wrong.any():
        return None
    position = int(is_wrong.argmax())
    where = f"data[{packed.index}], position {position}"
    if not has_logprobs[position]:
        return NonFiniteResult(
            f"{where}: the model's log-probability of the target is {logprobs[position].min()}; "
            "the adapter's weights are too large"
        )
    names = [n for n in packed.planned.float_inputs if n in packed.datum.loss_fn_inputs]
    given = {"lp": logprobs} | {name: packed.datum.loss_fn_inputs[name] for name in names}
    values = ", ".join(f"{name} {_shown(array[position])}" for name, array in given.items())
    return NonFiniteResult(
        f"{where}: the loss or its gradient is outside float32: "
        f"{packed.planned.job.loss_fn} of {values}"
    )


def _shown(values: NDArray[Any] | np.generic) -> str:
    """One number, or the first few of K."""
    numbers = np.atleast_1d(values)
    shown = " ".join(f"{number:g}" for number in numbers[:3].tolist())
    return f"[{shown} ...]" if len(numbers) > 3 else shown
