"""Selects the linear layers of an adapter: by the train_ flags, or by a list of names.

The flags go by a layer's place, not by a table per architecture: a layer below a module
named for attention belongs to attention, the output head is the unembedding, and any other linear
layer belongs to the MLP. The list matches as peft's does: a name, or the end of one after
a dot.
"""

from __future__ import annotations

from collections.abc import Mapping

from training.engine.torch.adapters import LoraShape
from training.errors import InvalidRequest
from training.types import LoraConfig

ATTENTION_MARKS = ("attn", "attention")


def select_modules(
    config: LoraConfig, shapes: Mapping[str, LoraShape], head_name: str
) -> dict[str, LoraShape]:
    """The modules of ``shapes`` that an adapter of this config has, in the same order.

    Raises:
        InvalidRequest: A name in ``target_modules``, or every flag, matches nothing.
    """
    if config.target_modules is None:
        names = [name for name in shapes if _is_flagged(name, config, head_name)]
    else:
        for target in config.target_modules:
            if not any(_matches(name, target) for name in shapes):
                known = sorted({name.rpartition(".")[2] for name in shapes})
                raise InvalidRequest(
                    f"target_modules: {target!r} matches nothing; known: {', '.join(known)}"
                )
        names = [n for n in shapes if any(_matches(n, t) for t in config.target_modules)]
    if not names:
        raise InvalidRequest("target_modules: the adapter would have no module to train")
    return {name: shapes[name] for name in names}


def _is_flagged(name: str, config: LoraConfig, head_name: str) -> bool:
    if name == head_name:
        return config.train_unembed
    is_attention = any(mark in part for part in name.split(".") for mark in ATTENTION_MARKS)
    return config.train_attn if is_attention else config.train_mlp


def _matches(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")
