"""Checks training requests in one place before anything is computed.

Every refusal names the datum, the field and, for a value, its position:
``data[3].loss_fn_inputs.weights: 12 values for 11 tokens``. Numpy only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from training.custom_loss_graph import CustomLossGraph
from training.custom_loss_limits import MAX_OPERATIONS
from training.engine.interface import BaseModelInfo, ForwardBackwardJob
from training.errors import InvalidDatum, InvalidRequest, LimitExceeded
from training.loss_checks import check_inputs, complete_config
from training.loss_fns import (
    CUSTOM,
    LOSS_FNS,
    TARGET_TOKENS,
    THRESHOLDS,
    find_loss_fn,
)
from training.types import MAX_FLOAT32, AdamParams, Datum, LoraConfig, wrong_length


def check_job(job: ForwardBackwardJob, info: BaseModelInfo) -> dict[str, float]:
    """Refuse a job that cannot be computed.

    Returns:
        The loss's complete config, defaults filled in.

    Raises:
        InvalidRequest: Unknown loss or config key, or no data.
        InvalidDatum: A datum is wrong.
    """
    if not job.data:
        raise InvalidRequest("data: empty")
    if job.loss_fn == CUSTOM and job.custom_loss is not None:
        _check_custom_job(job, job.custom_loss, info)
        return {}
    config = complete_config(job.loss_fn, job.loss_fn_config)
    for name, value in config.items():
        _check_fits(f"loss_fn_config.{name}", value)
    for i, datum in enumerate(job.data):
        _check_datum(f"data[{i}]", datum, job, config, info)
    return config


def _check_datum(
    where: str,
    datum: Datum,
    job: ForwardBackwardJob,
    config: Mapping[str, float],
    info: BaseModelInfo,
) -> None:
    spec, inputs = find_loss_fn(job.loss_fn), datum.loss_fn_inputs
    check_inputs(job.loss_fn, inputs, where, trains=not job.forward_only)
    _check_tokens(where, datum, info)
    where = f"{where}.loss_fn_inputs"
    targets = inputs[TARGET_TOKENS]
    if targets.ndim == 2 and not spec.allows_many_targets:
        many = ", ".join(name for name, known in LOSS_FNS.items() if known.allows_many_targets)
        raise InvalidDatum(
            f"{where}.target_tokens: shape {list(targets.shape)}, and {job.loss_fn} takes one "
            f"target per token, shape [{len(targets)}]; several per token are for {many}"
        )
    for name in spec.float_inputs:
        if name in inputs:  # an optional one may be absent
            _check_values(f"{where}.{name}", inputs[name], targets.shape)
    if spec.has_thresholds and any(name in inputs for name in THRESHOLDS):
        _check_thresholds(where, inputs, config)


def _check_custom_job(job: ForwardBackwardJob, graph: CustomLossGraph, info: BaseModelInfo) -> None:
    """Check that all inputs of a custom loss exist with the declared rank; ignore the others."""
    if job.loss_fn_config:
        name = next(iter(job.loss_fn_config))
        raise InvalidRequest(f"loss_fn_config.{name[:60]}: unknown for a custom loss")
    if len(graph.nodes) * len(job.data) > MAX_OPERATIONS and not job.is_replay:
        raise LimitExceeded(
            f"data: {len(job.data)} datums for a custom loss of {len(graph.nodes)} operations; "
            f"this server takes {MAX_OPERATIONS // len(graph.nodes)} in one request"
        )
    ranks = {item.name: item.rank for item in graph.inputs[1:]}
    ranks[TARGET_TOKENS] = graph.inputs[0].rank  # logprobs have the targets' shape
    for i, datum in enumerate(job.data):
        where = f"data[{i}].loss_fn_inputs"
        for name, rank in ranks.items():
            if name not in datum.loss_fn_inputs:
                raise InvalidDatum(f"{where}.{name}: missing, and the custom loss needs it")
            array = datum.loss_fn_inputs[name]
            if array.ndim != rank and not (rank == 0 and array.size == 1):
                raise InvalidDatum(f"{where}.{name}: {array.ndim} dimensions instead of {rank}")
            if name != TARGET_TOKENS:
                _check_values(f"{where}.{name}", array, array.shape)
        _check_tokens(f"data[{i}]", datum, info)


def _check_tokens(where: str, datum: Datum, info: BaseModelInfo) -> None:
    """Check shapes and vocabulary of a datum's tokens and targets."""
    tokens, targets = datum.model_input, datum.loss_fn_inputs[TARGET_TOKENS]
    place, targets_place = f"{where}.model_input", f"{where}.loss_fn_inputs.{TARGET_TOKENS}"
    for name, ids in ((place, tokens), (targets_place, targets)):
        if ids.size and (
            ids.dtype.kind not in "iu" or ids.min() < 0 or ids.max() >= info.vocab_size
        ):
            raise _wrong_ids(name, ids, info.vocab_size)
    if tokens.ndim != 1:
        raise InvalidDatum(f"{place}: {tokens.ndim} dimensions instead of 1")
    num_tokens = len(tokens)
    if num_tokens == 0:
        raise InvalidDatum(f"{place}: empty")
    if num_tokens > info.max_context_tokens:
        raise InvalidDatum(
            f"{place}: {num_tokens} tokens, and the model reads at most {info.max_context_tokens}"
        )
    if targets.ndim not in (1, 2):
        raise InvalidDatum(
            f"{targets_place}: {targets.ndim} dimensions instead of 1 or 2; got shape "
            f"{list(targets.shape)} for {num_tokens} tokens"
        )
    if len(targets) != num_tokens:
        raise InvalidDatum(f"{targets_place}: {wrong_length(targets, num_tokens)}")
    if targets.size == 0:
        raise InvalidDatum(f"{targets_place}: no targets")


