"""Runs a client's own loss on one datum: each node an operation of a fixed table, under limits.

Nothing that a client sent is evaluated or looked up outside the table. Before an operation runs,
it runs on the meta device, where tensors have shapes and no memory: so what it would return is
known, and refused if it is too large, before anything is allocated. Work and size are counted, not
timed, so that the same graph on the same data always ends the same way.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from training.custom_loss_graph import CustomLossGraph, GraphNode, is_neutral
from training.custom_loss_ops import FUNCTIONS, METHODS
from training.engine.custom_loss_table import (
    BROADCASTING,
    DTYPE_TABLE,
    FUNCTION_TABLE,
    METHOD_TABLE,
    PRODUCTS,
    Refused,
    Value,
    described,
    flat,
    getitem,
    is_tensor,
)
from training.engine.out_of_memory import is_out_of_memory
from training.errors import InvalidRequest, LimitExceeded, NonFiniteResult

MAX_ELEMENTS = 2**24
"""Of one intermediate value."""
MAX_TOTAL_ELEMENTS = 2**26
"""Of all intermediate values of one datum together; autograd keeps them."""
MAX_WORK = 2**30
"""Elements of all intermediate values of one request together; some seconds of one CPU."""
MAX_MULTIPLICATIONS = 2**35
"""Of all matrix products of one request together; some seconds likewise."""


@dataclass(kw_only=True, eq=False)
class Work:
    """What the datums of one request have cost so far."""

    num_elements: int = 0
    num_multiplications: int = 0


@dataclass(frozen=True, kw_only=True, eq=False)
class CustomLossOutput:
    """What a custom loss says of one datum."""

    loss: float
    grad: Tensor
    """d loss / d logprobs, shaped like them."""
    metrics: dict[str, float]
    """By name, such as ``custom/kl:mean``."""


def run_custom_loss(
    graph: CustomLossGraph, logprobs: Tensor, inputs: Mapping[str, Tensor], work: Work
) -> CustomLossOutput:
    """Value, gradient and metrics of one datum.

    Args:
        logprobs: (N,) or (N, K) float32, in nats.
        inputs: The graph's other inputs by name, on the same device.
        work: The request's; counted on.

    Raises:
        InvalidRequest: An operation cannot take what it is given, or the loss is no scalar that
            depends on ``logprobs``. The message names the node.
        LimitExceeded: A value would be too large, or there is too much to multiply.
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
        except Exception as error:  # an operation that has no derivative, say
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
    """One datum's way through the graph."""

    def __init__(
        self, graph: CustomLossGraph, logprobs: Tensor, inputs: Mapping[str, Tensor], work: Work
    ) -> None:
        self._graph = graph
        self._given = {**inputs, "logprobs": logprobs}
        self._device = logprobs.device
        self._values: dict[str, Value] = {}
        self._num_elements = 0
        self._work = work

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
                # Whatever torch raises: these are pure operations on the client's own numbers, so
                # it is the client's error, and the engine's memory is not in doubt.
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
        if "device" in signature.kwargs:  # a custom loss runs where its model is
            kwargs["device"] = self._device
        tensors = [value for value in flat((*args, *kwargs.values())) if isinstance(value, Tensor)]
        if tensors or "device" in signature.kwargs:
            self._admit(function, args, kwargs, tensors)
        return function(*args, **kwargs)

    def _admit(
        self, function: Callable[..., Any], args: Any, kwargs: Any, tensors: list[Tensor]
    ) -> None:
        """Count what the operation will make, before it does.

        Raises:
            LimitExceeded: It is too much.
        """
        if function in PRODUCTS:
            self._work.num_multiplications += PRODUCTS[function](args)
            if self._work.num_multiplications > MAX_MULTIPLICATIONS:
                raise LimitExceeded(f"more than {MAX_MULTIPLICATIONS} multiplications in a request")
        if function in BROADCASTING:
            self._count(torch.broadcast_shapes(*(tensor.shape for tensor in tensors)).numel())
        if _is_selection(function, args):
            # How much it selects, only the data say; no more than there is.
            num_elements = max(tensor.numel() for tensor in tensors)
        else:
            with torch.no_grad():
                made = function(*_on_meta(args), **_on_meta(kwargs))
            num_elements = sum(value.numel() for value in flat([made]) if is_tensor(value))
        self._count(num_elements)

    def _count(self, num_elements: int) -> None:
        self._num_elements += num_elements
        self._work.num_elements += num_elements
        if num_elements > MAX_ELEMENTS:
            raise LimitExceeded(f"{num_elements} elements; a value may have {MAX_ELEMENTS}")
        if self._num_elements > MAX_TOTAL_ELEMENTS:
            raise LimitExceeded(f"more than {MAX_TOTAL_ELEMENTS} elements in all for a datum")
        if self._work.num_elements > MAX_WORK:
            raise LimitExceeded(f"more than {MAX_WORK} elements in all for a request")

    def _decoded(self, value: Any) -> Value:
        """An argument from the form in which it travels."""
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
    """The first line of what torch says."""
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__


def _on_meta(value: Any) -> Any:
    """The same with every tensor and device replaced by its like without memory."""
    if isinstance(value, Tensor):
        return value.detach().to("meta")
    if isinstance(value, torch.device):
        return torch.device("meta")
    if isinstance(value, dict):
        return {key: _on_meta(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_on_meta(item) for item in value]
    if type(value) is tuple:
        return tuple(_on_meta(item) for item in value)
    return value


def _is_selection(function: Callable[..., Any], args: Any) -> bool:
    """Whether the result's size depends on values: a mask that picks elements."""
    if function in (torch.masked_select, Tensor.masked_select):
        return True
    return function is getitem and isinstance(args[1], Tensor) and args[1].dtype == torch.bool
