"""The output head in training: target log-probabilities and their gradient, chunk by chunk.

The (tokens x vocabulary) matrix never exists. While a chunk of logits exists, the loss of its
rows is computed and its gradient is propagated to the hidden states and to the head's adapter, so
no logits are computed twice:

    d loss / d logits = sum over k of g_k * (onehot(target_k) - softmax(logits))

with g_k = d loss / d log p(target_k), summed over the tokens that share the row and its targets.
Rows whose g is zero (for example a prompt's) end there on a CPU; a GPU is not asked which they are,
because the host would wait for the answer. A loss that is not elementwise needs a
datum's log-probabilities all at once: the chunks with such datums are passed through the head once
before, only for these.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import pad

from training.custom_loss_graph import CustomLossGraph
from training.engine.custom_loss.run import CustomLossInputs, CustomLossRunner, Outcome, Work
from training.engine.torch.base_model import BaseModel
from training.engine.torch.frozen_products import times_frozen
from training.engine.torch.lora_linear import add_product, row_parts
from training.engine.torch.losses import LossInputs, loss_and_slope
from training.engine.torch.packing.micro_batches import LossSpan, PackedDatum
from training.engine.torch.packing.plan import PlannedJob
from training.engine.torch.packing.stream import MIN_ROWS, Segment
from training.engine.torch.to_device import to_device
from training.errors import TrainingError
from training.loss_fns import LOSS_FNS, TARGET_TOKENS

CHUNK_BYTES = 64 * 2**20
"""Most memory of one chunk of float32 logits."""


@dataclass(frozen=True, kw_only=True, eq=False)
class HeadInputs:
    """A micro-batch's inputs for S rows and N tokens; tensors are on the model's device."""

    targets: Tensor
    """(S, K) int64"""
    places: NDArray[np.int64]
    """(N,), the row of each token."""
    inputs: Mapping[str, Tensor]
    """(N, K) float32 by name"""
    loss_spans: Sequence[LossSpan]
    work: Mapping[PlannedJob, Work]
    """The cost of jobs with custom losses so far, including earlier micro-batches."""
    custom_losses: CustomLossRunner

    def tokens(self, within: slice, rows: slice) -> Tensor:
        """(n,) int64, those of the tokens ``within`` whose row is one of ``rows``, in order."""
        places = self.places[within]
        is_here = (places >= rows.start) & (places < rows.stop)
        tokens = np.flatnonzero(is_here) + within.start
        return to_device(tokens, self.targets.device)


class HeadOutput:
    """The head's results, filled row by row."""

    def __init__(self, hidden: Tensor, places: NDArray[np.int64], num_targets: int) -> None:
        self._places = to_device(places, hidden.device)
        self.row_logprobs = hidden.new_zeros((len(hidden), num_targets), dtype=torch.float32)
        """(S, K), in nats"""
        self.grad_logprobs = torch.zeros_like(self.row_logprobs)
        """(S, K), d loss / d log-probability; zero at padded targets."""
        self.grad_hidden = torch.zeros_like(hidden)
        """(S, C), d loss / d hidden; zero where no row trains."""
        self.loss = hidden.new_zeros(len(places), dtype=torch.float32)
        """(N,), summed over K"""
        self.custom: dict[PackedDatum, Outcome] = {}
        """Results of custom losses for their datums. After an error, the datum's tokens have no
        loss and no gradient."""

    def target_logprobs(self, tokens: Tensor | slice = slice(None)) -> Tensor:
        """(n, K) float32 of these tokens, in nats; all by default."""
        return self.row_logprobs[self._places[tokens]]

    def add_grad_logprobs(self, tokens: Tensor | slice, grad_logprobs: Tensor) -> None:
        """Add d loss / d log-probability (n, k) of these tokens' first k targets."""
        self.grad_logprobs[:, : grad_logprobs.shape[1]].index_add_(
            0, self._places[tokens], grad_logprobs
        )


