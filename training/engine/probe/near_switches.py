"""Lengths at which a model begins to compute otherwise, brought within the proof's short passages.

A window of 4,096 tokens shows in the 4,097th. What a layer does there does not depend on the
number, so for the proof it is a small one, for stock transformers and for us alike.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from transformers import PreTrainedModel

from training.engine.torch.attention.backend import CHUNK_ATTRIBUTE

SWITCHES = ("sliding_window", "attention_chunk_size", CHUNK_ATTRIBUTE, "floor_scale")
"""Names under which configurations and layers keep such lengths: from the last on, queries are
scaled by their position."""

NEAR_TOKENS = 8


@contextmanager
def near_switches(model: PreTrainedModel) -> Iterator[bool]:
    """Inside, these lengths are at most ``NEAR_TOKENS``.

    Gives whether any was more.
    """
    owners: dict[int, Any] = {id(module): module for module in model.modules()}
    for module in list(owners.values()):
        config = getattr(module, "config", None)
        if config is not None:
            owners[id(config)] = config
    far = [
        (owner, name, value)
        for owner in owners.values()
        for name in SWITCHES
        if _is_far(value := vars(owner).get(name))
    ]
    with ExitStack() as stack:
        for owner, name, value in far:
            setattr(owner, name, NEAR_TOKENS)
            stack.callback(setattr, owner, name, value)
        yield bool(far)


def _is_far(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > NEAR_TOKENS
