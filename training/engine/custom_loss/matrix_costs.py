"""The costs of matrix products: rules as in ``costs``."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from training.engine.custom_loss.arguments import Call, broadcast, size_of, tensor_given
from training.engine.custom_loss.cost import LIGHT, TENSOR_STEPS, Cost, elementwise, result_of
from training.engine.custom_loss.table import Refused, flat

SLOW_DTYPE = 32
"""Float multiplications per multiplication of a dtype without its own kernels."""
MATRIX_STEPS = 32
"""Steps for each matrix of a stack, besides its multiplications."""


def outer(call: Call) -> Cost:
    """One value for each pair."""
    shape = [size_of(tensor.shape) for tensor in call.tensors]
    return result_of(shape, steps=LIGHT * size_of(shape))


def product(call: Call) -> Cost:
    """``a @ b``: each row of a with each column of b, for every matrix of the stacks, which are
    broadcast and therefore copied."""
    first, second = (tensor_given(value) for value in (call.args[0], call.given(1, "other")))
    if not (first.ndim and second.ndim):
        return elementwise(LIGHT)(call)
    num_rows = size_of(first.shape[-2:-1])
    inner = size_of(first.shape[-1:])
    columns = size_of(second.shape[-1:]) if second.ndim > 1 else 1
    stack = broadcast((first.shape[:-2], second.shape[:-2]))
    matrices = size_of(stack)
    return _multiplied(
        matrices * num_rows * inner * columns,
        dtype=first.dtype,
        matrices=matrices,
        values=[
            matrices * num_rows * columns,
            matrices * num_rows * inner,
            matrices * inner * columns,
        ],
        dimensions=len(stack) + 2,
    )


def contraction(call: Call) -> Cost:
    """``einsum``: the product of the sizes of all letters; its operands are copied."""
    equation, *given = call.args
    operands = [tensor_given(value) for value in flat(given)]
    if "..." in equation or len(operands) > 2:
        raise Refused("einsum takes one or two tensors here, and no ellipsis")
    written, _, output = equation.replace(" ", "").partition("->")
    terms = written.split(",")
    sizes: dict[str, int] = {}
    for term, operand in zip(terms, operands, strict=False):
        for letter, size in zip(term, operand.shape, strict=False):
            sizes[letter] = max(1, size, sizes.get(letter, 1))
    if "->" not in equation:
        output = "".join(letter for letter in sizes if written.count(letter) == 1)
    shared = set(output).intersection(*terms)
    return _multiplied(
        math.prod(sizes.values()),
        dtype=operands[0].dtype if operands else torch.float32,
        matrices=math.prod(sizes.get(letter, 1) for letter in shared),
        values=[
            math.prod(sizes.get(letter, 1) for letter in set(letters))
            for letters in (output, *terms)
        ],
        dimensions=len(sizes) + 2,
    )


def _multiplied(
    multiplications: int,
    *,
    dtype: torch.dtype,
    matrices: int,
    values: Sequence[int],
    dimensions: int,
) -> Cost:
    """Kernels exist for float32 and float64; the others multiply one by one."""
    is_fast = dtype in (torch.float32, torch.float64)
    return Cost(
        elements=sum(values),
        largest=max(values),
        steps=LIGHT * sum(values) + MATRIX_STEPS * matrices + TENSOR_STEPS,
        multiplications=multiplications * (1 if is_fast else SLOW_DTYPE),
        dimensions=dimensions,
    )
