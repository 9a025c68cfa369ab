"""Every field that the SDK can send, from its own models, and the table of what becomes of it.

    python -m tests.compat.sdk_fields

brings the rows of the table in ``tinkerapi/docs/sdk.md`` up to the installed SDK: what is known of
a field is kept, a new one says "?", and a test fails as long as one does.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import Any, get_args

import tinker
from pydantic import BaseModel
from tinker._models import StrictBase

from tests.compat.tables import markdown_table, read_table, write_table

UNKNOWN = ("?", "")

DATACLASSES = ("Datum", "TensorData", "ForwardBackwardInput", "ForwardBackwardRequest")
"""Request types that the SDK holds as dataclasses and writes as protobuf."""

WIRE_NAMES = {"_numpy": "data"}

Fates = dict[tuple[str, str], tuple[str, str]]


def request_fields() -> Iterator[tuple[str, str]]:
    """(type, field) of all that the SDK's request types hold, ``type`` markers apart."""
    for module in pkgutil.walk_packages(tinker.types.__path__, "tinker.types."):
        importlib.import_module(module.name)
    for name in DATACLASSES:
        request: Any = getattr(tinker.types, name)
        assert is_dataclass(request), name
        yield from ((name, WIRE_NAMES.get(field.name, field.name)) for field in fields(request))
    for model in sorted(_request_models(), key=lambda item: item.__name__):
        for field in model.model_fields:
            if model.__name__ not in DATACLASSES and field != "type":
                yield model.__name__, field


def _request_models() -> set[type[BaseModel]]:
    """The SDK's request types and all that they hold, but for what telemetry holds."""
    found: set[type[BaseModel]] = set()
    waiting = list(_subclasses(StrictBase))
    while waiting:
        model = waiting.pop()
        if model in found:
            continue
        found.add(model)
        if model.__name__ != "TelemetrySendRequest":
            for field in model.model_fields.values():
                waiting += _models_of(field.annotation)
    return found


def _models_of(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for inner in get_args(annotation) for model in _models_of(inner)]


def _subclasses(model: type[BaseModel]) -> set[type[BaseModel]]:
    found = set(model.__subclasses__())
    return found.union(*(_subclasses(item) for item in found))


def documented_fates() -> Fates:
    """The table's entry for each (type, field): its treatment and a remark."""
    pattern = r"^\| `(\w+)` \| `(\w+)` \| (.*?) \| ?(.*?) ?\|$"
    rows = re.findall(pattern, read_table("fields"), flags=re.MULTILINE)
    return {(model, field): (fate, remark) for model, field, fate, remark in rows}


def fields_table(known: Fates) -> str:
    """Markdown: a row for each field of the installed SDK."""
    rows = [["Type", "Field", "Here", ""]]
    for model, field in dict.fromkeys(request_fields()):
        rows.append([f"`{model}`", f"`{field}`", *known.get((model, field), UNKNOWN)])
    return markdown_table(rows)


def main() -> None:
    write_table("fields", fields_table(documented_fates()))


if __name__ == "__main__":
    main()
