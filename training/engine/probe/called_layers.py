"""Which linear layers a model calls; of others it may read the weight alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import nn


def general_name(name: str) -> str:
    """A module's name without its numbers: ``layers.#.mlp.up_proj``."""
    return ".".join("#" if word.isdigit() else word for word in name.split("."))


@contextmanager
def calls_noted(model: nn.Module, called: set[str]) -> Iterator[None]:
    """Inside, the general names of the linear layers that are called are added to ``called``."""
    with ExitStack() as stack:
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear):
                note = partial(_note, called, general_name(name))
                stack.callback(module.register_forward_hook(note).remove)
        yield


def _note(called: set[str], name: str, *hook_arguments: Any) -> None:
    """A forward hook, once the first two arguments are given."""
    called.add(name)
