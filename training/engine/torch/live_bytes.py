"""Counts the bytes of the tensors that some code has in memory at one time."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, UntypedStorage
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only


class LiveBytes(TorchDispatchMode):
    """While active, follows every tensor that an operation makes until it is freed.

    A kernel's own buffers are not seen. Slow: some microseconds for each operation.
    """

    def __init__(self, existing: Iterable[Tensor]) -> None:
        """``existing``: not counted, nor are views of them."""
        super().__init__()  # type: ignore[no-untyped-call]  # torch has no types
        self._known = {tensor.untyped_storage()._cdata for tensor in existing}
        self._bytes = 0
        self.peak_bytes = 0

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        tree_map_only(Tensor, self._follow, result)
        return result

    def _follow(self, tensor: Tensor) -> Tensor:
        storage: UntypedStorage = tensor.untyped_storage()
        key, num_bytes = storage._cdata, storage.nbytes()
        if key not in self._known:
            self._known.add(key)
            self._bytes += num_bytes
            self.peak_bytes = max(self.peak_bytes, self._bytes)
            weakref.finalize(storage, self._forget, key, num_bytes)
        return tensor

    def _forget(self, key: int, num_bytes: int) -> None:
        self._known.discard(key)
        self._bytes -= num_bytes
