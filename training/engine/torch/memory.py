"""Keeps the memory of freed tensors for the next ones, and returns it to the system when idle.

On a CPU torch takes memory from the C library, and glibc gives a large block back to the system as
soon as it is freed: every pass and every optimizer step then pays for the same pages again, one
page fault per 4 KiB. (An optimizer step of 11 million parameters took 300 ms, and 50 ms without
that.) So the process keeps the memory of its largest batch, which training needs again.

When nobody trains, this changes: an idle worker returns that memory, and the first step
after that is as slow as every step would be without keeping it.
"""

from __future__ import annotations

import ctypes

import torch

from training.system_memory import free_memory_bytes

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # names and values of glibc's malloc.h
NEVER = -1
LARGEST_KEPT = 2**31 - 1  # bytes of one block, the largest value allowed


def keep_freed_memory() -> None:
    """From now on the process keeps freed blocks. Does nothing without glibc."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_TRIM_THRESHOLD, NEVER)
        mallopt(M_MMAP_THRESHOLD, LARGEST_KEPT)


def give_back_freed_memory() -> None:
    """Return the memory of freed tensors to the system, on a GPU and in this process.

    Takes about a tenth of a second for each GiB that is returned. Without glibc,
    the C library manages the process's memory.
    """
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if malloc_trim is not None:
        malloc_trim(0)


def device_memory(device: torch.device) -> tuple[int, int] | None:
    """The taken and all bytes of a GPU's memory, as its driver counts them; None for a CPU."""
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    return total - free, total


def free_bytes(device: torch.device) -> int:
    """The memory available to tensors on a device, including freed blocks that torch keeps."""
    if device.type != "cuda":
        return free_memory_bytes()
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + kept
