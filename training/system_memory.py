"""How much memory this machine, or the container that we are in, has left. Plain Python."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path


def free_memory_bytes(root: Path = Path("/")) -> int:
    """What processes may still take before the system runs out.

    The least of what the machine has and of what is left of the limits of the control groups that
    we are in. Half of the machine where the system says neither.

    Args:
        root: Where ``proc`` and ``sys`` are.
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
    """What is left of each limit on us: our group's and those of the groups around it."""
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
        # In a container the path may be the host's, and what is mounted begins at our own group.
        own = folder / path.lstrip("/")
        for group in {folder, own, *own.parents}:
            if not group.is_relative_to(folder):
                continue
            most, taken = _number(group / limit), _number(group / used)
            if most is not None and taken is not None:
                yield most - taken + _file_cache(group)


def _file_cache(group: Path) -> int:
    """What of a group's memory is the content of files, which gives way."""
    names = ("inactive_file", "total_inactive_file")
    return max(
        (int(v) for n, v in map(str.split, _lines(group / "memory.stat")) if n in names), default=0
    )


def _number(path: Path) -> int | None:
    lines = _lines(path)
    return int(lines[0]) if lines and lines[0].isdigit() else None  # "max" where there is none


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
