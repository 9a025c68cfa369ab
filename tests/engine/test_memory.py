"""Memory that a tensor freed serves the next one without being asked of the system again."""

from __future__ import annotations

import ctypes
import resource

import pytest
import torch

from training.engine.torch.memory import keep_freed_memory

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
