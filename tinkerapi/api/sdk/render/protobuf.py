"""Results as the protobuf bodies of the SDK's ``retrieve_future``.

The JSON for older clients is in ``json_results``.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import groupby
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tinkerapi.api.sdk import tinker_public_pb2 as pb
from training.errors import InvalidRequest
from training.kinds import ForwardBackwardResult, SampleResult
from training.kinds.sample_result import SparseLogprobs
from training.types import TopLogprobs

OUTPUT_TYPE = "ArrayRecord"
"""The SDK shows it as ``loss_fn_output_type`` and does not use it."""

_STOP_REASONS = {"stop": pb.STOP_REASON_STOP, "length": pb.STOP_REASON_LENGTH}

Array = NDArray[Any]


def encode_forward_backward_output(result: ForwardBackwardResult) -> bytes:
    """A serialized ``ForwardBackwardOutput``: one record for consecutive datums of one layout."""
    message = pb.ForwardBackwardOutput(loss_fn_output_type=OUTPUT_TYPE)
    for trailing_shape, group in groupby(result.logprobs, lambda array: array.shape[1:]):
        _add_record(message.loss_fn_outputs.add(), list(group), trailing_shape)
    message.metrics.update(sdk_metrics(result.metrics))
    body: bytes = message.SerializeToString(deterministic=True)
    return body


def encode_sample_response(result: SampleResult) -> bytes:
    """A serialized ``SampleResponse``.

    Raises:
        InvalidRequest: See ``one_prompt``. (400)
    """
    message = pb.SampleResponse(prompt_cache_hit_tokens=result.cached_prompt_tokens)
    for sequence in result.sequences:
        part = message.sequences.add()
        part.stop_reason = _STOP_REASONS[sequence.stop_reason]
        part.tokens = _bytes(sequence.tokens, "<i4")
        part.logprobs = _bytes(sequence.logprobs, "<f4")
        if sequence.top is not None:
            part.topk_sampled_logprobs.CopyFrom(_topk(sequence.top))
    if (prompt_logprobs := one_prompt(result)) is not None:
        message.prompt_logprobs = _bytes(prompt_logprobs, "<f4")
    if result.top_prompt_logprobs is not None:
        message.topk_prompt_logprobs.CopyFrom(_topk(result.top_prompt_logprobs))
    if result.target_prompt_logprobs is not None:
        message.target_prompt_logprobs.CopyFrom(_target_logprobs(result.target_prompt_logprobs))
    if result.prompt_alternatives is not None:
        tokens, logprobs = result.prompt_alternatives
        message.prompt_alt_tokens.tokens.CopyFrom(_tensor(tokens, "<i8"))
        message.prompt_alt_tokens.logprobs.CopyFrom(_tensor(logprobs, "<f4"))
    body: bytes = message.SerializeToString(deterministic=True)
    return body


def sdk_metrics(metrics: Mapping[str, float]) -> dict[str, float]:
    """The metrics named ``name:reduction``: any other name makes the SDK fail the whole result."""
    return {name: float(value) for name, value in metrics.items() if name.count(":") == 1}


def one_prompt(result: SampleResult) -> Array | None:
    """(P,) float32 of the one prompt; None if not requested.

    Raises:
        InvalidRequest: They belong to several prompts, which only the quick reference can sample;
            the SDK's result has room for one. (400)
    """
    scored = [logprobs for logprobs in result.prompt_logprobs if logprobs is not None]
    if len(scored) > 1:
        raise InvalidRequest(
            "request_id: this sample has log-probabilities of several prompts, for which the SDK's "
            "result has no room; POST /retrieve_future answers with them"
        )
    return scored[0] if scored else None


def _add_record(
    record: pb.ArrayRecord, logprobs: list[Array], trailing_shape: tuple[int, ...]
) -> None:
    record.type_tag = OUTPUT_TYPE
    record.num_datums = len(logprobs)
    field = record.fields["logprobs"]
    field.data = b"".join([_bytes(array, "<f4") for array in logprobs])
    num_bytes = [4 * array.size for array in logprobs]
    field.offsets = np.cumsum([0, *num_bytes], dtype="<i8").tobytes()
    field.dtype = pb.DTYPE_FLOAT32
    field.trailing_shape.extend(trailing_shape)


def _target_logprobs(target: Array | SparseLogprobs) -> pb.Tensor:
    if not isinstance(target, SparseLogprobs):
        return _tensor(target, "<f4")
    csr = pb.SparseCsr(
        values=_bytes(target.values, "<f4"),
        crow_indices=_bytes(target.crow_indices, "<i8"),
        col_indices=_bytes(target.col_indices, "<i8"),
    )
    return pb.Tensor(sparse_csr=csr, dtype=pb.DTYPE_FLOAT32, shape=target.shape)


def _tensor(value: Array, dtype: str) -> pb.Tensor:
    kind = pb.DTYPE_FLOAT32 if dtype == "<f4" else pb.DTYPE_INT64
    return pb.Tensor(dense=_bytes(value, dtype), dtype=kind, shape=value.shape)


def _topk(top: TopLogprobs) -> pb.TopkLogprobs:
    length, k = top.token_ids.shape
    return pb.TopkLogprobs(
        token_ids=_bytes(top.token_ids, "<i4"),
        logprobs=_bytes(top.logprobs, "<f4"),
        k=k,
        length=length,
    )


def _bytes(value: Array, dtype: str) -> bytes:
    return value.astype(dtype, copy=False).tobytes()
