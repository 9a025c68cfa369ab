"""A GPU that is none: tensors that say ``cuda`` and are computed on the CPU.

An ``OnGpu`` is a tensor without memory that stands for one on ``cuda:0``. Every operation on it is
computed with the CPU's own tensors, so results are numbers that can be compared. Before that, torch
itself judges the operation on its fake tensors of that device (``FakeTensorMode``): tensors on two
devices are an error, as on a GPU, and the host waits for an operation whose result decides a shape
or is a number in Python. It also waits for copies between the two memories, unless they begin in
pinned memory and are not to be waited for. Each wait is recorded with the function of ``training``
that caused it.

What it cannot show: kernels that exist on a GPU only, their conditions and their rounding.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.autograd.function import BackwardCFunction
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

GPU = torch.device("cuda", 0)

STANDS_FOR_GPU = torch.device("meta")
"""What torch's C++ takes for the device of these tensors: the engine of autograd refuses a GPU that
is not there. Functions written in C++ make their own tensors there, too."""

FROM_NUMBERS = (torch.tensor, torch.as_tensor, torch.asarray, torch.from_numpy, Tensor.new_tensor)
"""Functions that copy numbers of Python or numpy."""

INDEXED = (torch.ops.aten.index, torch.ops.aten.index_put, torch.ops.aten.index_put_)
INDEXING = (Tensor.__getitem__, Tensor.__setitem__)
MOVES = (Tensor.to, Tensor.cuda, Tensor.cpu)
PROPERTIES: dict[str, Any] = {
    "get_device_capability": lambda device=None: (9, 0),
    "mem_get_info": lambda device=None: (2**36, 2**37),
    "memory_allocated": lambda device=None: 0,
    "memory_reserved": lambda device=None: 0,
    "max_memory_allocated": lambda device=None: 0,
    "reset_peak_memory_stats": lambda device=None: None,
}
"""What ``torch.cuda`` says of it: that of an H200."""

JUDGED: dict[Any, bool] = {}
"""For operations on tensors of some shapes: whether the host waits for their result. Fake tensors
are slow."""

WAITS = (DataDependentOutputException, DynamicOutputShapeException)


class OnGpu(Tensor):
    """Stands for a tensor on a GPU; ``numbers`` has them."""

    numbers: Tensor

    @staticmethod
    def __new__(cls, real: Tensor) -> OnGpu:
        made: OnGpu = Tensor._make_wrapper_subclass(
            cls,
            real.shape,
            strides=real.stride(),
            storage_offset=real.storage_offset(),
            dtype=real.dtype,
            device=STANDS_FOR_GPU,
        )
        made.numbers = real
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return GPU

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return True

    @property
    def is_meta(self) -> bool:  # type: ignore[override]
        return False

    @property
    def data(self) -> Tensor:  # type: ignore[override]
        return Tensor.data.__get__(self)

    @data.setter
    def data(self, value: OnGpu) -> None:
        Tensor.data.__set__(self, value)
        self.numbers = value.numbers

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.numbers.untyped_storage()

    def data_ptr(self) -> int:
        return self.numbers.data_ptr()

    def numpy(self, *, force: bool = False) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"OnGpu({self.numbers!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{func} on a GPU outside of pretend_gpu")


class PretendGpu:
    """What was seen while active."""

    def __init__(self) -> None:
        self.waits: Counter[tuple[str, str]] = Counter()
        """How often the host waited for the device: by function of ``training`` and operation."""
        self.asked_meta = False
        """Whether Python asks for a tensor on torch's own device ``meta`` just now."""

    def note(self, operation: str) -> None:
        self.waits[_place(), operation] += 1


@contextmanager
def pretend_gpu() -> Iterator[PretendGpu]:
    """Make ``cuda`` a device for tensors, until the end of the context."""
    seen = PretendGpu()
    overwrites = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        functions = _Functions(seen)
        apply = BackwardCFunction.apply

        def with_functions(node: Any, *args: Any) -> Any:
            with functions:  # autograd's engine leaves them
                return apply(node, *args)

        with (
            patch.multiple(torch.cuda, **PROPERTIES),
            patch.object(BackwardCFunction, "apply", with_functions),
            functions,
            _Operations(seen),
        ):
            yield seen
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(overwrites)


def _place() -> str:
    """The innermost function of ``training`` that is running."""
    frame = sys._getframe(2)
    while frame is not None:
        name = frame.f_globals.get("__name__", "")
        if name.startswith("training."):
            return f"{name.removeprefix('training.')}.{frame.f_code.co_qualname}"
        frame = frame.f_back  # type: ignore[assignment]
    return ""


