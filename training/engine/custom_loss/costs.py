"""The cost of a custom loss's operations, computed from their arguments before they run.

There is one rule for each way in which results grow, and each operation names its rule
(``training.custom_loss_ops``). A rule reads only shapes and numbers and never makes a tensor, so
counting is cheap even for hostile arguments. It never returns less than the actual cost; it
may return more. If torch would refuse the arguments anyway, any answer is allowed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from training.engine.custom_loss.arguments import (
    Call,
    broadcast,
    dimension,
    indexed_shape,
    listed,
    number,
    size_at,
    size_of,
    sizes_given,
    whole,
)
from training.engine.custom_loss.cost import (
    HEAVY,
    LIGHT,
    MEDIUM,
    SLOW,
    TENSOR_STEPS,
    Cost,
    Rule,
    elementwise,
    new_tensor,
    pieces,
    reduced,
    result_of,
)
from training.engine.custom_loss.matrix_costs import contraction, outer, product
from training.engine.custom_loss.table import Refused


def free(call: Call) -> Cost:
    """A number, a size or a dtype: no tensor."""
    return Cost(tensors=0)


def conversion(call: Call) -> Cost:
    """The first argument in another form, which the others select."""
    return result_of(call.first.shape, steps=LIGHT * size_of(call.first.shape))


def likeness(call: Call) -> Cost:
    """The first argument in the shape or dtype of the other."""
    shape = max((tensor.shape for tensor in call.tensors), key=size_of)
    return result_of(shape, steps=LIGHT * size_of(shape))


def view(call: Call) -> Cost:
    """The same elements in another order; at most one dimension more."""
    shape = call.first.shape
    return result_of(shape, steps=LIGHT * size_of(shape), dimensions=len(shape) + 1)


def reduction(call: Call) -> Cost:
    """One value for each position of the remaining dimensions; backwards, the input's shape."""
    return reduced(call.first, call.given(1, "dim"), copies=1)


def norm(call: Call) -> Cost:
    """As ``reduction``, with the dimensions as third argument; powers are slow."""
    return reduced(call.first, call.given(2, "dim"), copies=1, weight=SLOW)


def extreme(call: Call) -> Cost:
    """``elementwise`` with another tensor, else as ``reduction`` with values and indices."""
    other = call.given(1, "other", call.kwargs.get("dim"))
    if isinstance(other, Tensor):
        return elementwise(LIGHT)(call)
    return reduced(call.first, other, copies=2)


def scan(call: Call) -> Cost:
    """Values and indices in the input's shape."""
    return result_of(call.first.shape, steps=HEAVY * size_of(call.first.shape), copies=2, tensors=2)


def sorting(call: Call) -> Cost:
    """At most as many values and indices as the input has; a comparison for each halving."""
    size = size_of(call.first.shape)
    return result_of(
        call.first.shape, steps=2 * LIGHT * size * size.bit_length(), copies=2, tensors=2
    )


def differences(call: Call) -> Cost:
    """``n`` times the input: each order is a separate tensor."""
    orders = max(1, whole(call.given(1, "n", 1)))
    size = size_of(call.first.shape)
    return result_of(call.first.shape, steps=LIGHT * size * orders, copies=orders, tensors=orders)


def shifting(call: Call) -> Cost:
    """A copy of the input for each dimension that is shifted or flipped."""
    times = max(1, len(listed(call.given(1, "shifts", call.kwargs.get("dims")))))
    size = size_of(call.first.shape)
    return result_of(call.first.shape, steps=LIGHT * size * times, copies=times, tensors=times)


def part(call: Call) -> Cost:
    """A part of one dimension, of length one unless ``length`` is given; backwards, a whole input
    of zeros."""
    shape = list(call.first.shape)
    dim = dimension(call.given(1, "dim"), len(shape))
    if dim is not None:
        shape[dim] = whole(call.given(3, "length", 1))
    return result_of(shape, steps=LIGHT * size_of(call.first.shape))


def chunks(call: Call) -> Cost:
    """One tensor for each chunk, but at most the dimension's size, if that is not 0."""
    size = size_at(call.first, call.given(2, "dim", 0))
    number = whole(call.given(1, "chunks"))
    return pieces(call.first, min(number, size) if size else number)


