"""The free memory that the system reports, with and without a container."""

from __future__ import annotations

from pathlib import Path

import pytest

from training.system_memory import free_memory_bytes

GIB = 2**30


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A system of 16 GiB that has 8 GiB left, and no control groups."""
    put(tmp_path / "proc/meminfo", f"MemTotal: {16 * 2**20} kB\nMemAvailable: {8 * 2**20} kB\n")
    return tmp_path


def put(path: Path, text: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{text}\n")


def group(folder: Path, limit: object, used: int, file_cache: int = 0) -> None:
    """A control group of version 2."""
    put(folder / "memory.max", limit)
    put(folder / "memory.current", used)
    put(folder / "memory.stat", f"anon 1\ninactive_file {file_cache}")


def test_without_limits_it_is_what_the_machine_has(root: Path) -> None:
    assert free_memory_bytes(root) == 8 * GIB
    put(root / "proc/self/cgroup", "0::/user.slice")
    group(root / "sys/fs/cgroup/user.slice", "max", 3 * GIB)
    assert free_memory_bytes(root) == 8 * GIB


def test_a_limit_around_our_group_counts(root: Path) -> None:
    put(root / "proc/self/cgroup", "0::/outer/inner")
    mounted = root / "sys/fs/cgroup"
    group(mounted / "outer", 4 * GIB, 3 * GIB)
    group(mounted / "outer/inner", 6 * GIB, 1 * GIB)
    assert free_memory_bytes(root) == 1 * GIB


def test_what_is_cached_of_files_gives_way(root: Path) -> None:
    put(root / "proc/self/cgroup", "0::/")
    group(root / "sys/fs/cgroup", 4 * GIB, 3 * GIB, file_cache=2 * GIB)
    assert free_memory_bytes(root) == 3 * GIB


def test_a_container_that_sees_only_its_own_group_is_limited_too(root: Path) -> None:
    put(root / "proc/self/cgroup", "0::/docker/abc")  # the host's path, which is not mounted
    group(root / "sys/fs/cgroup", 2 * GIB, 1 * GIB)
    assert free_memory_bytes(root) == 1 * GIB


def test_the_first_version_of_control_groups_counts_too(root: Path) -> None:
    put(root / "proc/self/cgroup", "4:memory:/box\n3:cpuset:/\n0::/")
    folder = root / "sys/fs/cgroup/memory"
    put(folder / "memory.limit_in_bytes", 2**63 - 4096)
    put(folder / "memory.usage_in_bytes", 9 * GIB)
    put(folder / "box/memory.limit_in_bytes", 3 * GIB)
    put(folder / "box/memory.usage_in_bytes", 2 * GIB)
    assert free_memory_bytes(root) == 1 * GIB


def test_a_group_that_is_over_its_limit_has_nothing_left(root: Path) -> None:
    put(root / "proc/self/cgroup", "0::/")
    group(root / "sys/fs/cgroup", 2 * GIB, 3 * GIB)
    assert free_memory_bytes(root) == 0


def test_this_machine_says_something_between_nothing_and_all_it_has() -> None:
    assert 0 < free_memory_bytes() < 2**45
