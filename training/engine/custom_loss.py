"""Runs a client's own loss on one datum: each node an operation of a fixed table, under limits.

Nothing that a client sent is evaluated or looked up outside the table. Before an operation runs,
it runs on the meta device, where tensors have shapes and no memory: so what it would return is
known, and refused if it is too large, before anything is allocated. Work and size are counted, not
timed, so that the same graph on the same data always ends the same way.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from training.custom_loss_graph import CustomLossGraph, GraphNode, is_neutral
from training.custom_loss_ops import DTYPES, FUNCTIONS, METHODS
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

_Value = Any
"""A tensor, a number, a size, a dtype, a device, or a tuple of these."""


class _Refused(Exception):
    """Why an operation may not run as it was called; its caller names the node."""


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
            raise InvalidRequest(f"{where}: the loss is {_described(loss)} instead of a scalar")
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
            raise InvalidRequest(f"{where}: metric {name} is {_described(value)}, not a scalar")
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
        self._values: dict[str, _Value] = {}
        self._num_elements = 0
        self._work = work

    def values(self) -> dict[str, _Value]:
        """Every node's value by name."""
        for node in self._graph.nodes:
            where = f"custom loss {self._graph.name!r}, node {node.name} ({node.target})"
            try:
                self._values[node.name] = self._value(node)
            except _Refused as refusal:
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

    def _value(self, node: GraphNode) -> _Value:
        if node.op == "placeholder":
            return self._given[node.target]
        is_method = node.op == "call_method"
        function = (_METHODS if is_method else _FUNCTIONS)[node.target]
        signature = (METHODS if is_method else FUNCTIONS)[node.target]
        args = [self._decoded(arg) for arg in node.args]
        kwargs = {
            key: self._decoded(value)
            for key, value in node.kwargs.items()
            if not is_neutral(key, value, signature)
        }
        if is_method and not isinstance(args[0], Tensor):
            raise _Refused(f"called on {_described(args[0])} instead of a tensor")
        if "device" in signature.kwargs:  # a custom loss runs where its model is
            kwargs["device"] = self._device
        tensors = [value for value in _flat((*args, *kwargs.values())) if isinstance(value, Tensor)]
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
        if function in _PRODUCTS:
            self._work.num_multiplications += _PRODUCTS[function](args)
            if self._work.num_multiplications > MAX_MULTIPLICATIONS:
                raise LimitExceeded(f"more than {MAX_MULTIPLICATIONS} multiplications in a request")
        if function in _BROADCASTING:
            self._count(torch.broadcast_shapes(*(tensor.shape for tensor in tensors)).numel())
        if _is_selection(function, args):
            # How much it selects, only the data say; no more than there is.
            num_elements = max(tensor.numel() for tensor in tensors)
        else:
            with torch.no_grad():
                made = function(*_on_meta(args), **_on_meta(kwargs))
            num_elements = sum(value.numel() for value in _flat([made]) if _is_tensor(value))
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

    def _decoded(self, value: Any) -> _Value:
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
            return _DTYPES[content]
        return self._device if kind == "device" else ...


def _reason(error: Exception) -> str:
    """The first line of what torch says."""
    lines = str(error).strip().splitlines()
    return lines[0][:300] if lines else type(error).__name__


def _flat(values: Any) -> list[_Value]:
    """The values, and those in lists, tuples and dictionaries among them."""
    flat = []
    for value in values:
        if isinstance(value, (list, tuple)):
            flat += _flat(value)
        elif isinstance(value, dict):
            flat += _flat(value.values())
        elif isinstance(value, slice):
            flat += [value.start, value.stop, value.step]
        else:
            flat.append(value)
    return flat


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


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def _is_selection(function: Callable[..., Any], args: Any) -> bool:
    """Whether the result's size depends on values: a mask that picks elements."""
    if function in (torch.masked_select, Tensor.masked_select):
        return True
    return function is _getitem and isinstance(args[1], Tensor) and args[1].dtype == torch.bool


def _described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {list(value.shape)} and dtype {str(value.dtype)[6:]}"
    return f"a {type(value).__name__}"


def _number_or_tensor(value: _Value) -> bool:
    return isinstance(value, (Tensor, int, float))


def _arithmetic(function: Callable[..., Any]) -> Callable[..., Any]:
    """The operator for tensors and numbers only: of text and lists it makes more of the same,
    and of large integers numbers without end."""

    def checked(*operands: _Value) -> _Value:
        for operand in operands:
            if not _number_or_tensor(operand):
                raise _Refused(f"got {_described(operand)}; expected tensors and numbers")
        if any(isinstance(operand, Tensor) for operand in operands):
            return function(*operands)
        if function is operator.pow:
            return _power(*operands)
        return _bounded(function(*operands))

    return checked


def _power(base: float, exponent: float) -> float:
    """base ** exponent by way of floats, which end where integers would go on growing."""
    result = math.pow(base, exponent)
    is_whole = isinstance(base, int) and isinstance(exponent, int) and exponent >= 0
    return int(result) if is_whole and abs(result) < 2**53 else result


def _bounded(value: _Value) -> _Value:
    """The number, unless no tensor could hold it."""
    if isinstance(value, int) and abs(value) >= 2**63:
        raise _Refused("the result is no number that a tensor could hold")
    return value


