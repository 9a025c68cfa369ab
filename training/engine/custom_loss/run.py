"""Runs a client's own loss on one datum: every node is an operation of a fixed table, with limits.

No client data is evaluated or looked up outside the table. The highest cost of an operation is
counted before it runs (``training.engine.custom_loss.costs``), and the operation is refused if it
is too
much. Work and size are counted, not timed, so that the same graph on the same data always ends the
same way. A worker does not run this itself: ``training.engine.custom_loss.process`` runs it in
a separate process, whose memory and time are limited too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from training.custom_loss_graph import CustomLossGraph, GraphNode, is_neutral
from training.custom_loss_limits import (
    MAX_DIMENSIONS,
    MAX_ELEMENTS,
    MAX_MULTIPLICATIONS,
    MAX_STEPS,
    MAX_TENSORS,
    MAX_TOTAL_ELEMENTS,
)
from training.custom_loss_ops import FUNCTIONS, METHODS
from training.engine.custom_loss.arguments import Call
from training.engine.custom_loss.cost import Cost, excess, made
from training.engine.custom_loss.costs import RULES
from training.engine.custom_loss.table import (
    DTYPE_TABLE,
    FUNCTION_TABLE,
    METHOD_TABLE,
    Refused,
    Value,
    described,
)
from training.engine.torch.out_of_memory import is_out_of_memory
from training.errors import InvalidRequest, LimitExceeded, NonFiniteResult, TrainingError


@dataclass(kw_only=True, eq=False)
class Work:
    """The cost of one request's datums so far."""

    num_elements: int = 0
    num_steps: int = 0
    num_multiplications: int = 0
    is_replay: bool = False
    """Whether it was computed before, so that its size is not checked; see
    ``training.custom_loss_limits.REPLAY_FACTOR``."""
    cpu_seconds: float = 0.0
    wall_seconds: float = 0.0
    """Measured by the process that runs it, and by the process that waits."""


@dataclass(frozen=True, kw_only=True, eq=False)
class CustomLossInputs:
    """The inputs of a custom loss for one datum."""

    logprobs: Tensor
    """(N,) or (N, K) float32, in nats."""
    others: Mapping[str, Tensor]
    """The graph's other inputs by name, on the same device."""


@dataclass(frozen=True, kw_only=True, eq=False)
class CustomLossOutput:
    """The result of a custom loss for one datum."""

    loss: float
    grad: Tensor
    """d loss / d logprobs, shaped like them."""
    metrics: dict[str, float]
    """Metrics by name, such as ``custom/kl:mean``."""


Outcome = CustomLossOutput | TrainingError


class CustomLossRunner(Protocol):
    """Computes a custom loss of some datums of one request."""

    def __call__(
        self, graph: CustomLossGraph, data: Sequence[CustomLossInputs], work: Work
    ) -> list[Outcome]:
        """One outcome per datum, in order; adds to ``work``.

        A failing datum fails alone, unless time or memory are used up: then the others of the
        call, and of later calls with this ``work``, fail too.
        """

    def prepare(self) -> bool:
        """Whether a call would begin at once. If not, its process is being started, and the caller
        need not wait for it."""

    def release(self) -> None:
        """Free resources that were not used for a long time."""


class CustomLossesHere:
    """A ``CustomLossRunner`` in this process: counted, but without a limit on time."""

    def __call__(
        self, graph: CustomLossGraph, data: Sequence[CustomLossInputs], work: Work
    ) -> list[Outcome]:
        return run_custom_losses(graph, data, work)

    def prepare(self) -> bool:
        return True

    def release(self) -> None:
        """Holds nothing."""


def run_custom_losses(
    graph: CustomLossGraph, data: Sequence[CustomLossInputs], work: Work
) -> list[Outcome]:
    """A runner that computes in this process, without limits on time or memory.

    For the separate process, and for tests.
    """
    outcomes: list[Outcome] = []
    for inputs in data:
        try:
            outcomes.append(run_custom_loss(graph, inputs.logprobs, inputs.others, work))
        except TrainingError as error:
            outcomes.append(error)
    return outcomes


def run_custom_loss(
    graph: CustomLossGraph, logprobs: Tensor, inputs: Mapping[str, Tensor], work: Work
) -> CustomLossOutput:
    """Value, gradient and metrics of one datum.

    Args:
        logprobs: (N,) or (N, K) float32, in nats.
        inputs: The graph's other inputs by name, on the same device.
        work: The request's cost, which is increased.

    Raises:
        InvalidRequest: An operation cannot take its arguments, or the loss is not a scalar that
            depends on ``logprobs``. The message names the node.
        LimitExceeded: A value is too large, or the computation too expensive. The message
            names the node, its cost and the limit.
        NonFiniteResult: Loss, gradient or a metric is NaN or infinite.
    """
    leaf = logprobs.detach().requires_grad_()
    with torch.enable_grad():
        values = _Run(graph, leaf, inputs, work).values()
        loss = values[graph.loss]
        where = f"custom loss {graph.name!r}"
        if not isinstance(loss, Tensor) or loss.ndim or not loss.is_floating_point():
            raise InvalidRequest(f"{where}: the loss is {described(loss)} instead of a scalar")
        if not loss.requires_grad:
            raise InvalidRequest(f"{where}: the loss does not depend on logprobs")
        try:
            (grad,) = torch.autograd.grad(loss, leaf)
        except Exception as error:  # for example, an operation without a derivative
            if is_out_of_memory(error):
                raise
            raise InvalidRequest(f"{where}, its gradient: {_reason(error)}") from None
    loss = loss.detach()
    if not loss.isfinite():
        raise NonFiniteResult(f"{where}: the loss is {loss.item()}")
    if not grad.isfinite().all():
        raise NonFiniteResult(f"{where}: the gradient of the loss in logprobs is not finite")
    metrics = {}
    for name, node_name in graph.metrics.items():
        value = values[node_name]
        if isinstance(value, Tensor) and value.numel() == 1:
            value = value.detach().item()
        if not isinstance(value, (int, float)):
            raise InvalidRequest(f"{where}: metric {name} is {described(value)}, not a scalar")
        if not math.isfinite(value):
            raise NonFiniteResult(f"{where}: metric {name} is {value}")
        metrics[name] = float(value)
    return CustomLossOutput(loss=loss.item(), grad=grad, metrics=metrics)


