"""``POST /forward_backward`` as the SDK sends it: protobuf to a ``ForwardBackwardCall``.

Every refusal names the place: ``data[3].loss_fn_inputs.weights: 12 values for shape [11]``. The
arrays are read-only views of the message's bytes. Text only: image and audio chunks are refused.
Provenance spans are read by the loss stable_reinforce alone, which this server does not have, so
they are accepted and have no effect on any result.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from django.conf import settings
from google.protobuf.message import DecodeError
from numpy.typing import NDArray

from tinkerapi.api.fields import Integer, Text, refuse
from tinkerapi.api.sdk import tinker_public_pb2 as pb
from tinkerapi.api.sdk.field_count import check_field_count
from tinkerapi.api.sdk.tensors import (
    Array,
    DenseBudget,
    TensorParts,
    build_array,
    check_input,
    check_token_ids,
)
from training.errors import InvalidDatum, InvalidRequest, LimitExceeded
from training.types import Datum

_MODEL_ID = Text(description="The run.")
_SEQ_ID = Integer(description="Its place in the run.", minimum=1, maximum=2**31 - 1)
_LOSS_FN = Text(description="The loss function's name.")
_LOSS_ID = Text(description="An uploaded loss.")

_BFLOAT16 = np.dtype("<u2")  # numpy has no bfloat16: its bits are a float32's upper half
_DTYPES: dict[int, np.dtype[Any]] = {
    pb.DTYPE_FLOAT32: np.dtype("<f4"),
    pb.DTYPE_INT64: np.dtype("<i8"),
    pb.DTYPE_INT32: np.dtype("<i4"),
    pb.DTYPE_BFLOAT16: _BFLOAT16,
}
_INT64 = _DTYPES[pb.DTYPE_INT64]


@dataclass(frozen=True, kw_only=True, eq=False)
class ForwardBackwardCall:
    """What one ``forward_backward`` or ``forward`` asks for."""

    model_id: str
    seq_id: int
    """Its place in the run's order, from 1."""
    data: list[Datum]
    loss_fn: str
    """As sent; the engine knows which names it has."""
    loss_fn_config: dict[str, float]
    loss_id: str | None
    """The uploaded loss that ``loss_fn="custom"`` means; None for the others."""
    forward_only: bool
    """True computes loss and outputs and leaves the gradients untouched."""


def parse_ids(body: bytes) -> tuple[str, int]:
    """Model id and seq id of a request whose rest may be wrong.

    A refused request consumes its seq id, so whoever refuses it must know which one it was.

    Raises:
        InvalidRequest: Not even these two can be read. (400)
    """
    try:
        message = pb.ForwardBackwardIds.FromString(body)
    except DecodeError:
        raise InvalidRequest("body: not a ForwardBackwardRequest") from None
    return (
        _MODEL_ID.check(message.model_id, "model_id"),
        _SEQ_ID.check(message.seq_id, "seq_id"),
    )


def parse_forward_backward(body: bytes) -> ForwardBackwardCall:
    """The call that a (decompressed) protobuf body holds.

    Raises:
        InvalidRequest: The body or one of its fields is not what the message has. (400)
        InvalidDatum: A datum cannot be trained on. (400)
        LimitExceeded: More than this server takes in one request. (400)
    """
    check_field_count(body)
    try:
        message = pb.ForwardBackwardRequest.FromString(body)
    except DecodeError:
        raise InvalidRequest("body: not a ForwardBackwardRequest") from None
    model_id = _MODEL_ID.check(message.model_id, "model_id")
    seq_id = _SEQ_ID.check(message.seq_id, "seq_id")
    loss_fn = _LOSS_FN.check(message.loss_fn, "loss_fn")
    config, loss_id = _parse_config(message, loss_fn)
    if not message.data:
        raise InvalidDatum("data: is empty; send at least one datum")
    if len(message.data) > settings.MAX_DATUMS:
        raise LimitExceeded(
            f"data: {len(message.data)} datums; this server takes {settings.MAX_DATUMS} in one "
            "request"
        )
    budget = DenseBudget()
    return ForwardBackwardCall(
        model_id=model_id,
        seq_id=seq_id,
        data=[_parse_datum(datum, f"data[{i}]", budget) for i, datum in enumerate(message.data)],
        loss_fn=loss_fn,
        loss_fn_config=config,
        loss_id=loss_id,
        forward_only=message.forward_only,
    )