def _getitem(value: _Value, index: _Value) -> _Value:
    if not isinstance(value, (Tensor, tuple, list)):
        raise _Refused(f"{_described(value)} has no items")
    if not isinstance(value, Tensor) and not isinstance(index, (int, slice)):
        raise _Refused(f"{_described(index)} is no index of {_described(value)}")
    is_many = isinstance(index, (tuple, list))
    if is_many and any(_is_tensor(item) and item.dtype == torch.bool for item in _flat(index)):
        raise _Refused("a mask among other indices is not supported; use it alone")
    return value[index]


def _attribute(value: _Value, name: str) -> _Value:
    if isinstance(value, Tensor) and name in _TENSOR_ATTRIBUTES:
        return _TENSOR_ATTRIBUTES[name](value)
    if isinstance(value, tuple) and not isinstance(value, torch.Size) and len(value) == 2:
        if name == "values":
            return value[0]
        if name == "indices":
            return value[1]
    raise _Refused(f"{_described(value)} has no {name} here")


_TENSOR_ATTRIBUTES: Mapping[str, Callable[[Tensor], _Value]] = {
    "shape": lambda tensor: tensor.shape,
    "ndim": lambda tensor: tensor.ndim,
    "dtype": lambda tensor: tensor.dtype,
    "device": lambda tensor: tensor.device,
    "T": lambda tensor: tensor.t(),
}


def _to(value: Tensor, *args: _Value, **kwargs: _Value) -> Tensor:
    """The tensor in another dtype; a custom loss stays on its model's device."""
    dtype = value.dtype
    for item in (*args, *kwargs.values()):
        if isinstance(item, torch.dtype):
            dtype = item
        elif isinstance(item, Tensor):
            dtype = item.dtype
        elif not isinstance(item, torch.device):
            raise _Refused(f"to() takes a dtype, not {_described(item)}")
    return value.to(dtype)


def _einsum(equation: str, *operands: Tensor) -> Tensor:
    if "..." in equation or len(_flat(operands)) > 2:
        raise _Refused("einsum takes one or two tensors here, and no ellipsis")
    return torch.einsum(equation, *operands)


def _einsum_multiplications(args: Any) -> int:
    """The product of the sizes of all letters of the equation."""
    equation, *given = args
    operands = _flat(given)
    terms = equation.replace(" ", "").partition("->")[0].split(",")
    sizes: dict[str, int] = {}
    for term, operand in zip(terms, operands, strict=False):
        for letter, size in zip(term, operand.shape, strict=False):
            sizes[letter] = max(size, sizes.get(letter, 1))
    return math.prod(sizes.values())


def _product_multiplications(args: Any) -> int:
    """Of ``a @ b``: each row of a with each column of b, for every matrix of a stack."""
    first, second = args[:2]
    columns = second.shape[-1] if second.ndim > 1 else 1
    stack = second.shape[:-2].numel() if second.ndim > 2 else 1
    return int(first.numel() * columns * stack)


def _scalar_math(function: Callable[..., float]) -> Callable[..., float]:
    """Python's function of numbers. Of a tensor it would give a number that has no gradient."""

    def checked(*operands: _Value) -> float:
        for operand in operands:
            if not isinstance(operand, (int, float)):
                raise _Refused(f"got {_described(operand)}; of a tensor, call torch's function")
        return function(*operands)

    return checked


_NAMESPACES: Mapping[str, Any] = {
    "torch": torch,
    "torch.functional": torch.functional,
    "torch.nn.functional": functional,
    "torch._C._nn": torch._C._nn,
    "torch._C._special": torch._C._special,  # type: ignore[attr-defined]  # not in its stubs
    "torch._C._linalg": torch._C._linalg,  # type: ignore[attr-defined]  # not in its stubs
    "operator": operator,
    "math": math,
}


def _function(qualified_name: str) -> Callable[..., Any]:
    """What one of our own names means; called while this module loads, never for a request."""
    namespace, _, name = qualified_name.rpartition(".")
    function: Callable[..., Any] = getattr(_NAMESPACES[namespace], name)
    if namespace == "operator":
        return _arithmetic(function)
    return _scalar_math(function) if namespace == "math" else function


_FUNCTIONS: Mapping[str, Callable[..., Any]] = {
    **{name: _function(name) for name in FUNCTIONS if name != "getattr"},
    "operator.getitem": _getitem,
    "torch.functional.einsum": _einsum,
    "getattr": _attribute,
}
_METHODS: Mapping[str, Callable[..., Any]] = {
    **{name: getattr(Tensor, name) for name in METHODS},
    "to": _to,
}
_DTYPES: Mapping[str, torch.dtype] = {name: getattr(torch, name) for name in DTYPES}
_PRODUCTS: Mapping[Callable[..., Any], Callable[[Any], int]] = {
    _einsum: _einsum_multiplications,
    **dict.fromkeys(
        (
            *(_FUNCTIONS[f"torch.{name}"] for name in ("matmul", "mm", "mv", "bmm")),
            *(_METHODS[name] for name in ("matmul", "mm", "mv", "bmm")),
            _FUNCTIONS["operator.matmul"],
        ),
        _product_multiplications,
    ),
}
_BROADCASTING = frozenset(
    function
    for name, function in _FUNCTIONS.items()
    if name.startswith("torch.nn.functional.") or name == "torch.cosine_similarity"
)
"""What may reduce an intermediate value that is larger than its arguments and its result."""