class _Functions(TorchFunctionMode):
    """Calls from Python that name a device."""

    def __init__(self, seen: PretendGpu) -> None:
        super().__init__()
        self._seen = seen

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch._C._nn._parse_to:  # reads arguments only
            return func(*args, **kwargs)
        if func in MOVES:
            return self._move(func, *args, **kwargs)
        if func is Tensor.pin_memory:
            pinned = args[0].clone()
            pinned.is_pinned_here = True
            return pinned
        if func in INDEXING and isinstance(args[0], OnGpu):
            args = (args[0], self._index(args[1]), *args[2:])
        if func is Tensor.tolist and isinstance(args[0], OnGpu):
            self._seen.note("tolist")
            return args[0].numbers.tolist()
        on_gpu = "device" in kwargs and _is_gpu(kwargs["device"])
        if on_gpu:
            if kwargs.get("generator") is not None:
                raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")
            kwargs["device"] = "cpu"
        from_numbers = func in FROM_NUMBERS
        if from_numbers and func is Tensor.new_tensor:
            on_gpu = on_gpu or isinstance(args[0], OnGpu)
            args = (args[0].numbers if isinstance(args[0], OnGpu) else args[0], *args[1:])
        if not on_gpu:
            device = kwargs.get("device")
            if device is not None and torch.device(device) == STANDS_FOR_GPU:
                return self._on_meta(func, args, kwargs)
            return func(*args, **kwargs)
        if from_numbers:
            if isinstance(args[0], OnGpu):
                return func(*args, **{**kwargs, "device": None})
            self._seen.note("copy to the device")
        made = func(*args, **kwargs)
        return made if isinstance(made, OnGpu) else OnGpu(made)

    def _index(self, index: Any) -> Any:
        """An index whose numbers are on the device: torch copies them, and the host waits."""
        if isinstance(index, tuple):
            return tuple(map(self._index, index))
        is_plain = isinstance(index, Tensor) and not isinstance(index, OnGpu) and index.ndim
        if is_plain or isinstance(index, list | np.ndarray):
            self._seen.note("copy to the device")
            return OnGpu(torch.as_tensor(index).clone())
        return index

    def _on_meta(self, func: Any, args: Any, kwargs: Any) -> Any:
        before, self._seen.asked_meta = self._seen.asked_meta, True
        try:
            return func(*args, **kwargs)
        finally:
            self._seen.asked_meta = before

    def _move(self, func: Any, tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        if func is Tensor.cpu:
            target: Any = torch.device("cpu")
        elif func is Tensor.cuda:
            target = GPU
        else:
            target, args, kwargs = _target(tensor, args, kwargs)
        waits = not kwargs.pop("non_blocking", False) or not hasattr(tensor, "is_pinned_here")
        if func is not Tensor.to:
            args, kwargs = (), {}
        if target is None or target.type == tensor.device.type:
            return Tensor.to(tensor, *args, **kwargs) if args or kwargs else tensor
        if tensor.requires_grad and torch.is_grad_enabled():
            raise NotImplementedError("a copy between devices with a gradient")
        if isinstance(tensor, OnGpu):
            if target.type != "cpu":
                raise NotImplementedError(target)
            self._seen.note("copy to the host")
            moved: Tensor = tensor.numbers.detach().clone()
        else:
            if target.type != "cuda":
                return func(tensor, target)
            if waits:
                self._seen.note("copy to the device")
            moved = OnGpu(tensor.detach().clone())
        return Tensor.to(moved, *args, **kwargs) if args or kwargs else moved


def _target(tensor: Tensor, args: Any, kwargs: Any) -> tuple[torch.device | None, Any, Any]:
    """The device of ``Tensor.to``'s arguments, and the others."""
    kwargs = dict(kwargs)
    device = kwargs.pop("device", None)
    others = []
    for arg in args:
        if isinstance(arg, Tensor):
            device = arg.device
            others.append(arg.dtype)
        elif isinstance(arg, torch.device | str) or (type(arg) is int):
            device = arg
        elif type(arg) is bool:  # non_blocking, by its place
            kwargs["non_blocking"] = arg
        elif arg is not None:
            others.append(arg)
    return (None if device is None else torch.device(device)), tuple(others), kwargs


def _is_gpu(device: Any) -> bool:
    return device is not None and torch.device(device).type == "cuda"


class _Operations(TorchDispatchMode):
    """Every operation: judged on fake tensors, then computed with real ones."""

    def __init__(self, seen: PretendGpu) -> None:
        super().__init__()
        self._seen = seen
        self._fakes = FakeTensorMode(allow_non_fake_inputs=False)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        flat, _ = tree_flatten((args, kwargs))
        tensors = [each for each in flat if isinstance(each, Tensor)]
        ours = [each for each in tensors if isinstance(each, OnGpu)]
        made_there = (
            not tensors and kwargs.get("device") == STANDS_FOR_GPU and not self._seen.asked_meta
        )
        if not ours and not made_there:
            return func(*args, **kwargs)
        if any(each.is_meta for each in tensors):
            # For example the list of an index: as on a GPU it is copied, and the host waits.
            raise RuntimeError(f"{func}: numbers of Python that torch copies to the device itself")
        if ours:
            with torch._C.DisableTorchFunction():  # type: ignore[attr-defined]
                self._judge(func, args, kwargs)
        if kwargs.get("device") is not None:
            kwargs["device"] = torch.device("cpu")
        real_args, real_kwargs = tree_map_only(OnGpu, lambda x: x.numbers, (args, kwargs))
        if func is torch.ops.aten.histc.default:  # a CPU counts no integers
            result = func(real_args[0].double(), *real_args[1:], **real_kwargs)
            result = result.to(real_args[0].dtype)
        else:
            result = func(*real_args, **real_kwargs)
        given = {id(each.numbers): each for each in ours}

        def back(tensor: Tensor) -> Tensor:
            known = given.get(id(tensor))
            # Autograd asks the tensor, which does not know that its numbers are to be conjugated.
            return OnGpu(tensor.resolve_conj().resolve_neg()) if known is None else known

        return tree_map_only(Tensor, back, result)

    def _judge(self, func: Any, args: Any, kwargs: Any) -> None:
        name = func.overloadpacket.__name__
        if func is torch.ops.aten.copy_.default and type(args[0]) is not type(args[1]):
            if args[1].ndim or isinstance(args[1], OnGpu):
                self._seen.note(
                    "copy to the device" if isinstance(args[0], OnGpu) else "copy to the host"
                )
            return
        if func is torch.ops.aten._local_scalar_dense.default:
            self._seen.note("item")
            return

        key = _key(func, args, kwargs)
        if key not in JUDGED:
            JUDGED[key] = self._is_waiting(func, args, kwargs)
        if JUDGED[key]:
            self._seen.note(name)

    def _is_waiting(self, func: Any, args: Any, kwargs: Any) -> bool:
        """Whether the host must wait for an operation's result; an error if no GPU can do it."""

        def fake(tensor: Tensor) -> Tensor:
            device = GPU if isinstance(tensor, OnGpu) else tensor.device
            made: Tensor = torch.empty_strided(
                tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device
            )
            return made

        if func is torch.ops.aten._grouped_mm.default and args[0].dtype != torch.bfloat16:
            # Its check for a GPU knows bfloat16 only; other numbers are computed group by group.
            return True
        indices = args[1] if func.overloadpacket in INDEXED and len(args) > 1 else ()
        if any(each is not None and each.dtype == torch.bool for each in indices):
            return True  # it counts the true ones
        with self._fakes, torch.no_grad():
            fakes, named = tree_map_only(Tensor, fake, (args, kwargs))
            if named.get("device") is not None:
                named["device"] = GPU
            try:
                func(*fakes, **named)
            except WAITS:
                return True
            except RuntimeError as error:
                if "not linked with support for cuda" not in str(error):
                    raise
                _require_one_device(func, args)  # it cannot be judged without a GPU
        return False


def _require_one_device(func: Any, args: Any) -> None:
    tensors = [each for each in tree_flatten(args)[0] if isinstance(each, Tensor) and each.ndim]
    if len({type(each) for each in tensors}) > 1:
        raise RuntimeError(f"{func}: tensors on two devices")


def _key(func: Any, args: Any, kwargs: Any) -> Any:
    """What decides about an operation: all but the numbers in tensors."""

    def described(value: Any) -> Any:
        if isinstance(value, Tensor):
            of_gpu = isinstance(value, OnGpu)
            return of_gpu, value.shape, value.stride(), value.dtype
        return type(value), value

    flat, structure = tree_flatten((args, kwargs))
    return func, tuple(map(described, flat)), str(structure)
