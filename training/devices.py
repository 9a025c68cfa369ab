"""The device of a base model's worker, and its number of threads."""

from __future__ import annotations

from collections.abc import Sequence

from training.base_model_config import BaseModelConfig
from training.errors import DeviceNotFound


def num_sharing(
    config: BaseModelConfig, *, among: Sequence[BaseModelConfig], gpu_count: int
) -> int:
    """How many base models of a server, this one included, share its device's memory."""

    def device(other: BaseModelConfig) -> str:
        try:
            return device_of(other, among=among, gpu_count=gpu_count)
        except DeviceNotFound:  # it will not be served
            return ""

    return [device(other) for other in among].count(device(config))


def num_threads(asked: int, torchs_own: int) -> int:
    """Threads of one worker's passes on a CPU.

    One processor is left to web and Postgres: torch's threads wait for each other in busy loops,
    so if another process delays one of them, a pass takes ten times as long.

    Args:
        asked: The operator's setting; 0 if there is none.
        torchs_own: torch's default.
    """
    return asked or max(1, torchs_own - 1)


def device_of(config: BaseModelConfig, *, among: Sequence[BaseModelConfig], gpu_count: int) -> str:
    """``cpu`` or ``cuda:N`` for one base model of a server.

    Base models that name a GPU get it. The others take, in their order, the GPUs that are not
    named, starting again with the first if there are more base models than GPUs.

    Args:
        among: All base models of the server, ``config`` included.
        gpu_count: The number of GPUs that torch sees.

    Raises:
        DeviceNotFound: It names a GPU that does not exist.
    """
    if config.device == "cpu" or (config.device == "auto" and gpu_count == 0):
        return "cpu"
    named = {int(c.device[5:]) for c in among if c.device.startswith("cuda:")}
    if config.device.startswith("cuda:"):
        chosen = int(config.device[5:])
    else:
        open_to_all = [i for i in range(gpu_count) if i not in named] or list(range(gpu_count))
        place = [c.name for c in among if c.device in ("auto", "cuda")].index(config.name)
        chosen = open_to_all[place % len(open_to_all)] if open_to_all else 0
    if chosen >= gpu_count:
        seen = f"{gpu_count} GPU{'s' if gpu_count > 1 else ''}" if gpu_count else "no GPU"
        raise DeviceNotFound(
            f"base model {config.name} is for {config.device} and torch sees {seen}; check driver "
            "and torch build"
        )
    return f"cuda:{chosen}"