def splits(call: Call) -> Cost:
    """One tensor for each ``split_size`` of the dimension, or for each size listed."""
    sizes = call.given(1, "split_size")
    if isinstance(sizes, (list, tuple)):
        return pieces(call.first, len(sizes))
    size = size_at(call.first, call.given(2, "dim", 0))
    return pieces(call.first, -(-size // max(1, whole(sizes))))


def rows(call: Call) -> Cost:
    """One tensor for each position in the dimension, even if they have no elements."""
    return pieces(call.first, size_at(call.first, call.given(1, "dim", 0)))


def shaping(call: Call) -> Cost:
    """The input's elements in the given shape, of which one size may be -1."""
    if isinstance(call.given(1, "shape"), torch.dtype):  # x.view(dtype): at most as bytes
        return result_of(call.first.shape, steps=LIGHT * size_of(call.first.shape), copies=8)
    sizes = sizes_given(call, 1, "size", "shape")
    known = size_of(sizes)
    open_size = -(-size_of(call.first.shape) // known) if any(size < 0 for size in sizes) else 1
    steps = LIGHT * size_of(call.first.shape)
    return result_of((*sizes, open_size), steps=steps, dimensions=len(sizes))


def repeating(call: Call) -> Cost:
    """The input as often as the product of the numbers given."""
    times = sizes_given(call, 1, "size", "dims")
    shape = [
        *times,
        *call.first.shape,
    ]  # the same number of elements; torch multiplies them pairwise
    size = size_of(shape)
    dimensions = max(len(times), call.first.ndim)
    return result_of(shape, steps=LIGHT * size, dimensions=dimensions)


def spreading(call: Call) -> Cost:
    """The given sizes; -1 keeps a dimension."""
    sizes = sizes_given(call, 1, "size")
    shape = broadcast((sizes, call.first.shape))
    return result_of(shape, steps=LIGHT * size_of(shape))


def filling(call: Call) -> Cost:
    """The given sizes."""
    one = call.args[:1] if isinstance(call.given(0, "size"), (list, tuple)) else call.args
    return new_tensor(sizes_given(Call(args=one, kwargs=call.kwargs), 0, "size"))


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
    return new_tensor([math.ceil(length) + 1])


def points(call: Call) -> Cost:
    """``steps`` values."""
    return new_tensor([whole(call.given(2, "steps"))])


def square(call: Call) -> Cost:
    """n rows of m, or of n."""
    num_rows = whole(call.given(0, "n"))
    return new_tensor([num_rows, whole(call.given(1, "m", num_rows))])


def joining(call: Call) -> Cost:
    """All tensors of a list together; each is read."""
    tensors = call.tensors
    size = sum(size_of(tensor.shape) for tensor in tensors)
    dimensions = 1 + max((tensor.ndim for tensor in tensors), default=0)
    return result_of([size], steps=LIGHT * size, tensors=len(tensors) + 1, dimensions=dimensions)


def selection(call: Call) -> Cost:
    """The elements that a mask selects; only the data determine their number, so all are counted.
    The selected positions are found first, one number for each dimension."""
    shape = broadcast(tensor.shape for tensor in call.tensors)
    size = size_of(shape)
    return result_of(shape, steps=HEAVY * size, copies=1 + len(shape))


def gathering(call: Call) -> Cost:
    """One value for each index; arguments may be broadcast first."""
    shape = broadcast(tensor.shape for tensor in call.tensors)
    flattened = sum(size_of(tensor.shape) for tensor in call.tensors)  # take_along_dim, no dim
    size = max(size_of(shape), flattened)
    return result_of([size], steps=HEAVY * size, copies=3, dimensions=len(shape))


def index_select(call: Call) -> Cost:
    """One position of a dimension for each index."""
    shape = list(call.first.shape)
    index = call.given(2, "index")
    dim = dimension(call.given(1, "dim"), len(shape))
    if dim is not None and isinstance(index, Tensor):
        shape[dim] = size_of(index.shape)
    return result_of(shape, steps=HEAVY * size_of(shape) + LIGHT * size_of(call.first.shape))


def scattering(call: Call) -> Cost:
    """A copy of the input, and an addition for each index: for rows, one call each."""
    sizes = [size_of(tensor.shape) for tensor in call.tensors]
    index = call.given(2, "index")
    calls = size_of(index.shape) if isinstance(index, Tensor) and call.first.ndim > 1 else 0
    steps = HEAVY * sum(sizes) + TENSOR_STEPS * calls
    return result_of(call.first.shape, steps=steps)


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
        return result_of([size], steps=steps, copies=1 + index.ndim, dimensions=value.ndim)
    shape, is_copied = indexed_shape(value.shape, index if isinstance(index, tuple) else (index,))
    weight = HEAVY if is_copied else LIGHT
    return result_of(shape, steps=weight * size_of(shape) + LIGHT * size_of(value.shape))


def attribute(call: Call) -> Cost:
    """``T`` is a view; the others are not tensors, or exist already."""
    is_view = isinstance(call.args[0], Tensor) and call.args[1] == "T"
    return view(call) if is_view else free(call)


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