def _parse_config(
    message: pb.ForwardBackwardRequest, loss_fn: str
) -> tuple[dict[str, float], str | None]:
    """Numbers by name, and the loss id; v2 when it holds anything, else the older map."""
    config: dict[str, float] = {}
    loss_id = None
    if message.loss_fn_config_v2:
        for name, value in message.loss_fn_config_v2.items():
            kind = value.WhichOneof("value")
            if kind == "number":
                config[name] = value.number
            elif kind == "text" and loss_fn == "custom" and name == "loss_id":
                loss_id = _LOSS_ID.check(value.text, "loss_fn_config.loss_id")
            else:
                given = value.text if kind == "text" else None
                raise refuse(f"loss_fn_config.{name[:60]}", "a number", given)
    else:
        config.update(message.loss_fn_config)
    for name, number in config.items():
        if not math.isfinite(number):
            raise InvalidRequest(f"loss_fn_config.{name[:60]}: {number} is not finite")
    return config, loss_id


def _parse_datum(message: pb.Datum, where: str, budget: DenseBudget) -> Datum:
    tokens = _parse_chunks(message.model_input, f"{where}.model_input")
    inputs = {}
    for name, tensor in message.loss_fn_inputs.items():
        place = f"{where}.loss_fn_inputs.{name[:60]}"
        array = build_array(_parse_tensor(tensor, place), place, pad=0, budget=budget)
        inputs[name] = check_input(name, array, place, num_tokens=len(tokens))
    if not inputs:
        raise InvalidDatum(f"{where}.loss_fn_inputs: is empty")
    return Datum(model_input=tokens, loss_fn_inputs=inputs)


def _parse_chunks(chunks: Sequence[pb.Chunk], where: str) -> NDArray[np.int32]:
    """(N,) the tokens of all chunks, N at least 1."""
    arrays: list[NDArray[np.int32]] = []
    for i, chunk in enumerate(chunks):
        kind = chunk.WhichOneof("chunk")
        if kind == "encoded_text":
            place = f"{where}[{i}].tokens"
            arrays.append(
                _array(chunk.encoded_text.tokens, _DTYPES[pb.DTYPE_INT32], place, "int32")
            )
        elif kind is None:
            raise InvalidDatum(f"{where}[{i}]: holds no tokens")
        else:
            raise InvalidDatum(f"{where}[{i}].{kind}: is not supported; only encoded_text")
    tokens = arrays[0] if len(arrays) == 1 else np.concatenate([np.empty(0, np.int32), *arrays])
    check_num_tokens(len(tokens), where)
    check_token_ids(tokens, where)
    return tokens


def check_num_tokens(num_tokens: int, where: str) -> None:
    """Refuse a sequence without tokens, or with more than one sequence may have."""
    if num_tokens == 0:
        raise InvalidDatum(f"{where}: is empty")
    if num_tokens > settings.MAX_DATUM_TOKENS:
        raise LimitExceeded(
            f"{where}: {num_tokens} tokens; this server takes {settings.MAX_DATUM_TOKENS} in one "
            "sequence"
        )


def _parse_tensor(message: pb.Tensor, where: str) -> TensorParts:
    dtype = _DTYPES.get(message.dtype)
    if dtype is None:
        raise InvalidDatum(f"{where}.dtype: {message.dtype} is no dtype")
    name = pb.DType.Name(message.dtype).removeprefix("DTYPE_").lower()
    shape = tuple(message.shape[:3]) or None  # a third size is enough to refuse it
    if message.WhichOneof("encoding") != "sparse_csr":
        return TensorParts(values=_array(message.dense, dtype, where, name), shape=shape)
    csr = message.sparse_csr
    return TensorParts(
        values=_array(csr.values, dtype, f"{where}.values", name),
        shape=shape,
        crow_indices=_array(csr.crow_indices, _INT64, f"{where}.crow_indices", "int64"),
        col_indices=_array(csr.col_indices, _INT64, f"{where}.col_indices", "int64"),
    )


def _array(data: bytes, dtype: np.dtype[Any], where: str, name: str) -> Array:
    """(n,) a read-only view of ``data``; a copy for bfloat16 only."""
    if len(data) % dtype.itemsize:
        raise InvalidDatum(f"{where}: {len(data)} bytes are no whole number of {name} values")
    array = np.frombuffer(data, dtype)
    if dtype is _BFLOAT16:
        return (array.astype("<u4") << 16).view("<f4")
    return array
