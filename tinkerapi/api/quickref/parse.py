"""Bulk data: conversations, token-level datums and prompts, checked without serializers.

numpy converts token arrays from lists in C; Python looks at single items only to find the wrong
one. Every error names the place: ``data[0][1].role: expected one of ...``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tinkerapi.api.fields.chunks import datum_of, join_chunks
from tinkerapi.api.fields.content import check_parts
from tinkerapi.api.fields.images import POINTERS, check_base64_image
from tinkerapi.api.fields.loss_inputs import NO_INPUTS
from tinkerapi.api.fields.prompts import check_num_prompts, check_plain_prompt, check_text_length
from tinkerapi.api.fields.refusals import FLOAT32, refuse_unknown, shown
from tinkerapi.api.fields.tokens import (
    check_token_list,
    refuse_datum,
    refuse_first,
    token_array,
)
from training.errors import InvalidDatum
from training.images import Chunks, Image
from training.loss_fns import TARGET_TOKENS
from training.types import (
    MAX_FLOAT32,
    Conversation,
    Datum,
    ImageDatum,
    Message,
    Prompt,
    TokenIds,
    wrong_length,
)

ROLES = ("system", "user", "assistant")

DATUM_FIELDS = ("model_input", "loss_fn_inputs")
MESSAGE_FIELDS = ("role", "content")
ARRAY_FIELDS = ("data", "dtype", "shape")
TOKENS_FIELDS = ("type", "tokens")
IMAGE_FIELDS = ("type", "data", "format", "expected_tokens")

Array = NDArray[Any]


def check_prompt(value: Any, where: str) -> Prompt:
    """Text, token ids (a list, or ``{"chunks": [...]}``, which may have images), or a
    conversation."""
    if isinstance(value, str):
        return check_plain_prompt(value, where)
    if isinstance(value, dict) and "messages" in value:
        return check_conversation(value, where)
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return check_conversation(value, where)
    if isinstance(value, list | dict):
        return check_model_input(value, where)
    raise refuse_datum(where, "text, a list of token ids, or a list of messages", value)


def check_prompts(value: Any, where: str) -> list[Prompt]:
    """At least one prompt, each of any form."""
    if not isinstance(value, list):
        raise refuse_datum(where, "a list of at least one prompt", value)
    if not value:
        raise InvalidDatum(f"{where}: is empty; send at least one prompt")
    check_num_prompts(len(value), where)
    return [check_prompt(item, f"{where}[{index}]") for index, item in enumerate(value)]


def check_conversation(value: Any, where: str) -> Conversation:
    """A list of messages, or ``{"messages": [...]}``."""
    if isinstance(value, dict):
        refuse_unknown(value.keys(), ("messages",), where, error=InvalidDatum)
        where, value = f"{where}.messages", value.get("messages")
    if not isinstance(value, list):
        raise refuse_datum(where, "a list of messages", value)
    if not value:
        raise InvalidDatum(f"{where}: has no messages")
    messages = tuple(_check_message(item, f"{where}[{index}]") for index, item in enumerate(value))
    check_text_length(messages, where)
    return Conversation(messages)


def check_model_input(value: Any, where: str) -> TokenIds | Chunks:
    """(N,) token ids, N at least 1, from a list or ``{"chunks": [{"tokens": [...]}]}``; the chunks,
    if one is an image."""
    if isinstance(value, dict):
        refuse_unknown(value.keys(), ("chunks",), where, error=InvalidDatum)
        return _check_chunks(value.get("chunks"), f"{where}.chunks")
    return check_token_list(value, where)


def _check_message(value: Any, where: str) -> Message:
    if not isinstance(value, dict):
        raise refuse_datum(where, 'a message such as {"role": "user", "content": "hi"}', value)
    refuse_unknown(value.keys(), MESSAGE_FIELDS, where, error=InvalidDatum)
    for name in MESSAGE_FIELDS:
        if name not in value:
            raise InvalidDatum(f"{where}.{name}: this field is required")
    role, content = value["role"], value["content"]
    if not isinstance(role, str) or role not in ROLES:
        raise refuse_datum(f"{where}.role", f"one of {', '.join(ROLES)}", role)
    if isinstance(content, list):
        return Message(role, check_parts(content, f"{where}.content", role=role))
    if not isinstance(content, str):
        raise refuse_datum(f"{where}.content", "text, or a list of parts", content)
    return Message(role, content)


def check_datum(value: Mapping[str, Any], where: str) -> Datum | ImageDatum:
    """A token-level datum."""
    if "role" in value:
        raise InvalidDatum(
            f"{where}: is a message; data is a list of conversations, each a list of messages"
        )
    refuse_unknown(value.keys(), DATUM_FIELDS, where, error=InvalidDatum)
    for name in DATUM_FIELDS:
        if name not in value:
            raise InvalidDatum(f"{where}.{name}: this field is required")
    model_input = check_model_input(value["model_input"], f"{where}.model_input")
    inputs = value["loss_fn_inputs"]
    if not isinstance(inputs, dict):
        raise refuse_datum(f"{where}.loss_fn_inputs", "an object of arrays by name", inputs)
    if not inputs:
        raise InvalidDatum(f"{where}.loss_fn_inputs: {NO_INPUTS}")
    arrays = {
        name: _check_array(name, item, f"{where}.loss_fn_inputs.{name[:60]}")
        for name, item in inputs.items()
    }
    datum = datum_of(model_input, arrays)
    num_tokens = datum.num_tokens
    for name, array in arrays.items():
        if num_tokens is not None and len(array) != num_tokens:
            raise InvalidDatum(
                f"{where}.loss_fn_inputs.{name[:60]}: {wrong_length(array, num_tokens)}"
            )
    return datum


def _check_array(name: str, value: Any, where: str) -> Array:
    """(N,) or (N, K): int64 for ``target_tokens``, float32 otherwise."""
    shape = None
    if isinstance(value, dict):
        refuse_unknown(value.keys(), ARRAY_FIELDS, where, error=InvalidDatum)
        dtype, shape = value.get("dtype"), value.get("shape")
        expected = "int64" if name == TARGET_TOKENS else "float32"
        if dtype is not None and dtype != expected:
            raise refuse_datum(f"{where}.dtype", repr(expected), dtype)
        value = value.get("data")
        where = f"{where}.data"
    if not isinstance(value, list):
        raise refuse_datum(where, "a list of numbers", value)
    if not value:
        raise InvalidDatum(f"{where}: is empty; send a number for each token")
    rows = value if isinstance(value[0], list) else None
    if rows is not None and shape is not None:
        raise InvalidDatum(f"{where}: nested lists have their own shape; send no shape with them")
    flat = value if rows is None else _flatten(rows, where)
    width = None if rows is None else len(rows[0])
    check = token_array if name == TARGET_TOKENS else _floats
    array = check(flat, where, width)
    if rows is not None:
        return array.reshape(len(rows), -1)
    return array if shape is None else _reshape(array, shape, where)


def _flatten(rows: list[Any], where: str) -> list[Any]:
    width = len(rows[0])
    flat: list[Any] = []
    for index, row in enumerate(rows):
        if not isinstance(row, list) or len(row) != width or not row:
            got = f"a list of {len(row)}" if isinstance(row, list) else shown(row)
            raise InvalidDatum(
                f"{where}[{index}]: expected a list of {max(width, 1)} numbers, as the rows before "
                f"it; got {got}"
            )
        flat += row
    return flat


def _reshape(array: Array, shape: Any, where: str) -> Array:
    fits = (
        isinstance(shape, list)
        and len(shape) in (1, 2)
        and all(type(size) is int and size > 0 for size in shape)
        and int(np.prod([float(size) for size in shape])) == array.size
    )
    if not fits:
        raise InvalidDatum(
            f"{where.removesuffix('.data')}.shape: {_shown_shape(shape)} does not fit "
            f"{array.size} values; expected [N] or [N, K]"
        )
    return array.reshape(shape)


def _shown_shape(shape: Any) -> str:
    if isinstance(shape, list) and len(shape) <= 8 and all(type(size) is int for size in shape):
        return str(shape)
    return shown(shape)


def _floats(values: list[Any], where: str, width: int | None = None) -> NDArray[np.float32]:
    if not set(map(type, values)) <= {int, float}:
        refuse_first(values, lambda item: type(item) in (int, float), "a number", where, width)
    array = np.array(values, np.float64)
    if not (np.abs(array) <= MAX_FLOAT32).all():
        refuse_first(values, lambda item: abs(item) <= MAX_FLOAT32, FLOAT32, where, width)
    return array.astype(np.float32)


def _check_chunks(value: Any, where: str) -> TokenIds | Chunks:
    if not isinstance(value, list):
        raise refuse_datum(where, "a list of chunks", value)
    if not value:
        raise InvalidDatum(f'{where}: is empty; send a chunk such as {{"tokens": [1, 2]}}')
    chunks: list[TokenIds | Image] = []
    for index, chunk in enumerate(value):
        place = f"{where}[{index}]"
        if not isinstance(chunk, dict):
            raise refuse_datum(place, 'a chunk such as {"tokens": [1, 2]}', chunk)
        chunks.append(_check_chunk(chunk, place))
    return join_chunks(chunks, where)


def _check_chunk(chunk: Mapping[str, Any], where: str) -> TokenIds | Image:
    kind = chunk.get("type", "encoded_text")
    if kind == "image":
        refuse_unknown(chunk.keys(), IMAGE_FIELDS, where, error=InvalidDatum)
        return check_base64_image(
            chunk.get("data"), chunk.get("format"), chunk.get("expected_tokens"), where
        )
    if kind == "image_asset_pointer":
        raise InvalidDatum(f"{where}: {POINTERS}")
    if kind != "encoded_text":
        raise InvalidDatum(
            f"{where}.type: {shown(kind)} is not supported; only encoded_text and image"
        )
    refuse_unknown(chunk.keys(), TOKENS_FIELDS, where, error=InvalidDatum)
    return check_token_list(chunk.get("tokens"), f"{where}.tokens")
