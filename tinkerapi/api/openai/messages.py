"""Parses OpenAI's messages and tools to the values that a chat template takes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import orjson

from tinkerapi.api.bodies.json_limits import check_json_size
from tinkerapi.api.fields.content import check_parts
from tinkerapi.api.fields.prompts import check_text_length
from tinkerapi.api.fields.refusals import refuse, refuse_size, refuse_unknown
from training.errors import InvalidRequest
from training.images import Image
from training.types import ROLES, Message

MAX_MESSAGES = 10_000
MAX_TOOLS = 1000
MAX_TOOL_CALLS = 1000

MAX_NAME_CHARACTERS = 200

MESSAGE_FIELDS: Mapping[str, frozenset[str]] = {
    "system": frozenset({"content", "name"}),
    "developer": frozenset({"content", "name"}),
    "user": frozenset({"content", "name"}),
    "assistant": frozenset({"content", "name", "tool_calls", "reasoning_content"}),
    "tool": frozenset({"content", "name", "tool_call_id"}),
}
"""The fields that a message of each role may have, beside its role."""

NOT_TAKEN: Mapping[str, str] = {
    "refusal": "chat templates take no refusal; send it as content",
    "audio": "this server takes text",
    "function_call": "is the old form of tool_calls; send tool_calls",
    "annotations": "this server takes text without annotations",
}
"""Fields of OpenAI's messages that are refused unless null or empty."""


def check_messages(value: Any, where: str) -> tuple[Message, ...]:
    """A conversation. A content may be a list of parts; null counts as absent."""
    if not isinstance(value, list):
        raise refuse(where, "a list of messages", value)
    if not value:
        raise InvalidRequest(f"{where}: has no messages")
    if len(value) > MAX_MESSAGES:
        raise refuse_size(where, len(value), "messages", MAX_MESSAGES)
    _check_arguments_size(value)
    messages = tuple(_message(item, f"{where}[{index}]") for index, item in enumerate(value))
    check_text_length(messages, where)
    return messages


def _message(value: Any, where: str) -> Message:
    if not isinstance(value, dict):
        raise refuse(where, 'a message such as {"role": "user", "content": "hi"}', value)
    given = {name: item for name, item in value.items() if item is not None}
    role = given.pop("role", None)
    if not isinstance(role, str) or role not in ROLES:
        raise refuse(f"{where}.role", f"one of {', '.join(ROLES)}", role)
    fields = MESSAGE_FIELDS[role]
    for name in NOT_TAKEN:
        if given.pop(name, []) != []:
            raise InvalidRequest(f"{where}.{name}: {NOT_TAKEN[name]}")
    refuse_unknown(given.keys(), sorted(fields), where, of=f" of a message of the role {role}")
    calls = _tool_calls(given.get("tool_calls"), f"{where}.tool_calls")
    return Message(
        role,
        _content(given.get("content"), f"{where}.content", role=role, may_be_null=bool(calls)),
        name=_short_text(given.get("name"), f"{where}.name"),
        tool_calls=calls,
        tool_call_id=_short_text(given.get("tool_call_id"), f"{where}.tool_call_id"),
        reasoning_content=_text(given.get("reasoning_content"), f"{where}.reasoning_content"),
    )


def _content(
    value: Any, where: str, *, role: str, may_be_null: bool
) -> str | tuple[str | Image, ...] | None:
    if value is None:
        if may_be_null:
            return None
        raise InvalidRequest(f"{where}: this field is required, except beside tool_calls")
    if isinstance(value, list):
        return check_parts(value, where, role=role) if value else ""
    return _text(value, where)


def _text(value: Any, where: str) -> str | None:
    if value is not None and type(value) is not str:
        raise refuse(where, "text", value)
    return value


def _short_text(value: Any, where: str) -> str | None:
    if value is None:
        return None
    if type(value) is not str or not 0 < len(value) <= MAX_NAME_CHARACTERS:
        raise refuse(where, f"text of 1 to {MAX_NAME_CHARACTERS} characters", value)
    return value


