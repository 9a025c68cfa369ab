"""What an operation of a custom loss costs, and the costs of common forms of results.

A dimension of size 0 counts as size 1: a tensor without elements has a header, and a
million of them have a million headers. Steps are nanoseconds of one core for float32, forwards
and backwards, rounded up to one of four weights.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from training.engine.custom_loss.arguments import (
    Call,
    broadcast,
    dimension,
    is_tensor,
    listed,
    size_of,
)
from training.engine.custom_loss.table import Value, flat

LIGHT, MEDIUM, HEAVY, SLOW = 8, 16, 64, 256
"""Steps for an element: arithmetic; exp and similar functions; operations that read memory in
another order; series, powers and sums of exponentials."""
TENSOR_STEPS = 2**12
"""Steps for each tensor that is made, or read from a list."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """The most that an operation makes, intermediate values included."""

    elements: int = 0
    """Elements of all values."""
    largest: int = 0
    """Elements of the largest value."""
    steps: int = 0
    multiplications: int = 0
    """Multiplications in matrix products, besides the steps."""
    tensors: int = 1
    """Tensors made, or read from a list."""
    dimensions: int = 0
    """Dimensions of the value with the most."""


Rule = Callable[[Call], Cost]


def elementwise(weight: int, copies: int = 1) -> Rule:
    """One value for each element of the broadcast shape, ``copies`` times."""

    def rule(call: Call) -> Cost:
        shape = broadcast(tensor.shape for tensor in call.tensors)
        return result_of(shape, steps=weight * size_of(shape), copies=copies)

    return rule


def made(value: Value) -> Cost:
    """The actual cost of an operation."""
    tensors = [item for item in flat([value]) if is_tensor(item)]
    sizes = [size_of(tensor.shape) for tensor in tensors]
    return Cost(
        elements=sum(sizes),
        largest=max(sizes, default=0),
        tensors=len(tensors),
        dimensions=max((tensor.ndim for tensor in tensors), default=0),
    )


def excess(found: Cost, expected: Cost) -> Cost:
    """The actual cost beyond the expected one; nothing if the rule is right."""
    return Cost(
        elements=max(0, found.elements - expected.elements),
        largest=found.largest,
        tensors=max(0, found.tensors - expected.tensors),
        dimensions=found.dimensions,
    )


def result_of(
    shape: Sequence[int],
    *,
    steps: int,
    copies: int = 1,
    tensors: int = 1,
    dimensions: int | None = None,
) -> Cost:
    size = size_of(shape)
    return Cost(
        elements=copies * size,
        largest=size,
        steps=steps + TENSOR_STEPS * tensors,
        tensors=tensors,
        dimensions=len(shape) if dimensions is None else dimensions,
    )


def new_tensor(shape: Sequence[int]) -> Cost:
    return result_of(shape, steps=LIGHT * size_of(shape))


def reduced(tensor: Tensor, dim: Value, *, copies: int, weight: int = HEAVY) -> Cost:
    """A reduction to the remaining dimensions; an empty list may mean all or none."""
    is_all = dim is None or isinstance(dim, bool)  # std(x, False): the flag is not a dimension
    gone = set() if is_all else {dimension(item, tensor.ndim) for item in listed(dim)}
    stay = [] if is_all else [n for i, n in enumerate(tensor.shape) if i not in gone]
    size = size_of(tensor.shape)
    return Cost(
        elements=copies * size_of(stay),
        largest=size_of(stay),
        steps=weight * size + TENSOR_STEPS * copies,
        tensors=copies,
        dimensions=tensor.ndim,
    )


def pieces(tensor: Tensor, number_of: int) -> Cost:
    number_of = max(1, number_of)
    size = size_of(tensor.shape)
    return Cost(
        # Without elements each part counts as one.
        elements=max(size, number_of),
        largest=size,
        steps=LIGHT * size + TENSOR_STEPS * number_of,
        tensors=number_of,
        dimensions=tensor.ndim,
    )
