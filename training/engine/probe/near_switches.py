"""Shortens the lengths at which a model computes differently, so that the check's passages cross
them.

A window of 4,096 tokens only has an effect at the 4,097th. The computation does not depend on the
number, so the check uses a small window, for stock transformers and for the engine alike.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from transformers import PreTrainedModel

from training.context_length import PARTS
from training.engine.torch.attention.backend import CHUNK_ATTRIBUTE

SWITCHES = ("sliding_window", "attention_chunk_size", CHUNK_ATTRIBUTE, "floor_scale")
"""Names of such lengths in configurations and layers: from the last one on, queries are
scaled by their position."""

NEAR_TOKENS = 8


@contextmanager
def near_switches(model: PreTrainedModel) -> Iterator[bool]:
    """Inside, these lengths are at most ``NEAR_TOKENS``.

    Yields whether any of ``SWITCHES`` was larger.
    """
    owners: dict[int, Any] = {id(module): module for module in model.modules()}
    for module in list(owners.values()):
        config = getattr(module, "config", None)
        if config is not None:
            owners[id(config)] = config
    far = [
        (owner, name, value)
        for owner in owners.values()
        for name in (*SWITCHES, *PARTS)
        if _is_far(value := vars(owner).get(name))
    ]
    with ExitStack() as stack:
        for owner, name, value in far:
            setattr(owner, name, NEAR_TOKENS)
            stack.callback(setattr, owner, name, value)
        yield any(name in SWITCHES for _, name, _ in far)


def _is_far(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > NEAR_TOKENS
