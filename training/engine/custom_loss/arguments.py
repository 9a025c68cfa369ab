"""An operation's arguments as torch would read them: shapes, sizes, positions and integers.

For the rules that count the cost of operations. This module makes no tensor, and refuses arguments
that torch would not read as expected.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from training.engine.custom_loss.table import Refused, Value, described, flat


@dataclass(frozen=True, kw_only=True, eq=False)
class Call:
    """An operation's arguments in their final form."""

    args: Sequence[Value]
    kwargs: Mapping[str, Value]

    def given(self, place: int, name: str, default: Value = None) -> Value:
        """The argument at this place or of this name."""
        if len(self.args) > place:
            return self.args[place]
        return self.kwargs.get(name, default)

    @property
    def first(self) -> Tensor:
        """The operation's first argument, a tensor.

        Raises:
            Refused: The first argument is not a tensor.
        """
        value = self.args[0] if self.args else None
        if not isinstance(value, Tensor):
            raise Refused(f"got {described(value)}; expected a tensor")
        return value

    @property
    def tensors(self) -> list[Tensor]:
        """All tensors among the arguments, including those in lists."""
        return [value for value in flat((*self.args, *self.kwargs.values())) if is_tensor(value)]


def size_of(shape: Iterable[int]) -> int:
    """Elements of a shape, a dimension of 0 counted as 1."""
    return math.prod(max(1, size) for size in shape)


def broadcast(shapes: Iterable[Sequence[int]]) -> list[int]:
    """The largest size of each dimension, aligned at the last; torch checks that they fit."""
    result: list[int] = []
    for shape in shapes:
        size = max(len(result), len(shape))
        padded = ([1] * (size - len(one)) + list(one) for one in (result, shape))
        result = [max(pair) for pair in zip(*padded, strict=True)]
    return result


def indexed_shape(shape: Sequence[int], index: Sequence[Value]) -> tuple[list[int], bool]:
    """The largest possible shape of ``x[index]``, and whether it is copied."""
    num_used = sum(item is not None and item is not ... and item is not True for item in index)
    result: list[int] = []
    copied: list[Sequence[int]] = []
    place = 0
    for item in index:
        size = shape[place] if place < len(shape) else 1
        if item is None or isinstance(item, bool):
            result.append(1)
            continue
        if item is ...:
            skipped = max(0, len(shape) - num_used)
            result += shape[place : place + skipped]
            place += skipped
            continue
        if isinstance(item, slice):
            parts = (item.start, item.stop, item.step)
            bounds = (None if bound is None else whole(bound) for bound in parts)
            result.append(len(range(*slice(*bounds).indices(size))))
        elif isinstance(item, Tensor):
            copied.append(item.shape)
        elif isinstance(item, (list, tuple)):
            if any(isinstance(value, bool) for value in flat(item)):
                raise Refused("a list of bools is not supported as an index; make it a mask")
            copied.append(_list_shape(item))
        else:
            whole(item)
        place += 1
    if copied:
        result += broadcast(copied)
    return [*result, *shape[place:]], bool(copied)


def _list_shape(items: Value) -> list[int]:
    """The shape of a list of lists, by its first items."""
    shape = []
    while isinstance(items, (list, tuple)):
        shape.append(len(items))
        items = items[0] if items else None
    if isinstance(items, Tensor):
        shape += items.shape
    return shape


def whole(value: Value) -> int:
    """The integer that torch would read here.

    Raises:
        Refused: It is not an integer.
    """
    if isinstance(value, int):
        return int(value)
    if isinstance(value, Tensor) and value.numel() == 1 and not value.is_floating_point():
        return int(value.item())
    raise Refused(f"got {described(value)}; expected a whole number")


def number(value: Value) -> float:
    """The number that torch would read here.

    Raises:
        Refused: It is not a number.
    """
    if isinstance(value, Tensor) and value.numel() == 1:
        return float(value.item())
    if not isinstance(value, (int, float)):
        raise Refused(f"got {described(value)}; expected a number")
    return float(value)


def tensor_given(value: Value) -> Tensor:
    if not isinstance(value, Tensor):
        raise Refused(f"got {described(value)}; expected a tensor")
    return value


def sizes_given(call: Call, place: int, *names: str) -> list[int]:
    """Sizes given one by one, as a list, or by name."""
    values: Sequence[Value] = call.args[place:]
    if not values:
        values = [call.kwargs[name] for name in names if name in call.kwargs][:1]
    if len(values) == 1 and isinstance(values[0], (list, tuple)):
        values = values[0]
    return [whole(value) for value in values]


def listed(value: Value) -> Sequence[Value]:
    return value if isinstance(value, (list, tuple)) else [value]


def dimension(value: Value, num_dimensions: int) -> int | None:
    """The dimension counted from the front; None if it does not exist, which torch will refuse."""
    dim = whole(value)
    if -num_dimensions <= dim < num_dimensions:
        return dim % num_dimensions
    return None


def size_at(tensor: Tensor, dim: Value) -> int:
    place = dimension(dim, tensor.ndim)
    return 1 if place is None else int(tensor.shape[place])


def is_tensor(value: Value) -> bool:
    return isinstance(value, Tensor)
