"""Results as JSON: those for SDKs before 0.25, and those for every SDK.

The values are plain Python, ready for any JSON writer. JSON has no NaN: a prompt position that was
not scored is null, which those clients show as None.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from tinkerapi.api.sdk.render.protobuf import OUTPUT_TYPE, one_prompt, sdk_metrics
from training.kinds import (
    CompareRunsResult,
    CreateCustomLossResult,
    CreateRunResult,
    ForwardBackwardResult,
    LoadWeightsResult,
    OptimStepResult,
    RemoveRunResult,
    Result,
    SampleResult,
    SaveWeightsResult,
)
from training.kinds.sample_result import SequenceResult
from training.paths import TinkerPath
from training.types import NO_DATA_LOGPROB, TopLogprobs

Body = dict[str, Any]

_SAVE_TYPES: Mapping[str, str] = {
    "training": "save_weights",
    "sampler": "save_weights_for_sampler",
    "external": "save_weights_external",
}
"""A checkpoint's kind to the request that made it."""


def result_json(result: Result) -> Body:
    """A result as JSON. Those that the SDK reads only in this form have the SDK's name of the
    operation, the field ``type`` of its models."""
    return _RENDERERS[type(result)](result)


def _create_run(result: CreateRunResult) -> Body:
    body = {
        "alpha": result.alpha,
        "base_model": result.base_model,
        "model_id": result.model_id,
        "rank": result.rank,
    }
    if result.path is None:
        return {**body, "type": "create_model"}
    return {**body, "path": result.path, "type": "load_weights"}  # for the SDK it was a load


def _remove_run(result: RemoveRunResult) -> Body:
    return {"model_id": result.model_id, "status": "deleted", "type": "unload_model"}


def _optim_step(result: OptimStepResult) -> Body:
    metrics = {
        "grad_norm": result.grad_norm,
        "learning_rate": result.learning_rate,
        "step": result.step,
    }
    return {
        "backend": result.backend,
        "metrics": metrics,
        "model_id": result.model_id,
        "type": "optim_step",
    }


def _save_weights(result: SaveWeightsResult) -> Body:
    if result.path is None:
        return {
            "model_id": result.model_id,
            "sampling_session_id": result.sampling_session_id,
            "type": _SAVE_TYPES["sampler"],
        }
    return {
        "model_id": result.model_id,
        "path": result.path,
        "size_bytes": result.size_bytes,
        "type": _SAVE_TYPES[TinkerPath.parse(result.path, field="path").kind],
    }


def _load_weights(result: LoadWeightsResult) -> Body:
    return {"model_id": result.model_id, "path": result.path, "type": "load_weights"}


def _compare_runs(result: CompareRunsResult) -> Body:
    return {
        "identical": result.is_identical,
        "largest_difference": result.largest_difference,
        "steps": result.steps,
    }


def _create_custom_loss(result: CreateCustomLossResult) -> Body:
    return {"loss_id": result.loss_id, "type": "create_custom_loss"}


def forward_backward_output_json(result: ForwardBackwardResult) -> Body:
    """``{"loss_fn_output_type", "loss_fn_outputs": [{"logprobs": TensorData}], "metrics"}``."""
    return {
        "loss_fn_output_type": OUTPUT_TYPE,
        "loss_fn_outputs": [
            {
                "logprobs": {
                    "data": logprobs.ravel().tolist(),
                    "dtype": "float32",
                    "shape": list(logprobs.shape),
                }
            }
            for logprobs in result.logprobs
        ],
        "metrics": sdk_metrics(result.metrics),
    }


def sample_response_json(result: SampleResult) -> Body:
    """``{"sequences", "prompt_logprobs"?, "topk_prompt_logprobs"?, "prompt_cache_hit_tokens"?,
    "type": "sample"}``.

    The likeliest tokens of samples, the scores of target tokens and the alternatives of a prompt
    are newer than these clients, which cannot request them, so they are left out.
    """
    answer: Body = {
        "sequences": [_sequence(sequence) for sequence in result.sequences],
        "type": "sample",
    }
    if (logprobs := one_prompt(result)) is not None:
        answer["prompt_logprobs"] = [
            None if value != value else value  # NaN
            for value in logprobs.tolist()
        ]
    if result.cached_prompt_tokens:
        answer["prompt_cache_hit_tokens"] = result.cached_prompt_tokens
    if result.top_prompt_logprobs is not None:
        answer["topk_prompt_logprobs"] = _topk_rows(result.top_prompt_logprobs)
    return answer


def _sequence(sequence: SequenceResult) -> Body:
    return {
        "stop_reason": sequence.stop_reason,
        "tokens": sequence.tokens.tolist(),
        "logprobs": sequence.logprobs.tolist(),
    }


def _topk_rows(top: TopLogprobs) -> list[list[list[float]] | None]:
    """For each position its [token id, logprob] pairs; None if it has none."""
    rows = zip(top.token_ids.tolist(), top.logprobs.tolist(), strict=True)
    return [_pairs(token_ids, logprobs) for token_ids, logprobs in rows]


def _pairs(token_ids: list[int], logprobs: list[float]) -> list[list[float]] | None:
    pairs = [list(pair) for pair in zip(token_ids, logprobs, strict=True)]
    while pairs and pairs[-1] == [0, NO_DATA_LOGPROB]:
        pairs.pop()
    return pairs or None


_RENDERERS: Mapping[type[Result], Callable[[Any], Body]] = {
    CreateRunResult: _create_run,
    RemoveRunResult: _remove_run,
    ForwardBackwardResult: forward_backward_output_json,
    OptimStepResult: _optim_step,
    SampleResult: sample_response_json,
    SaveWeightsResult: _save_weights,
    LoadWeightsResult: _load_weights,
    CompareRunsResult: _compare_runs,
    CreateCustomLossResult: _create_custom_loss,
}
