"""The longest sequence for which every part of the model computes as it does for short ones.

A model's configuration may name lengths from which it computes differently: a sliding window,
a chunk of attention, the length from which its rotary factors change. Those that this server
computes are no limit. The shortest of the others is the limit: up to it all sequences are computed
in the same way. This module uses plain values only: the worker calls it with the loaded
configuration, the web process with the contents of ``config.json``.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, TypeGuard

TRAINED_LENGTHS = (
    "max_position_embeddings",
    "n_positions",
    "max_seq_len",
    "max_seq_length",
    "max_sequence_length",
    "seq_length",
    "model_max_length",
)
"""Names of the longest sequence in different families; the first one present counts."""

RECURRENT_TYPES = ("mamba", "mamba2", "falcon_mamba")
"""Model types without positions, in whose configuration no length is written: they compute every
length alike, so the limit is ours."""

RECURRENT_TOKENS = 131_072

WINDOW = re.compile(r"(window|chunk)(_size)?s?$")
"""Endings of the names of lengths that bound attention (``sliding_window``,
``attention_chunk_size``), unlike ``max_window_layers`` and ``sliding_window_pattern``."""

PARTS = ("chunk_size", "mamba_chunk_size")
"""Lengths into which recurrent layers cut a sequence, passing their state on: no limit."""

COMPUTED_WINDOWS = ("sliding_window", "attention_chunk_size")
"""Windows that our attention computes if a layer declares them as transformers' layers do."""

COMPUTED_ROTARY = ("longrope",)
"""Rotary factors that change with a sequence's length and that each gets for its own."""

COMPUTED = (*COMPUTED_WINDOWS, *COMPUTED_ROTARY)
"""Windows and factors that are no limit, unless the loaded model computes them differently."""

ROTARY = ("rope_parameters", "rope_scaling")

STEADY_ROTARY = ("default", "linear", "yarn", "llama3", "proportional")
"""Rotary factors that do not depend on the sequence's length. All others may."""


def usable_context_tokens(
    config: Mapping[str, Any], *, computed: Collection[str] = COMPUTED
) -> int | None:
    """The longest sequence that is computed correctly; None if the configuration gives no limit.

    Args:
        config: A causal model's configuration, or the text part of a model with images.
        computed: Names of windows and kinds of rotary factors that are no limit.
    """
    inner = config.get("text_config")
    if isinstance(inner, Mapping):
        return usable_context_tokens(inner, computed=computed)
    windows = _windows({k: v for k, v in config.items() if k not in computed})
    switches = _rotary_switches(config, steady=(*STEADY_ROTARY, *computed))
    return min([*_trained_length(config), *windows, *switches], default=None)


def _trained_length(config: Mapping[str, Any]) -> Iterable[int]:
    lengths = [config[name] for name in TRAINED_LENGTHS if _is_length(config.get(name))][:1]
    if not lengths and config.get("model_type") in RECURRENT_TYPES:
        return [RECURRENT_TOKENS]
    return lengths


def _windows(config: Mapping[str, Any]) -> Iterator[int]:
    if config.get("use_sliding_window") is False:
        return
    for name, value in config.items():
        if WINDOW.search(name) and name not in PARTS:
            values = value if isinstance(value, list | tuple) else [value]
            yield from (each for each in values if _is_length(each))


def _rotary_switches(config: Mapping[str, Any], *, steady: Collection[str]) -> Iterator[int]:
    for name in ROTARY:
        for parameters in _rotary_parameters(config.get(name)):
            kind = parameters.get("rope_type", parameters.get("type", "default"))
            if kind in steady:
                continue
            original = "original_max_position_embeddings"
            yield from (
                length
                for length in (parameters.get(original), config.get(original))
                if _is_length(length)
            )


def _rotary_parameters(value: Any) -> Iterator[Mapping[str, Any]]:
    """One set for all layers, or one for each kind of layer."""
    if isinstance(value, Mapping):
        yield value
        for inner in value.values():
            yield from _rotary_parameters(inner)


def _is_length(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
