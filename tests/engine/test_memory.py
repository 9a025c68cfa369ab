"""Memory that a tensor freed serves the next one, until the worker is idle and gives it back."""

from __future__ import annotations

import ctypes
import resource
from pathlib import Path

import pytest
import torch

from training.engine.sampler.kv_cache import KvCache
from training.engine.torch.attention.arithmetic import BLOCK_TOKENS
from training.engine.torch.memory import give_back_freed_memory, keep_freed_memory

FLOATS = 16 * 2**20
PAGES = 4 * FLOATS // resource.getpagesize()
CACHE_BYTES = 2**30


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


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_of_a_cache_take_memory_when_they_are_used(dtype: torch.dtype) -> None:
    heads, dim = 4, 64
    block_bytes = heads * BLOCK_TOKENS * dim * dtype.itemsize
    cache = KvCache(CACHE_BYTES // (2 * block_bytes), torch.device("cpu"))
    before = resident_bytes()
    rows = torch.ones(2, heads, dim, dtype=dtype)
    cache.store(0, torch.arange(2 * heads), rows, rows)
    keys, _ = cache.blocks(0)
    assert keys.numel() * dtype.itemsize > CACHE_BYTES // 3
    assert resident_bytes() - before < CACHE_BYTES // 8
    assert keys[0].sum() == rows.sum()
    assert not keys[-1].any()
    keys.fill_(1)
    assert resident_bytes() - before > CACHE_BYTES // 3
    cache.clear()
    del keys
    assert resident_bytes() - before < CACHE_BYTES // 8