class _Run:
    """One run of the graph, for one datum."""

    def __init__(
        self, graph: CustomLossGraph, logprobs: Tensor, inputs: Mapping[str, Tensor], work: Work
    ) -> None:
        self._graph = graph
        self._given = {**inputs, "logprobs": logprobs}
        self._device = logprobs.device
        self._values: dict[str, Value] = {}
        self._work = work
        self._elements_before = work.num_elements
        self._num_tensors = 0

    def values(self) -> dict[str, Value]:
        """Every node's value by name."""
        for node in self._graph.nodes:
            where = f"custom loss {self._graph.name!r}, node {node.name} ({node.target})"
            try:
                self._values[node.name] = self._value(node)
            except Refused as refusal:
                raise InvalidRequest(f"{where}: {refusal}") from None
            except LimitExceeded as limit:
                raise LimitExceeded(f"{where}: {limit}") from None
            except Exception as error:
                if is_out_of_memory(error):
                    raise
                # Any exception of torch: these are pure operations on the client's own numbers, so
                # it is the client's error, and the engine's memory is intact.
                raise InvalidRequest(f"{where}: {_reason(error)}") from None
        return self._values

    def _value(self, node: GraphNode) -> Value:
        if node.op == "placeholder":
            return self._given[node.target]
        is_method = node.op == "call_method"
        function = (METHOD_TABLE if is_method else FUNCTION_TABLE)[node.target]
        signature = (METHODS if is_method else FUNCTIONS)[node.target]
        args = [self._decoded(arg) for arg in node.args]
        kwargs = {
            key: self._decoded(value)
            for key, value in node.kwargs.items()
            if not is_neutral(key, value, signature)
        }
        if is_method and not isinstance(args[0], Tensor):
            raise Refused(f"called on {described(args[0])} instead of a tensor")
        if "device" in signature.kwargs:  # a custom loss runs on its model's device
            kwargs["device"] = self._device
        return self._counted(RULES[signature.cost], function, args, kwargs)

    def _counted(
        self,
        rule: Callable[[Call], Cost],
        function: Callable[..., Any],
        args: list[Value],
        kwargs: dict[str, Value],
    ) -> Value:
        """The operation's value, its cost counted before it is computed.

        The actual cost beyond that is counted too: a rule that returns too little must not be a way
        around the limits.
        """
        expected = rule(Call(args=args, kwargs=kwargs))
        self._count(expected)
        value = function(*args, **kwargs)
        if expected.tensors:
            self._count(excess(made(value), expected))
        return value

    def _count(self, cost: Cost) -> None:
        """Add a cost to the count.

        Raises:
            LimitExceeded: A limit is exceeded; then nothing is added.
        """
        work = self._work
        if not work.is_replay:
            _check_value("dimensions", cost.dimensions, MAX_DIMENSIONS)
            _check_value("elements", cost.largest, MAX_ELEMENTS)
            num_elements = work.num_elements - self._elements_before
            for what, added, before, limit in (
                ("tensors made or read; a datum", cost.tensors, self._num_tensors, MAX_TENSORS),
                ("elements made; a datum", cost.elements, num_elements, MAX_TOTAL_ELEMENTS),
                ("steps to compute; a request", cost.steps, work.num_steps, MAX_STEPS),
                (
                    "multiplications of matrices; a request",
                    cost.multiplications,
                    work.num_multiplications,
                    MAX_MULTIPLICATIONS,
                ),
            ):
                if before + added > limit:
                    raise LimitExceeded(
                        f"{_shown(added)} {what} may have {limit} in all, and {before} came before"
                    )
        self._num_tensors += cost.tensors
        work.num_elements += cost.elements
        work.num_steps += cost.steps
        work.num_multiplications += cost.multiplications

    def _decoded(self, value: Any) -> Value:
        """An argument from its uploaded form."""
        if isinstance(value, list):
            return [self._decoded(item) for item in value]
        if not isinstance(value, dict):
            return value
        [(kind, content)] = value.items()
        if kind == "ref":
            return self._values[content]
        if kind == "tuple":
            return tuple(self._decoded(item) for item in content)
        if kind == "dict":
            return {key: self._decoded(item) for key, item in content.items()}
        if kind == "slice":
            return slice(*(self._decoded(item) for item in content))
        if kind == "float":
            return float(content)
        if kind == "dtype":
            return DTYPE_TABLE[content]
        return self._device if kind == "device" else ...


def _reason(error: Exception) -> str:
    """The first line of torch's message."""
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__


def _check_value(what: str, asked: int, limit: int) -> None:
    if asked > limit:
        raise LimitExceeded(f"{_shown(asked)} {what}; a value may have {limit}")


def _shown(count: int) -> str:
    return str(count) if count < 2**63 else "more than 2^63"
