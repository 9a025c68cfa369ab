"""The device of each process of a base model's workers, and its number of threads."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from training.base_model_config import BaseModelConfig
from training.errors import DeviceNotFound

QUOTA = Path("/sys/fs/cgroup/cpu.max")
"""The CPU time that this process's control group may take: microseconds, or "max", of a period."""


def num_sharing(
    config: BaseModelConfig, number: int, *, among: Sequence[BaseModelConfig], gpu_count: int
) -> int:
    """How many processes of a server, this one included, share its device's memory.

    Args:
        number: Of the process, among its base model's.
    """

    def device(other: BaseModelConfig, number: int) -> str:
        try:
            return device_of(other, number, among=among, gpu_count=gpu_count)
        except DeviceNotFound:  # it will not be served
            return ""

    return [device(*other) for other in _processes(among)].count(device(config, number))


def num_threads(asked: int, torchs_own: int, *, processes: int = 1) -> int:
    """torch's own threads, of one of several ranks on a CPU.

    One processor is left to web and Postgres: torch's threads wait for each other in busy loops,
    so if another process delays one of them, a pass takes ten times as long. The processes of a
    base model share the others. A worker of one rank does not use them (``engine.torch``'s
    ``thread_team``).

    Args:
        asked: The operator's setting; 0 if there is none.
        torchs_own: torch's default.
        processes: Of the base model's workers on this machine.
    """
    return asked or max(1, (torchs_own - 1) // processes)


def own_cores() -> Sequence[int]:
    """The cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return range(os.cpu_count() or 1)


def count_cores(quota: Path = QUOTA) -> int:
    """The cores that this process may use, by its affinity and its control group's quota."""
    cores = len(own_cores())
    try:
        limit, period = quota.read_text().split()
        return max(1, min(cores, int(limit) // int(period)))
    except (OSError, ValueError):  # no control group, or no quota
        return cores


def device_of(
    config: BaseModelConfig,
    number: int = 0,
    *,
    among: Sequence[BaseModelConfig],
    gpu_count: int,
) -> str:
    """``cpu`` or ``cuda:N`` for one process of a base model's workers.

    Processes that name a GPU get it. The others take, in their order, the GPUs that are not
    named, starting again with the first if there are more processes than GPUs.

    Args:
        number: Of the process, among its base model's.
        among: All base models of the server, ``config`` included.
        gpu_count: The number of GPUs that torch sees.

    Raises:
        DeviceNotFound: It names a GPU that does not exist.
    """
    asked = config.device_of_process(number)
    if asked == "cpu" or (asked == "auto" and gpu_count == 0):
        return "cpu"
    every = [(c.name, n, c.device_of_process(n)) for c, n in _processes(among)]
    named = {int(device[5:]) for _, _, device in every if device.startswith("cuda:")}
    if asked.startswith("cuda:"):
        chosen = int(asked[5:])
    else:
        open_to_all = [i for i in range(gpu_count) if i not in named] or list(range(gpu_count))
        choosing = [(name, n) for name, n, device in every if device in ("auto", "cuda")]
        place = choosing.index((config.name, number))
        chosen = open_to_all[place % len(open_to_all)] if open_to_all else 0
    if chosen >= gpu_count:
        seen = f"{gpu_count} GPU{'s' if gpu_count > 1 else ''}" if gpu_count else "no GPU"
        raise DeviceNotFound(
            f"base model {config.name} is for {asked} and torch sees {seen}; check driver "
            "and torch build"
        )
    return f"cuda:{chosen}"


def _processes(among: Sequence[BaseModelConfig]) -> list[tuple[BaseModelConfig, int]]:
    """Every process of a server's workers, as its base model and its number among that one's."""
    return [(config, number) for config in among for number in range(config.num_processes)]
