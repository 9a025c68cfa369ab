"""What an operation of a custom loss costs, known from its arguments before anything runs it.

One rule for each way in which results grow, and each operation names its rule
(``training.custom_loss_ops``). A rule reads shapes and numbers only and never makes a tensor, so
counting costs nothing however hostile the arguments are. It never says less than what is made; it
may say more. Where torch would refuse the arguments anyhow, any answer will do.

A dimension of size 0 counts as one of size 1: a tensor without elements has a header, and a
million of them a million headers. Steps are nanoseconds of one processor for float32, forwards
and backwards, rounded up to one of four weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from training.engine.custom_loss.arguments import (
    Call,
    broadcast,
    dimension,
    indexed_shape,
    is_tensor,
    listed,
    number,
    size_at,
    size_of,
    sizes_given,
    tensor_given,
    whole,
)
from training.engine.custom_loss.table import Refused, Value, flat

LIGHT, MEDIUM, HEAVY, SLOW = 8, 16, 64, 256
"""Steps for an element: of arithmetic, of exp and its kind, of what walks memory in another order,
and of series, powers and sums of exponentials."""
TENSOR_STEPS = 2**12
"""For each tensor that is made, or read from a list."""
SLOW_DTYPE = 32
"""As many multiplications of floats as one of a dtype that has no kernels of its own takes."""
MATRIX_STEPS = 32
"""For each matrix of a stack, beside its multiplications."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What an operation makes at most, intermediate values included."""

    elements: int = 0
    """Of all values together."""
    largest: int = 0
    """Of the largest value."""
    steps: int = 0
    multiplications: int = 0
    """Of matrices; beside the steps."""
    tensors: int = 1
    """Made, or read from a list."""
    dimensions: int = 0
    """Of the value that has most."""


Rule = Callable[[Call], Cost]


def free(call: Call) -> Cost:
    """A number, a size or a dtype: no tensor."""
    return Cost(tensors=0)


def elementwise(weight: int, copies: int = 1) -> Rule:
    """One value for each element of what the arguments broadcast to, ``copies`` times."""

    def rule(call: Call) -> Cost:
        shape = broadcast(tensor.shape for tensor in call.tensors)
        return _made(shape, steps=weight * size_of(shape), copies=copies)

    return rule


def conversion(call: Call) -> Cost:
    """The first argument in another form; the others only say which."""
    return _made(call.first.shape, steps=LIGHT * size_of(call.first.shape))


def likeness(call: Call) -> Cost:
    """The first argument in the shape or dtype of the other."""
    shape = max((tensor.shape for tensor in call.tensors), key=size_of)
    return _made(shape, steps=LIGHT * size_of(shape))


def view(call: Call) -> Cost:
    """The same elements in another order; at most one dimension more."""
    shape = call.first.shape
    return _made(shape, steps=LIGHT * size_of(shape), dimensions=len(shape) + 1)


def reduction(call: Call) -> Cost:
    """One value for each position in the dimensions that stay; backwards, the input's shape."""
    return _reduced(call.first, call.given(1, "dim"), copies=1)


def norm(call: Call) -> Cost:
    """As ``reduction``, with the dimensions in the third place; powers are slow."""
    return _reduced(call.first, call.given(2, "dim"), copies=1, weight=SLOW)


def extreme(call: Call) -> Cost:
    """``elementwise`` with another tensor, else as ``reduction`` with values and indices."""
    other = call.given(1, "other", call.kwargs.get("dim"))
    if isinstance(other, Tensor):
        return elementwise(LIGHT)(call)
    return _reduced(call.first, other, copies=2)


def scan(call: Call) -> Cost:
    """Values and indices in the input's shape."""
    return _made(call.first.shape, steps=HEAVY * size_of(call.first.shape), copies=2, tensors=2)


def sorting(call: Call) -> Cost:
    """Values and indices, as many as the input at most; a comparison for each halving."""
    size = size_of(call.first.shape)
    return _made(call.first.shape, steps=2 * LIGHT * size * size.bit_length(), copies=2, tensors=2)


def differences(call: Call) -> Cost:
    """``n`` times the input: each order is a tensor of its own."""
    orders = max(1, whole(call.given(1, "n", 1)))
    size = size_of(call.first.shape)
    return _made(call.first.shape, steps=LIGHT * size * orders, copies=orders, tensors=orders)


def shifting(call: Call) -> Cost:
    """A copy of the input for each dimension that is shifted or flipped."""
    times = max(1, len(listed(call.given(1, "shifts", call.kwargs.get("dims")))))
    size = size_of(call.first.shape)
    return _made(call.first.shape, steps=LIGHT * size * times, copies=times, tensors=times)


def part(call: Call) -> Cost:
    """A stretch of one dimension, one long unless it says ``length``; backwards, a whole input of
    zeros."""
    shape = list(call.first.shape)
    dim = dimension(call.given(1, "dim"), len(shape))
    if dim is not None:
        shape[dim] = whole(call.given(3, "length", 1))
    return _made(shape, steps=LIGHT * size_of(call.first.shape))


