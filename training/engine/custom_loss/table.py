"""The operations of custom losses: every allowed name, and its function.

The names are in ``training.custom_loss_ops``; this table is built from them once, while the module
loads. Python's own functions have wrappers that accept only tensors and numbers.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from training.custom_loss_ops import DTYPES, FUNCTIONS, METHODS

Value = Any
"""A tensor, a number, a size, a dtype, a device, or a tuple of these."""


class Refused(Exception):
    """Why an operation may not run as it was called; its caller names the node."""


def described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {list(value.shape)} and dtype {str(value.dtype)[6:]}"
    return f"a {type(value).__name__}"


def _number_or_tensor(value: Value) -> bool:
    return isinstance(value, (Tensor, int, float))


def _arithmetic(function: Callable[..., Any]) -> Callable[..., Any]:
    """The operator for tensors and numbers only: with text and lists it would repeat them,
    and with large integers its result would have no bound."""

    def checked(*operands: Value) -> Value:
        for operand in operands:
            if not _number_or_tensor(operand):
                raise Refused(f"got {described(operand)}; expected tensors and numbers")
        if any(isinstance(operand, Tensor) for operand in operands):
            return function(*operands)
        if function is operator.pow:
            return _power(*operands)
        return _bounded(function(*operands))

    return checked


def _power(base: float, exponent: float) -> float:
    """base ** exponent in floats, which overflow where integers would grow without bound."""
    result = math.pow(base, exponent)
    is_whole = isinstance(base, int) and isinstance(exponent, int) and exponent >= 0
    return int(result) if is_whole and abs(result) < 2**53 else result


def _bounded(value: Value) -> Value:
    """The number, if a tensor can hold it."""
    if isinstance(value, int) and abs(value) >= 2**63:
        raise Refused("the result is no number that a tensor could hold")
    return value


def getitem(value: Value, index: Value) -> Value:
    if not isinstance(value, (Tensor, tuple, list)):
        raise Refused(f"{described(value)} has no items")
    if not isinstance(value, Tensor) and not isinstance(index, (int, slice)):
        raise Refused(f"{described(index)} is not an index of {described(value)}")
    is_many = isinstance(index, (tuple, list))
    if is_many and any(
        isinstance(item, Tensor) and item.dtype == torch.bool for item in flat(index)
    ):
        raise Refused("a mask among other indices is not supported; use it alone")
    return value[index]


def _attribute(value: Value, name: str) -> Value:
    if isinstance(value, Tensor) and name in _TENSOR_ATTRIBUTES:
        return _TENSOR_ATTRIBUTES[name](value)
    if isinstance(value, tuple) and not isinstance(value, torch.Size) and len(value) == 2:
        if name == "values":
            return value[0]
        if name == "indices":
            return value[1]
    raise Refused(f"{described(value)} has no {name} here")


_TENSOR_ATTRIBUTES: Mapping[str, Callable[[Tensor], Value]] = {
    "shape": lambda tensor: tensor.shape,
    "ndim": lambda tensor: tensor.ndim,
    "dtype": lambda tensor: tensor.dtype,
    "device": lambda tensor: tensor.device,
    "T": lambda tensor: tensor.t(),
}


def _to(value: Tensor, *args: Value, **kwargs: Value) -> Tensor:
    """The tensor in another dtype; a custom loss stays on its model's device."""
    dtype = value.dtype
    for item in (*args, *kwargs.values()):
        if isinstance(item, torch.dtype):
            dtype = item
        elif isinstance(item, Tensor):
            dtype = item.dtype
        elif not isinstance(item, torch.device):
            raise Refused(f"to() takes a dtype, not {described(item)}")
    return value.to(dtype)


def _scalar_math(function: Callable[..., float]) -> Callable[..., float]:
    """Python's function of numbers. For a tensor it would return a number without a gradient."""

    def checked(*operands: Value) -> float:
        for operand in operands:
            if not isinstance(operand, (int, float)):
                raise Refused(f"got {described(operand)}; for a tensor, call torch's function")
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
    """The function of one of our names; called while this module loads, never for a request."""
    namespace, _, name = qualified_name.rpartition(".")
    function: Callable[..., Any] = getattr(_NAMESPACES[namespace], name)
    if namespace == "operator":
        return _arithmetic(function)
    return _scalar_math(function) if namespace == "math" else function


FUNCTION_TABLE: Mapping[str, Callable[..., Any]] = {
    **{name: _function(name) for name in FUNCTIONS if name != "getattr"},
    "operator.getitem": getitem,
    "getattr": _attribute,
}
METHOD_TABLE: Mapping[str, Callable[..., Any]] = {
    **{name: getattr(Tensor, name) for name in METHODS},
    "to": _to,
}
DTYPE_TABLE: Mapping[str, torch.dtype] = {name: getattr(torch, name) for name in DTYPES}


def flat(values: Any) -> list[Value]:
    """The values, with lists, tuples and dictionaries flattened."""
    found = []
    for value in values:
        if isinstance(value, (list, tuple)):
            found += flat(value)
        elif isinstance(value, dict):
            found += flat(value.values())
        elif isinstance(value, slice):
            found += [value.start, value.stop, value.step]
        else:
            found.append(value)
    return found
