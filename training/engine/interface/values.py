"""The values that roles exchange with each other and with their callers."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path

from training.base_model_config import PACKED


@dataclass(frozen=True, kw_only=True)
class BaseModelInfo:
    """The base model's properties for clients."""

    name: str
    vocab_size: int
    max_context_tokens: int
    num_parameters: int
    device: str
    dtype: str
    layout: str = PACKED
    """The layout of sequences in its passes: ``packed`` or ``padded``."""
    rotary_switch: int | None = None
    """The length beyond which a sequence's tokens are rotated by other factors, the earlier ones
    too; None: they never are."""


class CapturedAdapter(ABC):
    """The state of an adapter when the trainer captured it.

    It does not change when the adapter is trained or dropped, and may be given to a sampler.
    If it was captured with the optimizer, another thread may write it: everything was read at the
    capture, so writing needs neither the device nor another process. Weights alone are only for the
    thread that captured them, and may still be on the device.
    """

    @property
    @abstractmethod
    def num_bytes(self) -> int:
        """Size of its numbers in memory."""

    @abstractmethod
    def write(self, directory: Path) -> int:
        """Write it into a new directory, for ``load_adapter`` and ``Sampler.publish``.

        It is written beside it, fsynced, then renamed, so the directory is complete or absent.
        Its ``meta.json`` is human-readable and has a checksum of every file.

        Returns:
            The bytes written.

        Raises:
            StorageFull, StorageFailed: Nothing is left behind.
        """