def chunks(call: Call) -> Cost:
    """As many tensors as chunks, but no more than the dimension has, if it has any."""
    size = size_at(call.first, call.given(2, "dim", 0))
    number = whole(call.given(1, "chunks"))
    return _pieces(call.first, min(number, size) if size else number)


def splits(call: Call) -> Cost:
    """One tensor for each ``split_size`` of the dimension, or for each size listed."""
    sizes = call.given(1, "split_size")
    if isinstance(sizes, (list, tuple)):
        return _pieces(call.first, len(sizes))
    size = size_at(call.first, call.given(2, "dim", 0))
    return _pieces(call.first, -(-size // max(1, whole(sizes))))


def rows(call: Call) -> Cost:
    """One tensor for each position in the dimension, also where they have no elements."""
    return _pieces(call.first, size_at(call.first, call.given(1, "dim", 0)))


def shaping(call: Call) -> Cost:
    """The input's elements in the dimensions given, one of which may be left open."""
    if isinstance(call.given(1, "shape"), torch.dtype):  # x.view(dtype): at most as bytes
        return _made(call.first.shape, steps=LIGHT * size_of(call.first.shape), copies=8)
    sizes = sizes_given(call, 1, "size", "shape")
    known = size_of(sizes)
    open_size = -(-size_of(call.first.shape) // known) if any(size < 0 for size in sizes) else 1
    steps = LIGHT * size_of(call.first.shape)
    return _made((*sizes, open_size), steps=steps, dimensions=len(sizes))


def repeating(call: Call) -> Cost:
    """The input as often as the product of the numbers given."""
    times = sizes_given(call, 1, "size", "dims")
    shape = [*times, *call.first.shape]  # as many elements; torch multiplies them pairwise
    size = size_of(shape)
    dimensions = max(len(times), call.first.ndim)
    return _made(shape, steps=LIGHT * size, dimensions=dimensions)


def spreading(call: Call) -> Cost:
    """The sizes given, where -1 leaves a dimension as it is."""
    sizes = sizes_given(call, 1, "size")
    shape = broadcast((sizes, call.first.shape))
    return _made(shape, steps=LIGHT * size_of(shape))


def filling(call: Call) -> Cost:
    """The sizes given."""
    one = call.args[:1] if isinstance(call.given(0, "size"), (list, tuple)) else call.args
    return _filled(sizes_given(Call(args=one, kwargs=call.kwargs), 0, "size"))


def filling_like(call: Call) -> Cost:
    """The sizes given behind a tensor, which says the dtype."""
    return filling(Call(args=call.args[1:], kwargs=call.kwargs))


def number_range(call: Call) -> Cost:
    """From ``start`` to ``end`` by ``step``."""
    one = len(call.args) == 1 and "end" not in call.kwargs
    start = number(0 if one else call.given(0, "start", 0))
    end = number(call.args[0] if one else call.given(1, "end", 0))
    step = number(call.given(2, "step", 1))
    length = abs(end - start) / abs(step) if step else 0.0
    if not math.isfinite(length):
        raise Refused("the range has no end")
    return _filled([math.ceil(length) + 1])


def points(call: Call) -> Cost:
    """As many as ``steps`` says."""
    return _filled([whole(call.given(2, "steps"))])


def square(call: Call) -> Cost:
    """n rows of m, or of n."""
    num_rows = whole(call.given(0, "n"))
    return _filled([num_rows, whole(call.given(1, "m", num_rows))])


def joining(call: Call) -> Cost:
    """All tensors of a list together; each is read."""
    tensors = call.tensors
    size = sum(size_of(tensor.shape) for tensor in tensors)
    dimensions = 1 + max((tensor.ndim for tensor in tensors), default=0)
    return _made([size], steps=LIGHT * size, tensors=len(tensors) + 1, dimensions=dimensions)


def selection(call: Call) -> Cost:
    """What a mask picks, which only the data say: no more than there is. The places that it picks
    are found first, a number for each dimension."""
    shape = broadcast(tensor.shape for tensor in call.tensors)
    size = size_of(shape)
    return _made(shape, steps=HEAVY * size, copies=1 + len(shape))


def gathering(call: Call) -> Cost:
    """One value for each index; arguments may be broadcast to each other first."""
    shape = broadcast(tensor.shape for tensor in call.tensors)
    flattened = sum(size_of(tensor.shape) for tensor in call.tensors)  # take_along_dim, no dim
    size = max(size_of(shape), flattened)
    return _made([size], steps=HEAVY * size, copies=3, dimensions=len(shape))


def index_select(call: Call) -> Cost:
    """As many positions of one dimension as there are indices."""
    shape = list(call.first.shape)
    index = call.given(2, "index")
    dim = dimension(call.given(1, "dim"), len(shape))
    if dim is not None and isinstance(index, Tensor):
        shape[dim] = size_of(index.shape)
    return _made(shape, steps=HEAVY * size_of(shape) + LIGHT * size_of(call.first.shape))


def scattering(call: Call) -> Cost:
    """A copy of the input, and an addition for each index: where rows are added, a call each."""
    sizes = [size_of(tensor.shape) for tensor in call.tensors]
    index = call.given(2, "index")
    calls = size_of(index.shape) if isinstance(index, Tensor) and call.first.ndim > 1 else 0
    steps = HEAVY * sum(sizes) + TENSOR_STEPS * calls
    return _made(call.first.shape, steps=steps)


def indexing(call: Call) -> Cost:
    """What ``value[index]`` is: a part of a tensor, copied where an index is a tensor or a list;
    backwards, a whole input of zeros."""
    value, index = call.args
    if not isinstance(value, Tensor):
        return free(call)
    if isinstance(index, Tensor) and index.dtype == torch.bool:
        places = size_of(index.shape)
        size = places * size_of(value.shape[index.ndim :])
        steps = HEAVY * size + LIGHT * size_of(value.shape)
        return _made([size], steps=steps, copies=1 + index.ndim, dimensions=value.ndim)
    shape, is_copied = indexed_shape(value.shape, index if isinstance(index, tuple) else (index,))
    weight = HEAVY if is_copied else LIGHT
    return _made(shape, steps=weight * size_of(shape) + LIGHT * size_of(value.shape))


def attribute(call: Call) -> Cost:
    """``T`` is a view; the others are no tensors, or made already."""
    is_view = isinstance(call.args[0], Tensor) and call.args[1] == "T"
    return view(call) if is_view else free(call)


def outer(call: Call) -> Cost:
    """One value for each pair."""
    shape = [size_of(tensor.shape) for tensor in call.tensors]
    return _made(shape, steps=LIGHT * size_of(shape))


def product(call: Call) -> Cost:
    """``a @ b``: each row of a with each column of b, for every matrix of the stacks, which are
    broadcast to each other, and copied for that."""
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


RULES: Mapping[str, Rule] = {
    "free": free,
    "light": elementwise(LIGHT),
    "medium": elementwise(MEDIUM),
    "heavy": elementwise(HEAVY),
    "slow": elementwise(SLOW, copies=2),
    "composed": elementwise(HEAVY, copies=4),
    "conversion": conversion,
    "likeness": likeness,
    "view": view,
    "reduction": reduction,
    "norm": norm,
    "extreme": extreme,
    "scan": scan,
    "sorting": sorting,
    "differences": differences,
    "shifting": shifting,
    "part": part,
    "chunks": chunks,
    "splits": splits,
    "rows": rows,
    "shaping": shaping,
    "repeating": repeating,
    "spreading": spreading,
    "filling": filling,
    "filling_like": filling_like,
    "range": number_range,
    "points": points,
    "square": square,
    "joining": joining,
    "selection": selection,
    "gathering": gathering,
    "index_select": index_select,
    "scattering": scattering,
    "indexing": indexing,
    "attribute": attribute,
    "outer": outer,
    "product": product,
    "contraction": contraction,
}
"""By the name that ``training.custom_loss_ops`` gives to each operation."""


def made(value: Value) -> Cost:
    """What an operation did make."""
    tensors = [item for item in flat([value]) if is_tensor(item)]
    sizes = [size_of(tensor.shape) for tensor in tensors]
    return Cost(
        elements=sum(sizes),
        largest=max(sizes, default=0),
        tensors=len(tensors),
        dimensions=max((tensor.ndim for tensor in tensors), default=0),
    )


def excess(found: Cost, expected: Cost) -> Cost:
    """What was made beyond what was expected; nothing, if the rule is right."""
    return Cost(
        elements=max(0, found.elements - expected.elements),
        largest=found.largest,
        tensors=max(0, found.tensors - expected.tensors),
        dimensions=found.dimensions,
    )


def _made(
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


def _filled(shape: Sequence[int]) -> Cost:
    return _made(shape, steps=LIGHT * size_of(shape))


def _reduced(tensor: Tensor, dim: Value, *, copies: int, weight: int = HEAVY) -> Cost:
    """With the positions of the dimensions that stay; an empty list may mean all or none."""
    is_all = dim is None or isinstance(dim, bool)  # std(x, False) says how, not where
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


def _pieces(tensor: Tensor, number_of: int) -> Cost:
    number_of = max(1, number_of)
    size = size_of(tensor.shape)
    return Cost(
        # Without elements each piece counts as one.
        elements=max(size, number_of),
        largest=size,
        steps=LIGHT * size + TENSOR_STEPS * number_of,
        tensors=number_of,
        dimensions=tensor.ndim,
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
