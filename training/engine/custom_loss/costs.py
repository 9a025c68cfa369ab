"""The cost of a custom loss's operations, computed from their arguments before they run.

There is one rule for each way in which results grow, and each operation names its rule
(``training.custom_loss_ops``). A rule reads only shapes and numbers and never makes a tensor, so
counting is cheap even for hostile arguments. It never returns less than the actual cost; it
may return more. If torch would refuse the arguments anyway, any answer is allowed.

A dimension of size 0 counts as size 1: a tensor without elements has a header, and a
million of them have a million headers. Steps are nanoseconds of one core for float32, forwards
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
"""Steps for an element: arithmetic; exp and similar functions; operations that read memory in
another order; series, powers and sums of exponentials."""
TENSOR_STEPS = 2**12
"""Steps for each tensor that is made, or read from a list."""
SLOW_DTYPE = 32
"""Float multiplications per multiplication of a dtype without its own kernels."""
MATRIX_STEPS = 32
"""Steps for each matrix of a stack, besides its multiplications."""


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


def free(call: Call) -> Cost:
    """A number, a size or a dtype: no tensor."""
    return Cost(tensors=0)


def elementwise(weight: int, copies: int = 1) -> Rule:
    """One value for each element of the broadcast shape, ``copies`` times."""

    def rule(call: Call) -> Cost:
        shape = broadcast(tensor.shape for tensor in call.tensors)
        return _made(shape, steps=weight * size_of(shape), copies=copies)

    return rule


def conversion(call: Call) -> Cost:
    """The first argument in another form, which the others select."""
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
    """One value for each position of the remaining dimensions; backwards, the input's shape."""
    return _reduced(call.first, call.given(1, "dim"), copies=1)


def norm(call: Call) -> Cost:
    """As ``reduction``, with the dimensions as third argument; powers are slow."""
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
    """At most as many values and indices as the input has; a comparison for each halving."""
    size = size_of(call.first.shape)
    return _made(call.first.shape, steps=2 * LIGHT * size * size.bit_length(), copies=2, tensors=2)


def differences(call: Call) -> Cost:
    """``n`` times the input: each order is a separate tensor."""
    orders = max(1, whole(call.given(1, "n", 1)))
    size = size_of(call.first.shape)
    return _made(call.first.shape, steps=LIGHT * size * orders, copies=orders, tensors=orders)


def shifting(call: Call) -> Cost:
    """A copy of the input for each dimension that is shifted or flipped."""
    times = max(1, len(listed(call.given(1, "shifts", call.kwargs.get("dims")))))
    size = size_of(call.first.shape)
    return _made(call.first.shape, steps=LIGHT * size * times, copies=times, tensors=times)


def part(call: Call) -> Cost:
    """A part of one dimension, of length one unless ``length`` is given; backwards, a whole input
    of zeros."""
    shape = list(call.first.shape)
    dim = dimension(call.given(1, "dim"), len(shape))
    if dim is not None:
        shape[dim] = whole(call.given(3, "length", 1))
    return _made(shape, steps=LIGHT * size_of(call.first.shape))


def chunks(call: Call) -> Cost:
    """One tensor for each chunk, but at most the dimension's size, if that is not 0."""
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
    """One tensor for each position in the dimension, even if they have no elements."""
    return _pieces(call.first, size_at(call.first, call.given(1, "dim", 0)))


def shaping(call: Call) -> Cost:
    """The input's elements in the given shape, of which one size may be -1."""
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
    shape = [
        *times,
        *call.first.shape,
    ]  # the same number of elements; torch multiplies them pairwise
    size = size_of(shape)
    dimensions = max(len(times), call.first.ndim)
    return _made(shape, steps=LIGHT * size, dimensions=dimensions)


def spreading(call: Call) -> Cost:
    """The given sizes; -1 keeps a dimension."""
    sizes = sizes_given(call, 1, "size")
    shape = broadcast((sizes, call.first.shape))
    return _made(shape, steps=LIGHT * size_of(shape))


def filling(call: Call) -> Cost:
    """The given sizes."""
    one = call.args[:1] if isinstance(call.given(0, "size"), (list, tuple)) else call.args
    return _filled(sizes_given(Call(args=one, kwargs=call.kwargs), 0, "size"))


def filling_like(call: Call) -> Cost:
    """The given sizes after a tensor, which gives the dtype."""
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
    """``steps`` values."""
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
    """The elements that a mask selects; only the data determine their number, so all are counted.
    The selected positions are found first, one number for each dimension."""
    shape = broadcast(tensor.shape for tensor in call.tensors)
    size = size_of(shape)
    return _made(shape, steps=HEAVY * size, copies=1 + len(shape))


def gathering(call: Call) -> Cost:
    """One value for each index; arguments may be broadcast first."""
    shape = broadcast(tensor.shape for tensor in call.tensors)
    flattened = sum(size_of(tensor.shape) for tensor in call.tensors)  # take_along_dim, no dim
    size = max(size_of(shape), flattened)
    return _made([size], steps=HEAVY * size, copies=3, dimensions=len(shape))


def index_select(call: Call) -> Cost:
    """One position of a dimension for each index."""
    shape = list(call.first.shape)
    index = call.given(2, "index")
    dim = dimension(call.given(1, "dim"), len(shape))
    if dim is not None and isinstance(index, Tensor):
        shape[dim] = size_of(index.shape)
    return _made(shape, steps=HEAVY * size_of(shape) + LIGHT * size_of(call.first.shape))


def scattering(call: Call) -> Cost:
    """A copy of the input, and an addition for each index: for rows, one call each."""
    sizes = [size_of(tensor.shape) for tensor in call.tensors]
    index = call.given(2, "index")
    calls = size_of(index.shape) if isinstance(index, Tensor) and call.first.ndim > 1 else 0
    steps = HEAVY * sum(sizes) + TENSOR_STEPS * calls
    return _made(call.first.shape, steps=steps)


def indexing(call: Call) -> Cost:
    """``value[index]``: a part of a tensor, copied if an index is a tensor or a list;
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
    """``T`` is a view; the others are not tensors, or exist already."""
    is_view = isinstance(call.args[0], Tensor) and call.args[1] == "T"
    return view(call) if is_view else free(call)


def outer(call: Call) -> Cost:
    """One value for each pair."""
    shape = [size_of(tensor.shape) for tensor in call.tensors]
    return _made(shape, steps=LIGHT * size_of(shape))


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
"""Rules by their names in ``training.custom_loss_ops``."""


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


def _pieces(tensor: Tensor, number_of: int) -> Cost:
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