def _tool_calls(value: Any, where: str) -> tuple[dict[str, Any], ...] | None:
    """Calls with their arguments as an object, as templates take them; None for an empty list."""
    if value is None or value == []:
        return None
    if not isinstance(value, list):
        raise refuse(where, "a list of tool calls", value)
    if len(value) > MAX_TOOL_CALLS:
        raise refuse_size(where, len(value), "tool calls", MAX_TOOL_CALLS)
    return tuple(_tool_call(item, f"{where}[{index}]") for index, item in enumerate(value))


def _check_arguments_size(messages: list[Any]) -> None:
    """Refuse more JSON in the texts of all calls together than one body may hold.

    They are checked as one list, in the order in which they are decoded, so a text that is not
    JSON, and hides the rest from the check, is refused before the rest is reached.
    """
    calls = [
        call
        for message in messages
        if isinstance(message, dict) and isinstance(message.get("tool_calls"), list)
        for call in message["tool_calls"]
    ]
    functions = [call.get("function") for call in calls if isinstance(call, dict)]
    arguments = [f.get("arguments") for f in functions if isinstance(f, dict)]
    texts = [text.encode() for text in arguments if type(text) is str]
    check_json_size(b"[" + b",".join(texts) + b"]")


def _tool_call(value: Any, where: str) -> dict[str, Any]:
    call = _object(value, where, required=("function",), optional=("id", "type", "index"))
    if call.get("type", "function") != "function":
        raise refuse(f"{where}.type", "'function'", call["type"])
    place = f"{where}.function"
    function = _object(call["function"], place, required=("name", "arguments"))
    name = _short_text(function["name"], f"{place}.name")
    arguments = _arguments(function["arguments"], f"{place}.arguments")
    call_id = _short_text(call.get("id"), f"{where}.id")
    return {
        **({} if call_id is None else {"id": call_id}),
        "type": "function",
        "function": {"name": name, "arguments": arguments},
    }


def _arguments(value: Any, where: str) -> dict[str, Any]:
    """The object in a call's JSON text; an empty text means no arguments."""
    if type(value) is str:
        try:
            value = orjson.loads(value) if value.strip() else {}
        except orjson.JSONDecodeError:
            raise refuse(where, "a text that is a JSON object", value) from None
    if not isinstance(value, dict):
        raise refuse(where, "a text that is a JSON object", value)
    return value


def check_tools(value: Any, where: str) -> tuple[dict[str, Any], ...]:
    """Functions that the assistant may call, unchanged: the template writes them out."""
    if not isinstance(value, list):
        raise refuse(where, "a list of tools", value)
    if len(value) > MAX_TOOLS:
        raise refuse_size(where, len(value), "tools", MAX_TOOLS)
    return tuple(_tool(item, f"{where}[{index}]") for index, item in enumerate(value))


def _tool(value: Any, where: str) -> dict[str, Any]:
    tool = _object(value, where, required=("type", "function"))
    if tool["type"] != "function":
        raise refuse(
            f"{where}.type", "'function', the only kind of tool in templates", tool["type"]
        )
    place = f"{where}.function"
    function = _object(
        tool["function"],
        place,
        required=("name",),
        optional=("description", "parameters", "strict"),
    )
    _short_text(function["name"], f"{place}.name")
    _text(function.get("description"), f"{place}.description")
    if not isinstance(function.get("parameters", {}), dict):
        raise refuse(
            f"{place}.parameters", "a JSON schema, which is an object", function["parameters"]
        )
    return {"type": "function", "function": function}


def check_template_kwargs(value: Any, where: str) -> dict[str, Any]:
    """Variables of the model's template; the worker checks that it reads them."""
    if not isinstance(value, dict):
        raise refuse(where, "an object of the template's variables", value)
    return value


def _object(
    value: Any, where: str, *, required: tuple[str, ...], optional: tuple[str, ...] = ()
) -> dict[str, Any]:
    """An object's fields, those that are null left out."""
    known = (*required, *optional)
    if not isinstance(value, dict):
        raise refuse(where, f"an object with {', '.join(known)}", value)
    given = {name: item for name, item in value.items() if item is not None}
    refuse_unknown(given.keys(), known, where)
    for name in required:
        if name not in given:
            raise InvalidRequest(f"{where}.{name}: this field is required")
    return given
