"""Our .proto file has the same wire format as the SDK's."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from tinker.proto import tinker_public_pb2 as theirs

from tinkerapi.api.sdk import tinker_public_pb2 as ours

PROTO = Path(str(ours.__file__)).with_name("tinker_public.proto").read_text()


def test_the_generated_code_is_that_of_the_proto_file() -> None:
    blocks = re.findall(r"^(?:message|enum) (\w+) {\n(.*?)^}", PROTO, re.DOTALL | re.MULTILINE)
    written = {name: dict(re.findall(r"(\w+) = (\d+);", block)) for name, block in blocks}

    generated = {
        name: {field.name: str(field.number) for field in message.fields}
        for name, message in ours.DESCRIPTOR.message_types_by_name.items()
    }
    generated |= {
        name: {value.name: str(value.number) for value in enum.values}
        for name, enum in ours.DESCRIPTOR.enum_types_by_name.items()
    }
    assert written == generated


def _fields(message: Any) -> dict[int, tuple[Any, ...]]:
    return {
        field.number: (
            field.name,
            field.type,
            field.is_repeated,
            field.has_presence,
            field.message_type.name if field.message_type else None,
            field.enum_type.name if field.enum_type else None,
        )
        for field in message.fields
    }


@pytest.mark.parametrize(
    "name", sorted(set(ours.DESCRIPTOR.message_types_by_name) - {"ForwardBackwardIds"})
)
def test_a_message_has_the_fields_of_the_sdks(name: str) -> None:
    mine = ours.DESCRIPTOR.message_types_by_name[name]
    other = theirs.DESCRIPTOR.message_types_by_name[name]

    assert _fields(mine) == _fields(other)
    nested = {message.name: _fields(message) for message in mine.nested_types}
    assert nested == {message.name: _fields(message) for message in other.nested_types}


def test_the_ids_are_the_first_two_fields_of_the_request() -> None:
    request = _fields(ours.ForwardBackwardRequest.DESCRIPTOR)

    assert _fields(ours.ForwardBackwardIds.DESCRIPTOR) == {n: request[n] for n in (1, 2)}


@pytest.mark.parametrize("name", ["DType", "StopReason"])
def test_an_enum_has_the_values_of_the_sdks(name: str) -> None:
    mine = ours.DESCRIPTOR.enum_types_by_name[name].values_by_name
    other = theirs.DESCRIPTOR.enum_types_by_name[name].values_by_name

    assert {k: v.number for k, v in mine.items()} == {k: v.number for k, v in other.items()}
