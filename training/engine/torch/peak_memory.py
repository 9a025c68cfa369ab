"""The most memory that a pass has taken, and on a CPU a pass that takes less of it."""

from __future__ import annotations

import ctypes
from pathlib import Path
from types import TracebackType

import torch

from training.engine.torch.memory import (
    LARGEST_KEPT,
    M_MMAP_THRESHOLD,
    give_back_freed_memory,
)

SMALLEST_RETURNED = 2**20  # bytes of one block
RESET_PEAK = "5"  # what Linux takes in /proc/self/clear_refs


class PeakMemory:
    """While active, memory is used sparingly, and its peak above that at the start is recorded.

    On a CPU large blocks go back to the system as soon as they are freed. Kept blocks would be
    split by smaller tensors until the process has four times the memory of its tensors; returned
    ones cost a fifth of the pass's time (glibc 2.36). On a GPU torch's allocator has neither fault.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._start: int | None = None

    def __enter__(self) -> PeakMemory:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
            self._start = torch.cuda.memory_allocated(self._device)
            return self
        give_back_freed_memory()
        _return_blocks_of(SMALLEST_RETURNED)
        try:
            Path("/proc/self/clear_refs").write_text(RESET_PEAK)
        except OSError:  # not Linux, or not allowed: the peak stays unknown
            return self
        self._start = _process_bytes("VmRSS")
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._device.type != "cuda":
            _return_blocks_of(LARGEST_KEPT)

    def peak_bytes(self) -> int | None:
        """So far: of tensors on a GPU, of the process on a CPU. None if the system hides it."""
        if self._start is None:
            return None
        if self._device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._device) - self._start
        return _process_bytes("VmHWM") - self._start


def _return_blocks_of(num_bytes: int) -> None:
    """From now on freed blocks of at least this size are returned. Does nothing without glibc."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, num_bytes)


def _process_bytes(name: str) -> int:
    """A figure of this process from the system."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise FileNotFoundError(name)