def _check_thresholds(
    where: str, inputs: Mapping[str, NDArray[Any]], config: Mapping[str, float]
) -> None:
    """Check thresholds per token, if given, against each other or the settings."""
    low, high = (np.asarray(inputs.get(name, config[name])) for name in THRESHOLDS)
    is_wrong = low > high
    if is_wrong.any():
        raise InvalidDatum(
            f"{where}.clip_low_threshold{_subscript(_first(is_wrong))}: above clip_high_threshold"
        )


def _wrong_ids(where: str, ids: NDArray[Any], vocab_size: int) -> InvalidDatum:
    """The error for an array with something else than ids of the vocabulary."""
    if ids.dtype.kind not in "iu":
        return InvalidDatum(f"{where}: {ids.dtype} values instead of token ids")
    index = _first((ids < 0) | (ids >= vocab_size))
    return InvalidDatum(
        f"{where}{_subscript(index)}: token {ids[index]} is not in the vocabulary of {vocab_size}"
    )


def _check_values(where: str, values: NDArray[Any], shape: tuple[int, ...]) -> None:
    if values.dtype.kind not in "fiu":
        raise InvalidDatum(f"{where}: {values.dtype} values instead of numbers")
    if values.shape != shape:
        if values.ndim == 1 and len(shape) == 1:
            raise InvalidDatum(f"{where}: {len(values)} values for {shape[0]} tokens")
        raise InvalidDatum(
            f"{where}: shape {list(values.shape)} for targets of shape {list(shape)}"
        )
    with np.errstate(over="ignore"):
        is_wrong = ~np.isfinite(values.astype(np.float32))
    if is_wrong.any():
        index = _first(is_wrong)
        raise InvalidDatum(f"{where}{_subscript(index)}: {values[index]} is not finite in float32")


def _first(is_wrong: NDArray[np.bool_]) -> tuple[int, ...]:
    return tuple(int(i) for i in np.argwhere(is_wrong)[0])


def _subscript(index: tuple[int, ...]) -> str:
    return "".join(f"[{i}]" for i in index)


def check_lora_config(config: LoraConfig) -> None:
    """Refuse a shape that no adapter can have.

    Raises:
        InvalidRequest: The rank is not positive, alpha is not a float32 number, or nothing is
            trained.
    """
    if config.rank < 1:
        raise InvalidRequest(f"rank: {config.rank} is not at least 1")
    _check_fits("alpha", config.alpha)
    trains = config.train_attn or config.train_mlp or config.train_unembed
    if config.target_modules is None and not trains:
        raise InvalidRequest("train_attn, train_mlp, train_unembed: at least one must be true")


def _check_fits(where: str, value: float) -> None:
    """torch refuses to multiply by a number outside its tensors' range, but only after the work has
    begun."""
    if not (math.isfinite(value) and abs(value) <= MAX_FLOAT32):
        raise InvalidRequest(f"{where}: {value} is not a number that a float32 can hold")


def check_adam_params(params: AdamParams) -> None:
    """Refuse values that torch.optim.AdamW refuses, and values that are not numbers.

    Raises:
        InvalidRequest: The message names the parameter.
    """
    for name in ("learning_rate", "eps", "weight_decay", "grad_clip_norm"):
        value = getattr(params, name)
        if not value >= 0:
            raise InvalidRequest(f"adam_params.{name}: {value} is not a number of at least 0")
        _check_fits(f"adam_params.{name}", value)
    for name in ("beta1", "beta2"):
        value = getattr(params, name)
        if not 0 <= value < 1:
            raise InvalidRequest(f"adam_params.{name}: {value} is not in [0, 1)")
