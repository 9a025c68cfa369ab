"""Bulk data: conversations, token-level datums and prompts, checked without serializers.

Token arrays go from lists to numpy in C; Python looks at single items only to say which one
is wrong. Every message names the place: ``data[0][1].role: expected one of ...``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

import numpy as np
from django.conf import settings
from numpy.typing import NDArray

from tinkerapi.api.fields import FLOAT32, Schema, refuse, shown
from training.errors import InvalidDatum, LimitExceeded
from training.payloads import count_characters
from training.types import MAX_FLOAT32, Conversation, Datum, Message, Prompt, wrong_length

ROLES = ("system", "user", "assistant")

MAX_TOKEN_ID = 2**31 - 1

CHARACTERS_PER_TOKEN = 8
"""So much text is taken for each token that a sequence may have."""

NO_INPUTS = "is empty; send what the loss reads, such as target_tokens and weights"

Array = NDArray[Any]


def check_data(value: Any, where: str) -> list[Conversation | Datum]:
    """Training examples, each a conversation or a token-level datum.

    Raises:
        InvalidDatum: Something in it cannot be trained on. (400)
        LimitExceeded: Too many datums, or too many tokens in one. (400)
    """
    if not isinstance(value, list):
        raise _wrong(where, "a list of conversations or datums", value)
    if not value:
        raise InvalidDatum(f"{where}: is empty; send at least one conversation or datum")
    if len(value) > settings.MAX_DATUMS:
        raise LimitExceeded(
            f"{where}: {len(value)} datums; this server takes {settings.MAX_DATUMS} in one request"
        )
    return [_check_item(item, f"{where}[{index}]") for index, item in enumerate(value)]


def check_prompt(value: Any, where: str) -> Prompt:
    """Text, token ids (a list, or ``{"chunks": [...]}``), or a conversation."""
    if isinstance(value, str):
        if not value:
            raise InvalidDatum(f"{where}: is empty")
        check_characters(value, where)
        return value
    if isinstance(value, dict) and "messages" in value:
        return check_conversation(value, where)
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return check_conversation(value, where)
    if isinstance(value, list | dict):
        return tuple(check_tokens(value, where).tolist())
    raise _wrong(where, "text, a list of token ids, or a list of messages", value)


def check_prompts(value: Any, where: str) -> list[Prompt]:
    """At least one prompt, each of any form."""
    if not isinstance(value, list):
        raise _wrong(where, "a list of at least one prompt", value)
    if not value:
        raise InvalidDatum(f"{where}: is empty; send at least one prompt")
    if len(value) > settings.MAX_DATUMS:
        raise LimitExceeded(
            f"{where}: {len(value)} prompts; this server takes {settings.MAX_DATUMS} in one request"
        )
    return [check_prompt(item, f"{where}[{index}]") for index, item in enumerate(value)]


def check_conversation(value: Any, where: str) -> Conversation:
    """A list of messages, or ``{"messages": [...]}``."""
    if isinstance(value, dict):
        _only(value, ("messages",), where)
        where, value = f"{where}.messages", value.get("messages")
    if not isinstance(value, list):
        raise _wrong(where, "a list of messages", value)
    if not value:
        raise InvalidDatum(f"{where}: has no messages")
    messages = tuple(_check_message(item, f"{where}[{index}]") for index, item in enumerate(value))
    check_characters(messages, where)
    return Conversation(messages)


def check_characters(value: Any, where: str) -> None:
    """Refuse more text than could be ``MAX_DATUM_TOKENS`` tokens.

    Tokenizing takes time and memory in proportion to the characters, so it is not begun for text
    that is refused in the end. A token of ordinary text is four or five characters.

    Args:
        value: Text, or messages and whatever else a template is given; all texts in it count.

    Raises:
        LimitExceeded: (400)
    """
    most = settings.MAX_DATUM_TOKENS * CHARACTERS_PER_TOKEN
    characters = count_characters(value)
    if characters > most:
        raise LimitExceeded(
            f"{where}: {characters} characters; this server takes {most} in one sequence "
            f"({CHARACTERS_PER_TOKEN} for each of {settings.MAX_DATUM_TOKENS} tokens)"
        )


def check_tokens(value: Any, where: str) -> NDArray[np.int32]:
    """(N,) token ids, N at least 1, from a list or ``{"chunks": [{"tokens": [...]}]}``."""
    if isinstance(value, dict):
        _only(value, ("chunks",), where)
        return _check_chunks(value.get("chunks"), f"{where}.chunks")
    if not isinstance(value, list):
        raise _wrong(where, "a list of token ids", value)
    if not value:
        raise InvalidDatum(f"{where}: is empty")
    if len(value) > settings.MAX_DATUM_TOKENS:
        raise LimitExceeded(
            f"{where}: {len(value)} tokens; this server takes {settings.MAX_DATUM_TOKENS} in one"
            " sequence"
        )
    return _integers(value, where).astype(np.int32)


def _check_item(value: Any, where: str) -> Conversation | Datum:
    if isinstance(value, dict) and "messages" not in value:
        if "role" in value:
            raise InvalidDatum(
                f"{where}: is a message; data is a list of conversations, each a list of messages"
            )
        return _check_datum(value, where)
    return check_conversation(value, where)


def _check_message(value: Any, where: str) -> Message:
    if not isinstance(value, dict):
        raise _wrong(where, 'a message such as {"role": "user", "content": "hi"}', value)
    _only(value, ("role", "content"), where)
    for name in ("role", "content"):
        if name not in value:
            raise InvalidDatum(f"{where}.{name}: this field is required")
    role, content = value["role"], value["content"]
    if not isinstance(role, str) or role not in ROLES:
        raise _wrong(f"{where}.role", f"one of {', '.join(ROLES)}", role)
    if not isinstance(content, str):
        raise _wrong(f"{where}.content", "text", content)
    return Message(role, content)


def _check_datum(value: Mapping[str, Any], where: str) -> Datum:
    _only(value, ("model_input", "loss_fn_inputs"), where)
    for name in ("model_input", "loss_fn_inputs"):
        if name not in value:
            raise InvalidDatum(f"{where}.{name}: this field is required")
    model_input = check_tokens(value["model_input"], f"{where}.model_input")
    inputs = value["loss_fn_inputs"]
    if not isinstance(inputs, dict):
        raise _wrong(f"{where}.loss_fn_inputs", "an object of arrays by name", inputs)
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
        expected = "int64" if name == "target_tokens" else "float32"
        if dtype is not None and dtype != expected:
            raise _wrong(f"{where}.dtype", repr(expected), dtype)
        value = value.get("data")
        where = f"{where}.data"
    if not isinstance(value, list):
        raise _wrong(where, "a list of numbers", value)
    if not value:
        raise InvalidDatum(f"{where}: is empty; send a number for each token")
    rows = value if isinstance(value[0], list) else None
    if rows is not None and shape is not None:
        raise InvalidDatum(f"{where}: nested lists have their own shape; send no shape with them")
    flat = value if rows is None else _flatten(rows, where)
    width = None if rows is None else len(rows[0])
    check = _integers if name == "target_tokens" else _floats
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


def _integers(values: list[Any], where: str, width: int | None = None) -> NDArray[np.int64]:
    """Token ids; booleans are not numbers here, whatever Python thinks.

    Args:
        width: Of the rows that the values came in, so that a message names row and column.
    """
    if set(map(type, values)) != {int} or min(values) < 0 or max(values) > MAX_TOKEN_ID:
        _refuse_first(
            values,
            lambda item: type(item) is int and 0 <= item <= MAX_TOKEN_ID,
            f"a token id (a whole number from 0 to {MAX_TOKEN_ID})",
            where,
            width,
        )
    return np.array(values, np.int64)


def _floats(values: list[Any], where: str, width: int | None = None) -> NDArray[np.float32]:
    if not set(map(type, values)) <= {int, float}:
        _refuse_first(values, lambda item: type(item) in (int, float), "a number", where, width)
    array = np.array(values, np.float64)
    if not (np.abs(array) <= MAX_FLOAT32).all():
        _refuse_first(values, lambda item: abs(item) <= MAX_FLOAT32, FLOAT32, where, width)
    return array.astype(np.float32)


def _refuse_first(
    values: list[Any], is_good: Any, expected: str, where: str, width: int | None
) -> NoReturn:
    index = next(index for index, item in enumerate(values) if not is_good(item))
    place = f"[{index}]" if width is None else f"[{index // width}][{index % width}]"
    raise _wrong(f"{where}{place}", expected, values[index])


def _check_chunks(value: Any, where: str) -> NDArray[np.int32]:
    if not isinstance(value, list):
        raise _wrong(where, "a list of chunks", value)
    if not value:
        raise InvalidDatum(f'{where}: is empty; send a chunk such as {{"tokens": [1, 2]}}')
    arrays = []
    for index, chunk in enumerate(value):
        place = f"{where}[{index}]"
        if not isinstance(chunk, dict):
            raise _wrong(place, 'a chunk such as {"tokens": [1, 2]}', chunk)
        kind = chunk.get("type", "encoded_text")
        if kind != "encoded_text":
            raise InvalidDatum(f"{place}.type: {shown(kind)} is not supported; only encoded_text")
        _only(chunk, ("type", "tokens"), place)
        arrays.append(check_tokens(chunk.get("tokens"), f"{place}.tokens"))
    tokens = np.concatenate(arrays)
    if len(tokens) > settings.MAX_DATUM_TOKENS:
        raise LimitExceeded(
            f"{where}: {len(tokens)} tokens; this server takes {settings.MAX_DATUM_TOKENS} in one"
            " sequence"
        )
    return tokens


def _only(value: Mapping[str, Any], allowed: tuple[str, ...], where: str) -> None:
    for name in value:
        if name not in allowed:
            raise InvalidDatum(f"{where}.{name[:60]}: unknown field; expected {', '.join(allowed)}")


def _wrong(where: str, expected: str, value: object) -> InvalidDatum:
    return InvalidDatum(str(refuse(where, expected, value)))


# --- The same forms, for the OpenAPI schema -------------------------------------------------

MESSAGE_SCHEMA: Schema = {
    "type": "object",
    "properties": {
        "role": {"type": "string", "enum": list(ROLES)},
        "content": {"type": "string"},
    },
    "required": ["role", "content"],
    "additionalProperties": False,
}
CONVERSATION_SCHEMA: Schema = {"type": "array", "items": MESSAGE_SCHEMA, "minItems": 1}
TOKENS_SCHEMA: Schema = {
    "type": "array",
    "items": {"type": "integer", "minimum": 0, "maximum": MAX_TOKEN_ID},
    "minItems": 1,
}
DATUM_SCHEMA: Schema = {
    "type": "object",
    "properties": {
        "model_input": TOKENS_SCHEMA,
        "loss_fn_inputs": {
            "type": "object",
            "additionalProperties": {"type": "array", "items": {"type": "number"}, "minItems": 1},
            "minProperties": 1,
        },
    },
    "required": ["model_input", "loss_fn_inputs"],
    "additionalProperties": False,
}
CONVERSATION_OBJECT_SCHEMA: Schema = {
    "type": "object",
    "properties": {"messages": CONVERSATION_SCHEMA},
    "required": ["messages"],
    "additionalProperties": False,
}
DATA_SCHEMA: Schema = {
    "type": "array",
    "items": {"anyOf": [CONVERSATION_SCHEMA, CONVERSATION_OBJECT_SCHEMA, DATUM_SCHEMA]},
    "minItems": 1,
}
PROMPT_SCHEMA: Schema = {
    "anyOf": [{"type": "string", "minLength": 1}, TOKENS_SCHEMA, CONVERSATION_SCHEMA]
}
