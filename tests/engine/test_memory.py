"""Memory that a tensor freed serves the next one, until the worker is idle and gives it back."""

from __future__ import annotations

import ctypes
import resource
from pathlib import Path

import pytest
import torch

from training.engine.torch.memory import give_back_freed_memory, keep_freed_memory

FLOATS = 16 * 2**20
PAGES = 4 * FLOATS // resource.getpagesize()


def faults_of_one_tensor() -> int:
    """Pages that the system had to provide for a tensor that is written once and freed."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(FLOATS)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="needs glibc")
def test_a_freed_tensors_pages_are_used_again() -> None:
    keep_freed_memory()
    # The allocator may take another free block at first, as long as there is one that fits.
    assert min(faults_of_one_tensor() for _ in range(5)) < PAGES / 10


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux")
def test_an_idle_worker_gives_back_what_was_freed_in_the_middle_too() -> None:
    keep_freed_memory()
    tensors = [torch.ones(FLOATS) for _ in range(6)]
    del tensors[:-1]  # the remaining one lies behind the freed ones
    before = resident_bytes()
    give_back_freed_memory()
    assert before - resident_bytes() > 4 * FLOATS * tensors[0].itemsize
