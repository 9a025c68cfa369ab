"""What a trainer says about its base model."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class BaseModelInfo:
    """What a client may know about the base model."""

    name: str
    vocab_size: int
    max_context_tokens: int
    num_parameters: int
    device: str
    dtype: str
