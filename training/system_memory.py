"""The free memory of this machine, or of this process's container. Plain Python."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path


def free_memory_bytes(root: Path = Path("/")) -> int:
    """The bytes that processes may still allocate.

    It is the smallest of the machine's free memory and the free memory of this process's control
    groups. If the system reports neither, it is half of the machine's memory.

    Args:
        root: The folder with ``proc`` and ``sys``.
    """
    found = [*_machine(root / "proc" / "meminfo"), *_control_groups(root)]
    if found:
        return max(0, min(found))
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def _machine(meminfo: Path) -> Iterator[int]:
    for line in _lines(meminfo):
        if line.startswith("MemAvailable:"):
            yield int(line.split()[1]) * 1024


def _control_groups(root: Path) -> Iterator[int]:
    """The free memory within each limit: our group's and those of its parents."""
    mounted = root / "sys" / "fs" / "cgroup"
    for line in _lines(root / "proc" / "self" / "cgroup"):
        _, controllers, path = line.split(":", 2)
        if not controllers:  # version 2
            folder, limit, used = mounted, "memory.max", "memory.current"
        elif "memory" in controllers.split(","):
            folder, limit = mounted / "memory", "memory.limit_in_bytes"
            used = "memory.usage_in_bytes"
        else:
            continue
        # In a container the path may be the host's, and the mount begins at our own group.
        own = folder / path.lstrip("/")
        for group in {folder, own, *own.parents}:
            if not group.is_relative_to(folder):
                continue
            most, taken = _number(group / limit), _number(group / used)
            if most is not None and taken is not None:
                yield most - taken + _file_cache(group)


def _file_cache(group: Path) -> int:
    """The part of a group's memory that is cached files, which can be freed."""
    names = ("inactive_file", "total_inactive_file")
    return max(
        (int(v) for n, v in map(str.split, _lines(group / "memory.stat")) if n in names), default=0
    )


def _number(path: Path) -> int | None:
    lines = _lines(path)
    return int(lines[0]) if lines and lines[0].isdigit() else None  # "max" if there is no limit


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
