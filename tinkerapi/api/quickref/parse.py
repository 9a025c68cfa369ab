"""Bulk data: conversations, token-level datums and prompts, checked without serializers.

numpy converts token arrays from lists in C; Python looks at single items only to find the wrong
one. Every error names the place: ``data[0][1].role: expected one of ...``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from django.conf import settings
from numpy.typing import NDArray

from tinkerapi.api.fields.loss_inputs import NO_INPUTS
from tinkerapi.api.fields.prompts import check_num_prompts, check_plain_prompt, check_text_length
from tinkerapi.api.fields.refusals import FLOAT32, shown
from tinkerapi.api.fields.tokens import (
    check_num_tokens,
    check_token_list,
    refuse_datum,
    refuse_first,
    token_array,
)
from training.errors import InvalidDatum, LimitExceeded
from training.loss_fns import TARGET_TOKENS
from training.types import MAX_FLOAT32, Conversation, Datum, Message, Prompt, wrong_length

ROLES = ("system", "user", "assistant")

Array = NDArray[Any]


def check_data(value: Any, where: str) -> list[Conversation | Datum]:
    """Training examples, each a conversation or a token-level datum.

    Raises:
        InvalidDatum: An example is invalid. (400)
        LimitExceeded: Too many datums, or too many tokens in one. (400)
    """
    if not isinstance(value, list):
        raise refuse_datum(where, "a list of conversations or datums", value)
    if not value:
        raise InvalidDatum(f"{where}: is empty; send at least one conversation or datum")
    if len(value) > settings.MAX_DATUMS:
        raise LimitExceeded(
            f"{where}: {len(value)} datums; this server takes {settings.MAX_DATUMS} in one request"
        )
    return [
        _check_datum(item, f"{where}[{index}]")
        if isinstance(item, dict) and "messages" not in item
        else check_conversation(item, f"{where}[{index}]")
        for index, item in enumerate(value)
    ]


def check_prompt(value: Any, where: str) -> Prompt:
    """Text, token ids (a list, or ``{"chunks": [...]}``), or a conversation."""
    if isinstance(value, str):
        return check_plain_prompt(value, where)
    if isinstance(value, dict) and "messages" in value:
        return check_conversation(value, where)
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return check_conversation(value, where)
    if isinstance(value, list | dict):
        return check_tokens(value, where)
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
        _only(value, ("messages",), where)
        where, value = f"{where}.messages", value.get("messages")
    if not isinstance(value, list):
        raise refuse_datum(where, "a list of messages", value)
    if not value:
        raise InvalidDatum(f"{where}: has no messages")
    messages = tuple(_check_message(item, f"{where}[{index}]") for index, item in enumerate(value))
    check_text_length(messages, where)
    return Conversation(messages)


def check_tokens(value: Any, where: str) -> NDArray[np.int32]:
    """(N,) token ids, N at least 1, from a list or ``{"chunks": [{"tokens": [...]}]}``."""
    if isinstance(value, dict):
        _only(value, ("chunks",), where)
        return _check_chunks(value.get("chunks"), f"{where}.chunks")
    return check_token_list(value, where)


def _check_message(value: Any, where: str) -> Message:
    if not isinstance(value, dict):
        raise refuse_datum(where, 'a message such as {"role": "user", "content": "hi"}', value)
    _only(value, ("role", "content"), where)
    for name in ("role", "content"):
        if name not in value:
            raise InvalidDatum(f"{where}.{name}: this field is required")
    role, content = value["role"], value["content"]
    if not isinstance(role, str) or role not in ROLES:
        raise refuse_datum(f"{where}.role", f"one of {', '.join(ROLES)}", role)
    if not isinstance(content, str):
        raise refuse_datum(f"{where}.content", "text", content)
    return Message(role, content)


def _check_datum(value: Mapping[str, Any], where: str) -> Datum:
    if "role" in value:
        raise InvalidDatum(
            f"{where}: is a message; data is a list of conversations, each a list of messages"
        )
    _only(value, ("model_input", "loss_fn_inputs"), where)
    for name in ("model_input", "loss_fn_inputs"):
        if name not in value:
            raise InvalidDatum(f"{where}.{name}: this field is required")
    model_input = check_tokens(value["model_input"], f"{where}.model_input")
    inputs = value["loss_fn_inputs"]
    if not isinstance(inputs, dict):
        raise refuse_datum(f"{where}.loss_fn_inputs", "an object of arrays by name", inputs)
    if not inputs:
        raise InvalidDatum(f"{where}.loss_fn_inputs: {NO_INPUTS}")
    arrays = {
        name: _check_array(name, item, f"{where}.loss_fn_inputs.{name[:60]}")
        for name, item in inputs.items()
    }
    for name, array in arrays.items():
        if len(array) != len(model_input):
            raise InvalidDatum(
                f"{where}.loss_fn_inputs.{name[:60]}: {wrong_length(array, len(model_input))}"
            )
    return Datum(model_input=model_input, loss_fn_inputs=arrays)


def _check_array(name: str, value: Any, where: str) -> Array:
    """(N,) or (N, K): int64 for ``target_tokens``, float32 otherwise."""
    shape = None
    if isinstance(value, dict):
        _only(value, ("data", "dtype", "shape"), where)
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


def _check_chunks(value: Any, where: str) -> NDArray[np.int32]:
    if not isinstance(value, list):
        raise refuse_datum(where, "a list of chunks", value)
    if not value:
        raise InvalidDatum(f'{where}: is empty; send a chunk such as {{"tokens": [1, 2]}}')
    arrays = []
    for index, chunk in enumerate(value):
        place = f"{where}[{index}]"
        if not isinstance(chunk, dict):
            raise refuse_datum(place, 'a chunk such as {"tokens": [1, 2]}', chunk)
        kind = chunk.get("type", "encoded_text")
        if kind != "encoded_text":
            raise InvalidDatum(f"{place}.type: {shown(kind)} is not supported; only encoded_text")
        _only(chunk, ("type", "tokens"), place)
        arrays.append(check_tokens(chunk.get("tokens"), f"{place}.tokens"))
    tokens = np.concatenate(arrays)
    check_num_tokens(len(tokens), where)
    return tokens


def _only(value: Mapping[str, Any], allowed: tuple[str, ...], where: str) -> None:
    for name in value:
        if name not in allowed:
            raise InvalidDatum(f"{where}.{name[:60]}: unknown field; expected {', '.join(allowed)}")
