"""Results as JSON: those for SDKs before 0.25, and those for every SDK.

The values are plain Python, ready for any JSON writer. JSON has no NaN: a prompt position that was
not scored is null, which those clients show as None.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from tinkerapi.api.sdk.render.protobuf import OUTPUT_TYPE, one_prompt, sdk_metrics, wire_array
from training.kinds import Kind
from training.paths import TinkerPath

_TYPES: Mapping[str, str] = {
    Kind.CREATE_RUN: "create_model",
    Kind.REMOVE_RUN: "unload_model",
    Kind.OPTIM_STEP: "optim_step",
    Kind.LOAD_WEIGHTS: "load_weights",
    Kind.CREATE_CUSTOM_LOSS: "create_custom_loss",
}
_SAVE_TYPES: Mapping[str, str] = {
    "training": "save_weights",
    "sampler": "save_weights_for_sampler",
    "external": "save_weights_external",
}
"""A checkpoint's kind to the request that made it."""

NO_DATA_LOGPROB = -99999.0
"""With token id 0: marks an empty top-k cell."""


def typed_result(kind: str, result: Mapping[str, Any]) -> dict[str, Any]:
    """A result with the SDK's name of the operation, the field ``type`` of its models."""
    if kind == Kind.SAVE_WEIGHTS:
        path = result.get("path")
        saved = "sampler" if path is None else TinkerPath.parse(path, field="path").kind
        return {**result, "type": _SAVE_TYPES[saved]}
    if kind == Kind.CREATE_RUN and "path" in result:  # from a checkpoint: for the SDK it was a load
        kind = Kind.LOAD_WEIGHTS
    return {**result, "type": _TYPES[kind]} if kind in _TYPES else dict(result)


def forward_backward_output_json(result: Mapping[str, Any]) -> dict[str, Any]:
    """``{"loss_fn_output_type", "loss_fn_outputs": [{name: TensorData}], "metrics"}``."""
    return {
        "loss_fn_output_type": OUTPUT_TYPE,
        "loss_fn_outputs": [
            {name: _tensor_data(value) for name, value in output.items()}
            for output in result["loss_fn_outputs"]
        ],
        "metrics": sdk_metrics(result["metrics"]),
    }


def sample_response_json(result: Mapping[str, Any]) -> dict[str, Any]:
    """``{"sequences", "prompt_logprobs"?, "topk_prompt_logprobs"?, "type": "sample"}``.

    ``topk_logprobs``, ``target_prompt_logprobs`` and ``prompt_alt_tokens`` are newer than these
    clients, which cannot request them, so they are left out.
    """
    answer: dict[str, Any] = {
        "sequences": [_sequence(sequence) for sequence in result["sequences"]],
        "type": "sample",
    }
    if result.get("prompt_logprobs") is not None:
        logprobs = one_prompt(result["prompt_logprobs"])
        answer["prompt_logprobs"] = [
            None if value != value else value  # NaN
            for value in logprobs.tolist()
        ]
    if result.get("topk_prompt_logprobs") is not None:
        answer["topk_prompt_logprobs"] = _topk_rows(result["topk_prompt_logprobs"])
    return answer


def _sequence(sequence: Mapping[str, Any]) -> dict[str, Any]:
    answer = {
        "stop_reason": sequence["stop_reason"],
        "tokens": np.asarray(sequence["tokens"], np.int32).tolist(),
    }
    if sequence.get("logprobs") is not None:
        answer["logprobs"] = np.asarray(sequence["logprobs"], np.float32).tolist()
    return answer


def _tensor_data(value: Any) -> dict[str, Any]:
    array = wire_array(value)
    return {
        "data": array.ravel().tolist(),
        "dtype": "float32" if array.dtype.kind == "f" else "int64",
        "shape": list(array.shape),
    }


def _topk_rows(value: Mapping[str, Any]) -> list[list[list[float]] | None]:
    """For each position its [token id, logprob] pairs; None if it has none."""
    rows = zip(
        np.asarray(value["token_ids"]).tolist(),
        np.asarray(value["logprobs"], np.float32).tolist(),
        strict=True,
    )
    return [_pairs(token_ids, logprobs) for token_ids, logprobs in rows]


def _pairs(token_ids: list[int], logprobs: list[float]) -> list[list[float]] | None:
    pairs = [list(pair) for pair in zip(token_ids, logprobs, strict=True)]
    while pairs and pairs[-1] == [0, NO_DATA_LOGPROB]:
        pairs.pop()
    return pairs or None
