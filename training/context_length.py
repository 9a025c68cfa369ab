"""How long a sequence may be: as long as every part of the model does what it does for short ones.

A model's configuration may name lengths at which it begins to compute otherwise: a sliding window,
a chunk of attention, the length from which its rotary factors are others. Those that this server
computes are no limit. Up to the shortest of the others all sequences are computed alike; beyond it
they would not be, so nothing longer is taken. Plain values only: the worker asks with the loaded
configuration, the web process with what a ``config.json`` says.
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
)
"""Names under which families keep the longest sequence; the first one there counts."""

WINDOW = re.compile(r"(window|chunk)(_size)?s?$")
"""How the name ends of a length that bounds how far a token sees (``sliding_window``,
``attention_chunk_size``), unlike ``max_window_layers`` and ``sliding_window_pattern``."""

COMPUTED_WINDOWS = ("sliding_window", "attention_chunk_size")
"""Those that our attention computes where a layer says so as transformers' layers do."""

ROTARY = ("rope_parameters", "rope_scaling")

STEADY_ROTARY = ("default", "linear", "yarn", "llama3", "proportional")
"""Rotary factors that do not depend on how long a sequence is. All others may."""


def usable_context_tokens(
    config: Mapping[str, Any], *, computed_windows: Collection[str] = COMPUTED_WINDOWS
) -> int | None:
    """The longest sequence that is computed as the model means it; None if nothing says.

    Args:
        config: A causal model's configuration; of one with images, or its text part.
        computed_windows: Names of windows that are no limit.
    """
    inner = config.get("text_config")
    if isinstance(inner, Mapping):
        return usable_context_tokens(inner, computed_windows=computed_windows)
    windows = _windows({k: v for k, v in config.items() if k not in computed_windows})
    return min([*_trained_length(config), *windows, *_rotary_switches(config)], default=None)


def _trained_length(config: Mapping[str, Any]) -> Iterable[int]:
    return [config[name] for name in TRAINED_LENGTHS if _is_length(config.get(name))][:1]


def _windows(config: Mapping[str, Any]) -> Iterator[int]:
    if config.get("use_sliding_window") is False:
        return
    for name, value in config.items():
        if WINDOW.search(name):
            values = value if isinstance(value, list | tuple) else [value]
            yield from (each for each in values if _is_length(each))


def _rotary_switches(config: Mapping[str, Any]) -> Iterator[int]:
    for name in ROTARY:
        for parameters in _rotary_parameters(config.get(name)):
            kind = parameters.get("rope_type", parameters.get("type", "default"))
            if kind in STEADY_ROTARY:
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
