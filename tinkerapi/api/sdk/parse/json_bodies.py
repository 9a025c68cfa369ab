"""The SDK's JSON: fields of ``asample``, and the ``forward_backward`` of clients before 0.25.

SDK 0.5 leaves out defaults and ``type`` fields and writes nulls; newer ones write defaults. So
null always means absent, and a chunk without a type is recognized by its keys. An unknown field
with a value is refused by name, because ignoring it could change the result.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tinkerapi.api.fields.chunks import datum_of, join_chunks, num_tokens_of
from tinkerapi.api.fields.field import check_object
from tinkerapi.api.fields.images import AUDIO, POINTERS, check_base64_image
from tinkerapi.api.fields.loss_inputs import NO_INPUTS, check_input, check_token_ids
from tinkerapi.api.fields.refusals import FLOAT32, refuse, refuse_unknown, shown
from tinkerapi.api.fields.sampling import TINKER_SAMPLING_FIELDS
from tinkerapi.api.sdk.parse.calls import (
    ForwardBackwardCall,
    check_config,
    check_ids,
    check_loss_fn,
    check_num_datums,
    reads_provenance,
)
from tinkerapi.api.sdk.parse.provenance import FIELDS as SPANS
from tinkerapi.api.sdk.parse.provenance import provenance_of_json
from tinkerapi.api.sdk.parse.tensors import Array, DenseBudget, TensorParts, build_array
from training.errors import InvalidDatum, InvalidRequest
from training.images import Chunks, Image
from training.types import Datum, ImageDatum, SamplingParams, TokenIds

_NUMPY: Mapping[str, np.dtype[Any]] = {
    "int64": np.dtype(np.int64),
    "float32": np.dtype(np.float32),
}


def parse_json_forward_backward(body: Any, *, forward_only: bool = False) -> ForwardBackwardCall:
    """The call in a JSON body of ``/forward_backward``, or of ``/forward`` if ``forward_only``.

    Raises:
        InvalidRequest: The body or one of its fields is invalid. (400)
        InvalidDatum: A datum is invalid. (400)
        LimitExceeded: More than this server takes in one request. (400)
    """
    name = "forward_input" if forward_only else "forward_backward_input"
    fields = _fields(body, ("model_id", "seq_id", name, "type"), "body")
    model_id, seq_id = check_ids(fields.get("model_id"), fields.get("seq_id"))
    given = _fields(fields.get(name), ("data", "loss_fn", "loss_fn_config"), name)
    loss_fn = check_loss_fn(given.get("loss_fn"))
    config = given.get("loss_fn_config") or {}
    if not isinstance(config, dict):
        raise refuse("loss_fn_config", "an object", config)
    numbers, loss_id = check_config(config, loss_fn)
    data = given.get("data")
    if not isinstance(data, list):
        raise _wrong("data", "a list of datums", data)
    check_num_datums(len(data))
    budget = DenseBudget()
    return ForwardBackwardCall(
        model_id=model_id,
        seq_id=seq_id,
        data=[parse_json_datum(datum, f"data[{i}]", budget) for i, datum in enumerate(data)],
        loss_fn=loss_fn,
        loss_fn_config=numbers,
        loss_id=loss_id,
        forward_only=forward_only,
        provenance=[provenance_of_json(datum, f"data[{i}]") for i, datum in enumerate(data)]
        if reads_provenance(loss_fn)
        else [],
    )


def parse_json_datum(
    value: Any, where: str, budget: DenseBudget | None = None
) -> Datum | ImageDatum:
    """``{"model_input": {"chunks": [...]}, "loss_fn_inputs": {name: TensorData}}``.

    Args:
        budget: Shared by the datums of one request; without one, the datum has its own.

    Raises:
        InvalidDatum: It is invalid. (400)
        LimitExceeded: It is larger than this server takes. (400)
    """
    fields = _fields(value, ("model_input", "loss_fn_inputs", *SPANS), where)
    model_input = parse_model_input(fields.get("model_input"), f"{where}.model_input")
    inputs = fields.get("loss_fn_inputs")
    if not isinstance(inputs, dict):
        raise _wrong(f"{where}.loss_fn_inputs", "an object of tensors by name", inputs)
    if not inputs:
        raise InvalidDatum(f"{where}.loss_fn_inputs: {NO_INPUTS}")
    budget = budget or DenseBudget()
    arrays = {}
    for name, item in inputs.items():
        place = f"{where}.loss_fn_inputs.{name[:60]}"
        array = parse_tensor_data(item, place, budget=budget)
        arrays[name] = check_input(name, array, place, num_tokens=num_tokens_of(model_input))
    return datum_of(model_input, arrays)


def parse_model_input(value: Any, where: str) -> TokenIds | Chunks:
    """(N,) the token ids of ``{"chunks": [...]}``, N at least 1; the chunks, if one is an image.

    Raises:
        InvalidDatum: Audio, a pointer to an image, no tokens, or not of this form. (400)
        LimitExceeded: More tokens than this server takes. (400)
    """
    chunks = _fields(value, ("chunks",), where).get("chunks")
    if not isinstance(chunks, list):
        raise _wrong(f"{where}.chunks", "a list of chunks", chunks)
    parsed = [_parse_chunk(chunk, f"{where}.chunks[{i}]") for i, chunk in enumerate(chunks)]
    return join_chunks(parsed, where)


def parse_tensor_data(
    value: Any, where: str, *, pad: int = 0, budget: DenseBudget | None = None
) -> Array:
    """(N,) or (N, K) int64 or float32 from ``{"data", "dtype", "shape"?, "sparse_..."?}``.

    Args:
        pad: The value of a CSR array's unlisted cells: 0 for ``target_tokens`` and ``weights``, -1
            for
            ``target_prompt_logprobs``.

    Raises:
        InvalidDatum: It is not an array. (400)
        LimitExceeded: It would take too much memory. (400)
    """
    fields = _fields(
        value, ("data", "dtype", "shape", "sparse_crow_indices", "sparse_col_indices"), where
    )
    dtype = fields.get("dtype")
    if not isinstance(dtype, str) or dtype not in _NUMPY:
        raise _wrong(f"{where}.dtype", "'float32' or 'int64'", dtype)
    values = _numbers(fields.get("data"), _NUMPY[dtype], f"{where}.data")
    shape = fields.get("shape")
    if shape is not None and not (
        isinstance(shape, list) and all(type(size) is int for size in shape)
    ):
        raise _wrong(f"{where}.shape", "a list of sizes", shape)
    crow, col = (
        None
        if (indices := fields.get(name)) is None
        else _numbers(indices, _NUMPY["int64"], f"{where}.{name}")
        for name in ("sparse_crow_indices", "sparse_col_indices")
    )
    parts = TensorParts(
        values=values,
        shape=None if shape is None else tuple(shape[:3]),
        crow_indices=crow,
        col_indices=col,
    )
    return build_array(parts, where, pad=pad, budget=budget or DenseBudget())


def parse_sampling_params(value: Any, where: str) -> SamplingParams:
    """``{"max_tokens"?, "seed"?, "stop"?, "temperature", "top_k", "top_p"}``.

    ``stop`` absent or null stops at the model's end tokens; ``[]`` at nothing but max_tokens.

    Raises:
        InvalidRequest: A value is out of its range, or a field is unknown. (400)
    """
    if value is None:
        return SamplingParams()
    if isinstance(value, dict):
        value = {name: item for name, item in value.items() if item is not None}
    return SamplingParams(**check_object(TINKER_SAMPLING_FIELDS, value, where))


def _parse_chunk(value: Any, where: str) -> NDArray[np.int32] | Image:
    if not isinstance(value, dict):
        raise _wrong(where, 'a chunk such as {"tokens": [1, 2]}', value)
    kind = value.get("type")
    if kind is None:
        names = {"tokens": "encoded_text", "location": "image_asset_pointer", "dmel": "dmel"}
        kind = next((kind for name, kind in names.items() if value.get(name) is not None), None)
        if kind is None:
            kind = "image" if value.get("data") is not None else "encoded_text"
    if kind == "image":
        fields = _fields(value, ("type", "data", "format", "expected_tokens"), where)
        return check_base64_image(
            fields.get("data"), fields.get("format"), fields.get("expected_tokens"), where
        )
    if kind == "image_asset_pointer":
        raise InvalidDatum(f"{where}: {POINTERS}")
    if kind == "dmel":
        raise InvalidDatum(f"{where}: {AUDIO}")
    if kind != "encoded_text":
        raise InvalidDatum(f"{where}: {shown(kind)} is not supported; only encoded_text and image")
    fields = _fields(value, ("type", "tokens"), where)
    tokens = _numbers(fields.get("tokens"), _NUMPY["int64"], f"{where}.tokens")
    check_token_ids(tokens, f"{where}.tokens")
    return tokens.astype(np.int32)


def _numbers(value: Any, dtype: np.dtype[Any], where: str) -> Array:
    """(n,) of plain JSON numbers: integers for int64; booleans are refused."""
    if not isinstance(value, list):
        raise _wrong(where, "a list of numbers", value)
    allowed = {int} if dtype.kind == "i" else {int, float}
    expected = "a whole number" if dtype.kind == "i" else "a number"
    if not set(map(type, value)) <= allowed:
        index = next(i for i, item in enumerate(value) if type(item) not in allowed)
        raise _wrong(f"{where}[{index}]", expected, value[index])
    try:
        with np.errstate(over="ignore"):
            array = np.array(value, dtype)
    except OverflowError:
        raise InvalidDatum(f"{where}: a number is too large for {dtype}") from None
    if not np.isfinite(array).all():
        index = int(np.isfinite(array).argmin())
        raise _wrong(f"{where}[{index}]", FLOAT32, value[index])
    return array


def _fields(value: Any, allowed: tuple[str, ...], where: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise _wrong(where, "an object", value)
    given = (name for name, item in value.items() if item is not None)
    refuse_unknown(given, allowed, where, error=InvalidDatum)
    return value


def _wrong(where: str, expected: str, value: object) -> InvalidRequest:
    return InvalidDatum(str(refuse(where, expected, value)))
