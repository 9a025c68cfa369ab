"""Results as the protobuf bodies of the SDK's ``retrieve_future``.

They take the dictionaries that futures store (``training.worker.outcomes``); the JSON for older
clients is in ``json_responses``. A result that has no such form is the server's own fault and
raises ValueError.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tinkerapi.api.sdk import tinker_public_pb2 as pb
from training.errors import InvalidRequest

OUTPUT_TYPE = "ArrayRecord"
"""The SDK shows it as ``loss_fn_output_type`` and does not use it."""

_STOP_REASONS = {"stop": pb.STOP_REASON_STOP, "length": pb.STOP_REASON_LENGTH}

Array = NDArray[Any]
Fields = Mapping[str, Array]


def encode_forward_backward_output(result: Mapping[str, Any]) -> bytes:
    """A serialized ``ForwardBackwardOutput``.

    Args:
        result: ``loss_fn_outputs``, a list with one dictionary of arrays for each datum in request
            order, all with the same names; leading sizes may differ. And ``metrics``.
    """
    outputs = [
        {name: wire_array(value) for name, value in output.items()}
        for output in result["loss_fn_outputs"]
    ]
    if any(output.keys() != outputs[0].keys() for output in outputs):
        raise ValueError("loss_fn_outputs: the datums have different fields")
    message = pb.ForwardBackwardOutput(loss_fn_output_type=OUTPUT_TYPE)
    for _, group in groupby(outputs, _layout):
        _add_record(message.loss_fn_outputs.add(), list(group))
    message.metrics.update(sdk_metrics(result["metrics"]))
    body: bytes = message.SerializeToString(deterministic=True)
    return body


def encode_sample_response(result: Mapping[str, Any]) -> bytes:
    """A serialized ``SampleResponse``.

    Args:
        result: ``sequences``, each with ``stop_reason``, ``tokens`` (L,) and ``logprobs`` (L,),
            and ``prompt_logprobs`` (P,) of the one prompt, NaN where not scored, or None.
            If requested, also: in a sequence ``topk_logprobs``, a dictionary of
            ``token_ids`` (L, k) and ``logprobs`` (L, k), where a cell without data has token 0
            and -99999; in the result ``topk_prompt_logprobs``, the same with (P, k),
            ``target_prompt_logprobs`` (P - 1, K), 0 where the request had -1, or for a CSR request
            a dictionary of ``values``, ``crow_indices``, ``col_indices`` and ``shape``,
            ``prompt_alt_tokens``, a dictionary of ``tokens`` and ``logprobs``, both (P - 1, k),
            and ``prompt_cache_hit_tokens``. None counts as absent.
    """
    message = pb.SampleResponse(prompt_cache_hit_tokens=result.get("prompt_cache_hit_tokens") or 0)
    for sequence in result["sequences"]:
        part = message.sequences.add()
        part.stop_reason = _STOP_REASONS[sequence["stop_reason"]]
        part.tokens = _bytes(sequence["tokens"], "<i4")
        if sequence.get("logprobs") is not None:
            part.logprobs = _bytes(sequence["logprobs"], "<f4")
        if sequence.get("topk_logprobs") is not None:
            part.topk_sampled_logprobs.CopyFrom(_topk(sequence["topk_logprobs"]))
    if result.get("prompt_logprobs") is not None:
        message.prompt_logprobs = _bytes(one_prompt(result["prompt_logprobs"]), "<f4")
    if result.get("topk_prompt_logprobs") is not None:
        message.topk_prompt_logprobs.CopyFrom(_topk(result["topk_prompt_logprobs"]))
    if result.get("target_prompt_logprobs") is not None:
        message.target_prompt_logprobs.CopyFrom(_tensor(result["target_prompt_logprobs"], "<f4"))
    if result.get("prompt_alt_tokens") is not None:
        alternatives = result["prompt_alt_tokens"]
        message.prompt_alt_tokens.tokens.CopyFrom(_tensor(alternatives["tokens"], "<i8"))
        message.prompt_alt_tokens.logprobs.CopyFrom(_tensor(alternatives["logprobs"], "<f4"))
    body: bytes = message.SerializeToString(deterministic=True)
    return body


def sdk_metrics(metrics: Mapping[str, float]) -> dict[str, float]:
    """The metrics named ``name:reduction``: any other name makes the SDK fail the whole result."""
    return {name: float(value) for name, value in metrics.items() if name.count(":") == 1}


def one_prompt(prompt_logprobs: Any) -> Array:
    """(P,) float32.

    Raises:
        InvalidRequest: They belong to several prompts, which only the quick reference can sample;
            the
            SDK's result has room for one. (400)
    """
    if isinstance(prompt_logprobs, list) and any(np.ndim(item) for item in prompt_logprobs):
        raise InvalidRequest(
            "request_id: this sample has log-probabilities of several prompts, for which the SDK's "
            "result has no room; POST /retrieve_future answers with them"
        )
    return np.asarray(prompt_logprobs, "<f4")


def wire_array(value: Any) -> Array:
    """The array as float32 or int64, the SDK's two dtypes; a single number becomes (1,)."""
    array = np.atleast_1d(np.asarray(value))
    if array.dtype.kind not in "fiub":
        raise ValueError(f"an array of {array.dtype} cannot be sent")
    return array.astype("<f4" if array.dtype.kind == "f" else "<i8", copy=False)


def _layout(output: Fields) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The layout that all datums of one record share."""
    return {name: (array.dtype.str, array.shape[1:]) for name, array in output.items()}


def _add_record(record: pb.ArrayRecord, outputs: Sequence[Fields]) -> None:
    record.type_tag = OUTPUT_TYPE
    record.num_datums = len(outputs)
    for name, first in outputs[0].items():
        arrays = [output[name] for output in outputs]
        field = record.fields[name]
        field.data = b"".join([array.tobytes() for array in arrays])
        field.offsets = np.cumsum([0, *(array.nbytes for array in arrays)], dtype="<i8").tobytes()
        field.dtype = _dtype(first)
        field.trailing_shape.extend(first.shape[1:])


def _tensor(value: Any, dtype: str) -> pb.Tensor:
    if isinstance(value, Mapping):
        values = np.asarray(value["values"], dtype)
        csr = pb.SparseCsr(
            values=values.tobytes(),
            crow_indices=_bytes(value["crow_indices"], "<i8"),
            col_indices=_bytes(value["col_indices"], "<i8"),
        )
        return pb.Tensor(sparse_csr=csr, dtype=_dtype(values), shape=value["shape"])
    array = np.asarray(value, dtype)
    return pb.Tensor(dense=array.tobytes(), dtype=_dtype(array), shape=array.shape)


def _topk(value: Mapping[str, Any]) -> pb.TopkLogprobs:
    token_ids = np.asarray(value["token_ids"], "<i4")
    logprobs = np.asarray(value["logprobs"], "<f4")
    if token_ids.ndim != 2 or token_ids.shape != logprobs.shape:
        raise ValueError(f"top-k: token ids {token_ids.shape}, logprobs {logprobs.shape}")
    length, k = token_ids.shape
    return pb.TopkLogprobs(
        token_ids=token_ids.tobytes(), logprobs=logprobs.tobytes(), k=k, length=length
    )


def _dtype(array: Array) -> pb.DType:
    return pb.DTYPE_FLOAT32 if array.dtype.kind == "f" else pb.DTYPE_INT64


def _bytes(value: Any, dtype: str) -> bytes:
    return np.asarray(value, dtype).tobytes()