@torch.no_grad()
def score_targets(
    base_model: BaseModel, hidden: Tensor, segments: Sequence[Segment], inputs: HeadInputs
) -> HeadOutput:
    """Log-probabilities and loss of all tokens, and the gradient of rows whose segment trains.

    The gradient of the head's own adapter is added to each segment's gradient buffer.

    Args:
        hidden: (S, C); not read by autograd.
        segments: Cover 0..S.
    """
    output = HeadOutput(hidden, inputs.places, inputs.targets.shape[1])
    chunks = list(_chunks(segments, max(1, CHUNK_BYTES // (4 * base_model.info.vocab_size))))

    def chunk_of(rows: slice) -> _Chunk:
        return _Chunk(base_model, hidden[rows], _cut(segments, rows), inputs.targets[rows])

    whole = [span for span in inputs.loss_spans if span.whole is not None]
    if whole:
        for rows in chunks:
            if any(len(inputs.tokens(span.tokens, rows)) for span in whole):
                output.row_logprobs[rows] = chunk_of(rows).logprobs()
        _differentiate_whole(whole, inputs, output)
    elementwise = [span for span in inputs.loss_spans if span.whole is None]
    for rows in chunks:
        chunk = chunk_of(rows)
        output.row_logprobs[rows] = chunk.logprobs()
        for span in elementwise:
            _differentiate(span, inputs.tokens(span.tokens, rows), inputs, output)
        if any(segment.grad is not None for segment in chunk.segments):
            output.grad_hidden[rows] = chunk.backward(output.grad_logprobs[rows])
    return output


class _Chunk:
    """Some rows and their logits, n rows: at least ``MIN_ROWS``, zeros after the n' real ones."""

    def __init__(
        self, base_model: BaseModel, hidden: Tensor, segments: Sequence[Segment], targets: Tensor
    ) -> None:
        """
        Args:
            hidden: (n', C)
            segments: Cover 0..n'.
            targets: (n', K)
        """
        self._base_model = base_model
        self.segments = segments
        self._num_rows = len(hidden)
        self._padding = (0, 0, 0, max(0, MIN_ROWS - len(hidden)))
        self._hidden = pad(hidden, self._padding)  # (n, C)
        self._targets = pad(targets, self._padding)  # (n, K)
        logits = base_model.logits(self._hidden, segments)  # (n, V)
        is_trained = any(segment.grad is not None for segment in segments)
        self._slope = base_model.logit_shape.slope(logits) if is_trained else 1.0
        # The sampler's function, whose bits for a row depend on that row alone; in place.
        self._team = base_model.holder.team
        self._team.run(
            [
                partial(torch.log_softmax, logits[part], -1, out=logits[part])
                for part in row_parts(self._team, logits)
            ]
        )
        self._logprobs = logits  # (n, V)

    def logprobs(self) -> Tensor:
        """(n', K) the log-probabilities of the targets."""
        return self._logprobs.gather(1, self._targets)[: self._num_rows]

    def backward(self, grad_logprobs: Tensor) -> Tensor:
        """Propagate the gradient of the log-probabilities (n', K), which are overwritten.

        Returns:
            (n', C), d loss / d hidden.
        """
        base_model, hidden, targets = self._base_model, self._hidden, self._targets
        segments, slope, logprobs = self.segments, self._slope, self._logprobs
        grad_logprobs = pad(grad_logprobs, self._padding)
        grad_hidden = torch.zeros_like(hidden)
        active: Tensor | None = None
        if hidden.device.type == "cpu":  # elsewhere the host would wait to know their number
            active = grad_logprobs.any(-1).nonzero()[:, 0]  # (m,)
            if len(active) == 0:
                return grad_hidden[: self._num_rows]
        if active is not None and len(active) < len(grad_logprobs):
            segments = _pick(segments, active)
            hidden, logprobs, targets, grad_logprobs = (
                t[active] for t in (hidden, logprobs, targets, grad_logprobs)
            )
            slope = slope[active] if isinstance(slope, Tensor) else slope
        is_narrower = logprobs.dtype != hidden.dtype
        grad_logits = logprobs  # (m, V)
        if is_narrower:
            grad_logits = torch.empty_like(logprobs, dtype=hidden.dtype)

        def compute(part: slice) -> None:
            own = logprobs[part].exp_().mul_(-grad_logprobs[part].sum(-1, keepdim=True))
            own.scatter_add_(1, targets[part], grad_logprobs[part])
            if isinstance(slope, Tensor) or slope != 1.0:
                own.mul_(slope[part] if isinstance(slope, Tensor) else slope)
            if is_narrower:
                grad_logits[part] = own

        self._team.run([partial(compute, part) for part in self._team.parts(len(logprobs))])
        grad_rows = _backward_logits(base_model, hidden, segments, grad_logits)
        if active is None:
            return grad_rows[: self._num_rows]
        grad_hidden[active] = grad_rows
        return grad_hidden[: self._num_rows]


def _differentiate(span: LossSpan, tokens: Tensor, inputs: HeadInputs, output: HeadOutput) -> None:
    """Store the loss of these tokens (n,) of the span, and d loss / d log p."""
    if not len(tokens):
        return
    k = span.num_targets
    names = LOSS_FNS[span.loss_fn].float_inputs
    loss, grad_logprobs = loss_and_slope(
        span.loss_fn,
        LossInputs(
            target_logprobs=output.target_logprobs(tokens)[:, :k],
            inputs={name: inputs.inputs[name][tokens, :k] for name in names},
            config=span.config,
        ),
    )  # (n, K) each
    output.add_grad_logprobs(tokens, grad_logprobs)
    # A token whose derivative is infinite is marked by its loss.
    output.loss[tokens] = loss.where(grad_logprobs.isfinite(), grad_logprobs).sum(-1)


def _differentiate_whole(spans: Sequence[LossSpan], inputs: HeadInputs, output: HeadOutput) -> None:
    """The same for losses that are not elementwise, whose datums' log-probabilities are there."""
    _run_custom(spans, inputs, output)
    for span in spans:
        if span.whole is not None and span.whole in output.custom:
            _take_custom(span.whole, output)
        else:
            all_rows = slice(0, len(inputs.targets))
            _differentiate(span, inputs.tokens(span.tokens, all_rows), inputs, output)


def _run_custom(spans: Sequence[LossSpan], inputs: HeadInputs, output: HeadOutput) -> None:
    """Store the results of clients' own losses: one call for each job.

    They run on the CPU, where an index out of range is an error and does not break the device.
    """
    datums: dict[PlannedJob, list[PackedDatum]] = {}
    for span in spans:
        if span.whole is not None and span.whole.planned.job.custom_loss is not None:
            datums.setdefault(span.whole.planned, []).append(span.whole)
    for planned, own in datums.items():
        graph = planned.job.custom_loss
        assert graph is not None  # noqa: S101  (for mypy; chosen above)
        data = [_custom_inputs(packed, graph, output) for packed in own]
        outcomes = inputs.custom_losses(graph, data, inputs.work[planned])
        output.custom.update(zip(own, outcomes, strict=True))


def _custom_inputs(
    packed: PackedDatum, graph: CustomLossGraph, output: HeadOutput
) -> CustomLossInputs:
    given = packed.datum.loss_fn_inputs
    logprobs = output.target_logprobs(slice(packed.start, packed.end))[:, : packed.num_targets]
    others = {}
    for item in graph.inputs[1:]:
        tensor = torch.tensor(given[item.name])  # a copy: the array may be read-only
        others[item.name] = tensor.reshape(()) if item.rank == 0 else tensor
    return CustomLossInputs(
        logprobs=logprobs.cpu().reshape(given[TARGET_TOKENS].shape), others=others
    )


def _take_custom(packed: PackedDatum, output: HeadOutput) -> None:
    """Add the result of a client's own loss for a datum, whose first token gets the loss."""
    outcome = output.custom[packed]
    if isinstance(outcome, TrainingError):
        output.custom[packed] = type(outcome)(f"data[{packed.index}]: {outcome}")
        return
    grad = outcome.grad.reshape(-1, packed.num_targets)
    output.loss[packed.start] = outcome.loss
    output.add_grad_logprobs(
        slice(packed.start, packed.end), to_device(grad, output.grad_logprobs.device)
    )


def _backward_logits(
    base_model: BaseModel, hidden: Tensor, segments: Sequence[Segment], grad_logits: Tensor
) -> Tensor:
    """(m, C) d loss / d hidden, from hidden (m, C) and d loss / d head output (m, V).

    The gradient of the head's own adapter is added to each segment's gradient buffer.
    """
    num_rows = len(hidden)
    padded = pad(grad_logits, (0, 0, 0, max(0, MIN_ROWS - num_rows)))
    grad_rows = hidden.new_empty(len(padded), hidden.shape[1])

    def compute(part: slice) -> None:
        grad_rows[part] = times_frozen(padded[part], base_model.head_weight)

    team = base_model.holder.team
    team.run([partial(compute, part) for part in team.parts(len(padded))])
    grad_rows = grad_rows[:num_rows]
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
        if not base_model.adds_head_gradient:
            continue
        add_product(grad_a, gb.T, x)
        add_product(grad_b, g.T, x @ a.T, scale)
    return grad_rows


def _chunks(segments: Iterable[Segment], chunk_rows: int) -> Iterator[slice]:
    """Cut the rows into chunks, and each segment at the same places, whatever precedes it.

    A segment's gradient is a sum over chunks, so their boundaries affect its rounding.
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
    """The segments restricted to the rows ``active`` (m,), ascending."""
    picked = []
    for segment in segments:
        bounds = active.new_tensor([segment.start, segment.end])
        start, end = torch.searchsorted(active, bounds).tolist()
        if start < end:
            picked.append(_moved(segment, start, end))
    return picked


def _moved(segment: Segment, start: int, end: int) -> Segment:
    return Segment(start=start, end=end, weights=segment.weights, grad=segment.grad)
