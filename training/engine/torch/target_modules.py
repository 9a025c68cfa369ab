"""Selects the linear layers of an adapter: by the train_ flags, or by a list of names.

The flags go by a layer's place, not by a table per architecture: a layer below a module
named for attention belongs to attention, the output head is the unembedding, and any other linear
layer belongs to the MLP, those of experts too; routers are not among the layers. The list matches
as peft's does: a name, or the end of one after a dot.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import product

from training.engine.torch.adapters import LoraShape
from training.errors import InvalidRequest
from training.types import LoraConfig

PEFT_REFUSES = {
    "out_proj": frozenset({"falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h"})
}
"""Linear layers, with the model types in which stock peft refuses an adapter on them, because fused
kernels of these types read their weight and would ignore it."""

ATTENTION_MARKS = ("attn", "attention")


def select_modules(
    config: LoraConfig, shapes: Mapping[str, LoraShape], head_name: str
) -> dict[str, LoraShape]:
    """The modules of ``shapes`` that an adapter of this config has, in the same order.

    Raises:
        InvalidRequest: A name in ``target_modules``, or every flag, matches nothing; or the config
            is about experts, and there are none.
    """
    if config.target_modules is None:
        names = [name for name in shapes if _is_flagged(name, config, head_name)]
    else:
        targets, matched = set(config.target_modules), set[str]()
        names = []
        for name in shapes:
            if hits := targets.intersection(_endings(name)):
                matched |= hits
                names.append(name)
        for target in config.target_modules:
            if target not in matched:
                known = sorted({name.rpartition(".")[2] for name in shapes})
                raise InvalidRequest(
                    f"target_modules: {target!r} matches nothing; known: {', '.join(known)}"
                )
    if not names:
        raise InvalidRequest("target_modules: the adapter would have no module to train")
    if config.share_across_experts:
        return {name: shapes[name] for name in names}
    if not any(shapes[name].num_experts for name in names):
        raise InvalidRequest(
            "share_across_experts: false, but the adapter would have no experts; leave it out"
        )
    return {name: shapes[name].without_sharing() for name in names}


def can_have_adapter(name: str, model_type: str) -> bool:
    """Whether stock peft loads an adapter on the module of this name."""
    return model_type not in PEFT_REFUSES.get(name.rpartition(".")[2], ())


def _is_flagged(name: str, config: LoraConfig, head_name: str) -> bool:
    if name == head_name:
        return config.train_unembed
    is_attention = any(mark in part for part in name.split(".") for mark in ATTENTION_MARKS)
    return config.train_attn if is_attention else config.train_mlp


def _endings(name: str) -> Iterator[str]:
    """The name, and what stands after each of its dots."""
    while name:
        yield name
        name = name.partition(".")[2]


def simplest_config(
    config: LoraConfig, shapes: Mapping[str, LoraShape], head_name: str
) -> LoraConfig:
    """The config that selects the same modules by flags alone, if one does; else ``config``.

    A model made with the flags can then load it.
    """
    modules = select_modules(config, shapes, head_name)
    for attn, mlp, unembed in product((True, False), repeat=3):
        flagged = replace(
            config, train_attn=attn, train_mlp=mlp, train_unembed=unembed, target_modules=None
        )
        if {name for name in shapes if _is_flagged(name, flagged, head_name)} == set(modules):
            return flagged
    return config
