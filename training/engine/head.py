"""The output head in training: target log-probabilities and their gradient, chunk by chunk.

The (tokens x vocabulary) matrix never exists. While a chunk of logits is there, the loss of its
rows is computed and its gradient pushed back to the hidden states and to the head's adapter, so
no logits are computed twice:

    d loss / d logits = sum over k of g_k * (onehot(target_k) - softmax(logits))

with g_k = d loss / d log p(target_k). Rows whose g is zero (a prompt's, say) end there. A loss
that is not elementwise needs a datum's log-probabilities all at once: the chunks that hold such
datums are passed through the head once before, for these alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import pad

from training.custom_loss_graph import CustomLossGraph
from training.engine.base_model import BaseModel
from training.engine.custom_loss import CustomLossOutput, Work, run_custom_loss
from training.engine.lora import add_product
from training.engine.losses import LOSSES, LossInputs
from training.engine.microbatches import LossSpan, PackedDatum, PlannedJob
from training.engine.packed import MIN_ROWS, Segment
from training.errors import TrainingError
from training.loss_fns import LOSS_FNS, TARGET_TOKENS

CHUNK_BYTES = 64 * 2**20
"""What one chunk of float32 logits may take."""


@dataclass(frozen=True, kw_only=True, eq=False)
class HeadInputs:
    """A micro-batch's targets as tensors on the model's device."""

    targets: Tensor
    """(T, K) int64"""
    inputs: Mapping[str, Tensor]
    """(T, K) float32 by name"""
    loss_spans: Sequence[LossSpan]
    work: Mapping[PlannedJob, Work]
    """What jobs with custom losses have cost so far, in earlier micro-batches too."""


@dataclass(frozen=True, kw_only=True, eq=False)
class HeadOutput:
    """What the head says about T rows."""

    target_logprobs: Tensor
    """(T, K) float32, in nats"""
    loss: Tensor
    """(T,) float32, summed over K"""
    grad_hidden: Tensor
    """(T, C), d loss / d hidden; zero where no row trains."""
    custom: dict[PackedDatum, CustomLossOutput | TrainingError] = field(default_factory=dict)
    """What custom losses said of their datums. An error's rows have no loss and no gradient."""


