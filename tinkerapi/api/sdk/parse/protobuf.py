"""``POST /forward_backward`` as the SDK sends it: protobuf to a ``ForwardBackwardCall``.

Every refusal names the place: ``data[3].loss_fn_inputs.weights: 12 values for shape [11]``. The
arrays are read-only views of the message's bytes. Audio chunks are refused.
Provenance spans are read only for the loss stable_reinforce; for others they have no effect.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from google.protobuf.message import DecodeError

from tinkerapi.api.fields.chunks import datum_of, join_chunks, num_tokens_of
from tinkerapi.api.fields.images import AUDIO, check_image
from tinkerapi.api.fields.loss_inputs import NO_INPUTS, check_input, check_token_ids
from tinkerapi.api.sdk import tinker_public_pb2 as pb
from tinkerapi.api.sdk.parse.broken_bodies import ids_of_broken_protobuf
from tinkerapi.api.sdk.parse.calls import (
    ForwardBackwardCall,
    check_config,
    check_ids,
    check_loss_fn,
    check_num_datums,
    reads_provenance,
)
from tinkerapi.api.sdk.parse.field_count import check_field_count
from tinkerapi.api.sdk.parse.provenance import provenance_of_message
from tinkerapi.api.sdk.parse.tensors import Array, DenseBudget, TensorParts, build_array
from training.errors import InvalidDatum, InvalidRequest
from training.images import Chunks, Image
from training.types import Datum, ImageDatum, TokenIds

_BFLOAT16 = np.dtype("<u2")  # numpy has no bfloat16: its bits are a float32's upper half
_DTYPES: dict[int, np.dtype[Any]] = {
    pb.DTYPE_FLOAT32: np.dtype("<f4"),
    pb.DTYPE_INT64: np.dtype("<i8"),
    pb.DTYPE_INT32: np.dtype("<i4"),
    pb.DTYPE_BFLOAT16: _BFLOAT16,
}
_INT64 = _DTYPES[pb.DTYPE_INT64]


def parse_ids(body: bytes) -> tuple[str, int]:
    """Model id and seq id of a request, even if the rest is wrong.

    A refused request uses its seq id, so the refusal must know the id.

    Raises:
        InvalidRequest: These two cannot be read. (400)
    """
    try:
        message = pb.ForwardBackwardIds.FromString(body)
    except DecodeError:
        fields = ids_of_broken_protobuf(body)
        if len(fields) < 2:
            raise InvalidRequest("body: not a ForwardBackwardRequest") from None
        return check_ids(fields.get("model_id"), fields.get("seq_id"))
    return check_ids(message.model_id, message.seq_id)


def parse_forward_backward(body: bytes) -> ForwardBackwardCall:
    """The call that a (decompressed) protobuf body holds.

    Raises:
        InvalidRequest: The body or one of its fields is invalid. (400)
        InvalidDatum: A datum is invalid. (400)
        LimitExceeded: More than this server takes in one request. (400)
    """
    check_field_count(body)
    try:
        message = pb.ForwardBackwardRequest.FromString(body)
    except DecodeError:
        raise InvalidRequest("body: not a ForwardBackwardRequest") from None
    model_id, seq_id = check_ids(message.model_id, message.seq_id)
    loss_fn = check_loss_fn(message.loss_fn)
    config, loss_id = check_config(_config(message), loss_fn)
    check_num_datums(len(message.data))
    budget = DenseBudget()
    return ForwardBackwardCall(
        model_id=model_id,
        seq_id=seq_id,
        data=[_parse_datum(datum, f"data[{i}]", budget) for i, datum in enumerate(message.data)],
        loss_fn=loss_fn,
        loss_fn_config=config,
        loss_id=loss_id,
        forward_only=message.forward_only,
        provenance=[
            provenance_of_message(datum, f"data[{i}]") for i, datum in enumerate(message.data)
        ]
        if reads_provenance(loss_fn)
        else [],
    )


def _config(message: pb.ForwardBackwardRequest) -> dict[str, float | str | None]:
    """The second map if it is not empty, else the older one; None for no value."""
    if not message.loss_fn_config_v2:
        return dict(message.loss_fn_config)
    return {
        name: getattr(value, kind) if (kind := value.WhichOneof("value")) else None
        for name, value in message.loss_fn_config_v2.items()
    }


def _parse_datum(message: pb.Datum, where: str, budget: DenseBudget) -> Datum | ImageDatum:
    model_input = _parse_chunks(message.model_input, f"{where}.model_input")
    inputs = {}
    for name, tensor in message.loss_fn_inputs.items():
        place = f"{where}.loss_fn_inputs.{name[:60]}"
        array = build_array(_parse_tensor(tensor, place), place, pad=0, budget=budget)
        inputs[name] = check_input(name, array, place, num_tokens=num_tokens_of(model_input))
    if not inputs:
        raise InvalidDatum(f"{where}.loss_fn_inputs: {NO_INPUTS}")
    return datum_of(model_input, inputs)


def _parse_chunks(chunks: Sequence[pb.Chunk], where: str) -> TokenIds | Chunks:
    """(N,) the tokens of all chunks, N at least 1; the chunks, if one is an image."""
    parsed: list[TokenIds | Image] = []
    for i, chunk in enumerate(chunks):
        kind = chunk.WhichOneof("chunk")
        if kind == "encoded_text":
            tokens = _array(
                chunk.encoded_text.tokens,
                _DTYPES[pb.DTYPE_INT32],
                f"{where}.chunks[{i}].tokens",
                "int32",
            )
            check_token_ids(tokens, f"{where}.chunks[{i}].tokens")
            parsed.append(tokens)
        elif kind == "image":
            parsed.append(_parse_image(chunk.image, f"{where}.chunks[{i}]"))
        elif kind is None:
            raise InvalidDatum(f"{where}.chunks[{i}]: holds no tokens")
        else:
            raise InvalidDatum(f"{where}.chunks[{i}]: {AUDIO}")
    return join_chunks(parsed, where)


def _parse_image(message: pb.ImageChunk, where: str) -> Image:
    if message.HasField("override_dimensions"):
        raise InvalidDatum(
            f"{where}.override_dimensions: is not supported; send the image in the size that the "
            "model is to see"
        )
    expected = message.expected_tokens if message.HasField("expected_tokens") else None
    return check_image(message.data, message.format, expected, where)


def _parse_tensor(message: pb.Tensor, where: str) -> TensorParts:
    dtype = _DTYPES.get(message.dtype)
    if dtype is None:
        raise InvalidDatum(f"{where}.dtype: unknown dtype {message.dtype}")
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
        raise InvalidDatum(f"{where}: {len(data)} bytes are not a whole number of {name} values")
    array = np.frombuffer(data, dtype)
    if dtype is _BFLOAT16:
        return (array.astype("<u4") << 16).view("<f4")
    return array
