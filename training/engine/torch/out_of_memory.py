"""Turns torch's and numpy's various out-of-memory errors into one domain error."""

from __future__ import annotations

from types import TracebackType

import torch

from training.errors import OutOfMemory

ALLOCATION_FAILED = (
    "can't allocate memory",
    "not enough memory",
    "out of memory",
    "ALLOC_FAILED",
    "bad_alloc",
)
"""Parts of RuntimeErrors' texts: of torch's allocator on a CPU, CUDA's libraries, and C++."""


def is_out_of_memory(error: Exception) -> bool:
    """Whether an allocation failed, on any device."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError | OutOfMemory):
        return True
    return isinstance(error, RuntimeError) and any(
        words in str(error) for words in ALLOCATION_FAILED
    )


class out_of_memory_by_name:  # noqa: N801  (reads as a verb after ``with``)
    """Turn a failed allocation into OutOfMemory, and free the memory that led to it.

    For code that publishes its result at the end, so that a failure has changed nothing.
    """

    def __enter__(self) -> None:
        pass

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if not isinstance(error, Exception) or not is_out_of_memory(error):
            return
        # The traceback's frames hold the tensors that filled the memory, and the handler of this
        # error may try something smaller.
        del traceback
        error.__traceback__ = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        raise OutOfMemory from None