@torch.no_grad()
def score_targets(
    base_model: BaseModel, hidden: Tensor, segments: Sequence[Segment], inputs: HeadInputs
) -> HeadOutput:
    """Log-probabilities and loss of all rows, and the gradient of rows whose segment trains.

    The gradient of the head's own adapter is added to each segment's gradient buffer.

    Args:
        hidden: (T, C); not read by autograd.
        segments: Cover 0..T.
    """
    num_rows, num_targets = inputs.targets.shape
    output = HeadOutput(
        target_logprobs=hidden.new_zeros((num_rows, num_targets), dtype=torch.float32),
        loss=hidden.new_zeros(num_rows, dtype=torch.float32),
        grad_hidden=torch.zeros_like(hidden),
    )
    chunk_rows = max(1, CHUNK_BYTES // (4 * base_model.info.vocab_size))
    chunks = list(_chunks(segments, chunk_rows))
    whole = [span for span in inputs.loss_spans if span.whole is not None]
    for rows in chunks:
        if any(span.start < rows.stop and rows.start < span.end for span in whole):
            output.target_logprobs[rows] = _Chunk.of(base_model, hidden, segments, rows).scored(
                inputs.targets[rows]
            )
    seeds = torch.zeros_like(output.target_logprobs)  # (T, K), zero at filled-up targets
    for span in inputs.loss_spans:
        if span.whole is None:
            continue
        graph = span.whole.planned.job.custom_loss
        if graph is None:
            _differentiate(span, slice(span.start, span.end), inputs, output, seeds)
        else:
            _run_custom(span.whole, graph, inputs, output, seeds)
    elementwise = [span for span in inputs.loss_spans if span.whole is None]
    for rows in chunks:
        chunk = _Chunk.of(base_model, hidden, segments, rows)
        output.target_logprobs[rows] = chunk.scored(inputs.targets[rows])
        for span in elementwise:
            start, end = max(span.start, rows.start), min(span.end, rows.stop)
            if start < end:
                _differentiate(span, slice(start, end), inputs, output, seeds)
        if any(segment.grad is not None for segment in chunk.segments):
            grad_chunk = _backward_chunk(
                base_model,
                chunk.hidden,
                chunk.segments,
                logits=chunk.logits.sub_(chunk.log_norm),
                targets=_padded(inputs.targets[rows]),
                seed=_padded(seeds[rows]),
            )
            output.grad_hidden[rows] = grad_chunk[: rows.stop - rows.start]
    return output


@dataclass(frozen=True, kw_only=True, eq=False)
class _Chunk:
    """Some rows and their logits, n of them: at least ``MIN_ROWS``, zeros after the real ones."""

    hidden: Tensor
    """(n, C)"""
    segments: Sequence[Segment]
    logits: Tensor
    """(n, V)"""
    log_norm: Tensor
    """(n, 1)"""

    @classmethod
    def of(
        cls, base_model: BaseModel, hidden: Tensor, segments: Sequence[Segment], rows: slice
    ) -> _Chunk:
        segments = _cut(segments, rows)
        hidden = _padded(hidden[rows])
        logits = base_model.logits(hidden, segments)
        log_norm = logits.logsumexp(-1, keepdim=True)
        return cls(hidden=hidden, segments=segments, logits=logits, log_norm=log_norm)

    def scored(self, targets: Tensor) -> Tensor:
        """(n', K) the log-probabilities of the targets (n', K) of the real rows."""
        return (self.logits.gather(1, _padded(targets)) - self.log_norm)[: len(targets)]


def _differentiate(
    span: LossSpan, rows: slice, inputs: HeadInputs, output: HeadOutput, seeds: Tensor
) -> None:
    """Write the loss of these rows of the span, and d loss / d log p into ``seeds`` (T, K)."""
    k = span.num_targets
    names = LOSS_FNS[span.loss_fn].float_inputs
    with torch.enable_grad():
        leaf = output.target_logprobs[rows, :k].detach().requires_grad_()
        values = LOSSES[span.loss_fn](
            LossInputs(
                target_logprobs=leaf,
                inputs={name: inputs.inputs[name][rows, :k] for name in names},
                config=span.config,
            )
        )  # (n, K)
        (seeds[rows, :k],) = torch.autograd.grad(values.sum(), leaf)
    output.loss[rows] = values.detach().sum(-1)


def _run_custom(
    packed: PackedDatum,
    graph: CustomLossGraph,
    inputs: HeadInputs,
    output: HeadOutput,
    seeds: Tensor,
) -> None:
    """The same for a client's own loss of one datum; the datum's first row gets the loss.

    It runs on the CPU, where an index out of range is an error and not the end of the device.
    """
    rows, k = slice(packed.start, packed.end), packed.num_targets
    given = packed.datum.loss_fn_inputs
    logprobs = output.target_logprobs[rows, :k].cpu().reshape(given[TARGET_TOKENS].shape)
    values = {}
    for item in graph.inputs[1:]:
        tensor = torch.tensor(given[item.name])  # a copy: the array may be read-only
        values[item.name] = tensor.reshape(()) if item.rank == 0 else tensor
    try:
        result = run_custom_loss(graph, logprobs, values, inputs.work[packed.planned])
    except TrainingError as error:
        output.custom[packed] = type(error)(f"data[{packed.index}]: {error}")
        return
    output.custom[packed] = result
    output.loss[packed.start] = result.loss
    seeds[rows, :k] = result.grad.reshape(-1, k).to(seeds.device)


def _backward_chunk(
    base_model: BaseModel,
    hidden: Tensor,
    segments: Sequence[Segment],
    *,
    logits: Tensor,
    targets: Tensor,
    seed: Tensor,
) -> Tensor:
    """Push one chunk's gradient on; ``logits`` (n, V) are normalised and used up.

    Returns:
        (n, C), d loss / d hidden.
    """
    grad_hidden = torch.zeros_like(hidden)
    active = seed.any(-1).nonzero()[:, 0]  # (m,)
    if len(active) == 0:
        return grad_hidden
    if len(active) < len(seed):
        segments = _pick(segments, active)
        hidden, logits, targets, seed = (t[active] for t in (hidden, logits, targets, seed))
    grad_logits = logits.exp_().mul_(-seed.sum(-1, keepdim=True))  # (m, V)
    grad_logits.scatter_add_(1, targets, seed)
    grad_logits = grad_logits.to(hidden.dtype)
    grad_rows = (_padded(grad_logits) @ base_model.head_weight)[: len(active)]  # (m, C)
    for segment in segments:
        pair = base_model.head_pair(segment.weights)
        if segment.weights is None or segment.grad is None or pair is None:
            continue
        a, b = pair
        grad_a, grad_b = segment.grad.layout.pair(segment.grad.flat, base_model.head_name)
        g, x = grad_logits[segment.rows], hidden[segment.rows]
        scale = segment.weights.layout.scale
        gb = (g @ b).mul_(scale)  # (m', R)
        grad_rows[segment.rows].addmm_(gb, a)
        add_product(grad_a, gb.T, x)
        add_product(grad_b, g.T, x @ a.T, scale)
    grad_hidden[active] = grad_rows
    return grad_hidden


def _padded(rows: Tensor) -> Tensor:
    """At least ``MIN_ROWS`` rows, zeros after the given ones."""
    return pad(rows, (0, 0, 0, max(0, MIN_ROWS - len(rows))))


def _chunks(segments: Iterable[Segment], chunk_rows: int) -> Iterator[slice]:
    """Cut the rows into chunks, and each segment at the same places whatever lies before it.

    A segment's gradient is a sum over chunks, so where they end is part of its rounding.
    """
    chunk_start = chunk_end = 0
    for segment in segments:
        for start in range(segment.start, segment.end, chunk_rows):
            end = min(start + chunk_rows, segment.end)
            if end - chunk_start > chunk_rows:
                yield slice(chunk_start, chunk_end)
                chunk_start = start
            chunk_end = end
    yield slice(chunk_start, chunk_end)


def _cut(segments: Iterable[Segment], rows: slice) -> list[Segment]:
    """The parts of the segments that lie in ``rows``, counted from its start."""
    cut = []
    for segment in segments:
        start, end = max(segment.start, rows.start), min(segment.end, rows.stop)
        if start < end:
            cut.append(_moved(segment, start - rows.start, end - rows.start))
    return cut


def _pick(segments: Iterable[Segment], active: Tensor) -> list[Segment]:
    """The segments over the rows ``active`` (m,), ascending, alone."""
    picked = []
    for segment in segments:
        bounds = active.new_tensor([segment.start, segment.end])
        start, end = torch.searchsorted(active, bounds).tolist()
        if start < end:
            picked.append(_moved(segment, start, end))
    return picked


def _moved(segment: Segment, start: int, end: int) -> Segment:
    return Segment(start=start, end=end, weights=segment.weights, grad=segment.grad)
