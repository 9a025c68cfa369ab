"""What the roles hand to each other and to their callers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class BaseModelInfo:
    """What a client may know about the base model."""

    name: str
    vocab_size: int
    max_context_tokens: int
    num_parameters: int
    device: str
    dtype: str


class CapturedAdapter(ABC):
    """An adapter as it was when the trainer captured it.

    It stays that, while the adapter trains on or is dropped, and may be handed to a sampler.
    Another thread may write it if it was captured with the optimizer: everything was read then, so
    that writing asks neither the device nor another process. Weights alone are for the thread that
    captured them, and may be on the device still.
    """

    @property
    @abstractmethod
    def num_bytes(self) -> int:
        """Size of its numbers, in memory."""

    @abstractmethod
    def write(self, directory: Path) -> int:
        """Write it into a new directory, which ``load_adapter`` and ``Sampler.publish`` take.

        Written beside it, fsynced, then renamed, so that the directory is whole or absent.
        ``meta.json`` in it can be read by eye and carries a checksum of every file.

        Returns:
            The bytes written.

        Raises:
            StorageFull, StorageFailed: Nothing is left behind.
        """
