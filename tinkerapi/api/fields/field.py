"""The fields of a request body: each one defines how to check a value and how to
describe it in the OpenAPI schema, so that the two cannot disagree.

An error names the place and the expected value: ``adam_params.beta1: expected a number
of at least 0 and below 1; got 1.5``. A field that is not declared is refused by name. ``null``
for an optional field means the same as leaving it out. Fields that several dialects share are
beside this file, by subject.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from tinkerapi.api.fields.refusals import (
    FLOAT32,
    check_characters,
    is_above,
    refuse,
    refuse_unknown,
)
from training.errors import InvalidRequest
from training.types import MAX_FLOAT32

Schema = dict[str, Any]

MAX_INTEGER = 2**63 - 1
"""The largest integer that the database can store."""

MAX_FLOAT = sys.float_info.max
"""For a number that the engine never sees."""


@dataclass(frozen=True, kw_only=True)
class Field(ABC):
    """One field of a request body."""

    description: str
    required: bool = False
    default: Any = None
    """The value of an absent optional field."""
    example: Any = None
    """Shown in the schema, so that a person can try the call."""

    @abstractmethod
    def check(self, value: Any, where: str) -> Any:
        """The value in the services' form.

        Raises:
            InvalidRequest: It is invalid; the message begins with ``where``. (400)
        """

    @abstractmethod
    def json_schema(self) -> Schema:
        """Its type and bounds, in OpenAPI 3.0."""

    def schema(self) -> Schema:
        """Its complete OpenAPI schema."""
        schema = {**self.json_schema(), "description": self.description}
        if not self.required:
            schema["nullable"] = True
            if self.default is not None:
                schema["default"] = self.default
        if self.example is not None:
            schema["example"] = self.example
        return schema


@dataclass(frozen=True, kw_only=True)
class Integer(Field):
    minimum: int = 0
    maximum: int | Callable[[], int] = MAX_INTEGER
    """A function for a limit that comes from the settings."""

    def check(self, value: Any, where: str) -> int:
        maximum = self._maximum()
        if type(value) is not int or not self.minimum <= value <= maximum:
            bounds = f"from {self.minimum} to {maximum}"
            if maximum == MAX_INTEGER and not is_above(value, maximum):
                bounds = f"of at least {self.minimum}"
            raise refuse(where, f"a whole number {bounds}", value)
        return value

    def json_schema(self) -> Schema:
        return {"type": "integer", "minimum": self.minimum, "maximum": self._maximum()}

    def _maximum(self) -> int:
        return self.maximum() if callable(self.maximum) else self.maximum


@dataclass(frozen=True, kw_only=True)
class Number(Field):
    minimum: float = 0.0
    above_minimum: bool = False
    """True excludes the minimum itself."""
    below: float | None = None
    maximum: float = MAX_FLOAT32

    def check(self, value: Any, where: str) -> float:
        if (
            type(value) not in (int, float)
            or not self.minimum <= value <= self.maximum
            or (self.above_minimum and value == self.minimum)
            or (self.below is not None and value >= self.below)
        ):
            raise refuse(where, self._expected(value), value)
        return float(value)

    def _expected(self, value: Any) -> str:
        """The field's bounds, or float32's if those are violated."""
        upper = self.maximum if self.below is None else self.below
        if type(value) in (int, float):
            broken = self.minimum if value < self.minimum else upper
            if abs(value) > MAX_FLOAT32 == abs(broken):
                return FLOAT32
        bounds = []
        if self.minimum != -MAX_FLOAT32:
            bounds.append(f"{'above' if self.above_minimum else 'of at least'} {self.minimum:.15g}")
        if upper < MAX_FLOAT32:
            bounds.append(f"{'at most' if self.below is None else 'below'} {upper:.15g}")
        return f"a number {' and '.join(bounds)}".strip()

    def json_schema(self) -> Schema:
        schema: Schema = {"type": "number", "format": "double", "minimum": self.minimum}
        if self.above_minimum:
            schema["exclusiveMinimum"] = True
        if self.below is not None:
            return schema | {"maximum": self.below, "exclusiveMaximum": True}
        return schema | {"maximum": self.maximum}


@dataclass(frozen=True, kw_only=True)
class Flag(Field):
    def check(self, value: Any, where: str) -> bool:
        if type(value) is not bool:
            raise refuse(where, "true or false", value)
        return value

    def json_schema(self) -> Schema:
        return {"type": "boolean"}


@dataclass(frozen=True, kw_only=True)
class Text(Field):
    max_length: int = 200
    pattern: str | None = None
    """For the schema only; the service that owns the format checks it."""

    def check(self, value: Any, where: str) -> str:
        if type(value) is not str or not 0 < len(value) <= self.max_length:
            raise refuse(where, f"text of 1 to {self.max_length} characters", value)
        return check_characters(value, where)

    def json_schema(self) -> Schema:
        schema: Schema = {"type": "string", "minLength": 1, "maxLength": self.max_length}
        return schema if self.pattern is None else {**schema, "pattern": self.pattern}


@dataclass(frozen=True, kw_only=True)
class Choice(Field):
    choices: tuple[str, ...]

    def check(self, value: Any, where: str) -> str:
        if type(value) is not str or value not in self.choices:
            raise refuse(where, f"one of {', '.join(self.choices)}", value)
        return value

    def json_schema(self) -> Schema:
        return {"type": "string", "enum": list(self.choices)}


@dataclass(frozen=True, kw_only=True)
class Custom(Field):
    """A field with its own check and schema."""

    checker: Callable[[Any, str], Any]
    json: Schema

    def check(self, value: Any, where: str) -> Any:
        return self.checker(value, where)

    def json_schema(self) -> Schema:
        return self.json


@dataclass(frozen=True, kw_only=True)
class Object(Field):
    """A nested object; if absent, it has its fields' defaults."""

    fields: Mapping[str, Field]

    def check(self, value: Any, where: str) -> dict[str, Any]:
        return check_object(self.fields, value, where)

    def json_schema(self) -> Schema:
        return object_schema(self.fields)


def check_object(fields: Mapping[str, Field], value: Any, where: str = "") -> dict[str, Any]:
    """Every declared field's value or default.

    Raises:
        InvalidRequest: Not an object, a field is missing, unknown or wrong. (400)
    """
    if not isinstance(value, dict):
        raise refuse(where or "body", "an object", value)
    prefix = f"{where}." if where else ""
    refuse_unknown(value.keys(), fields, where)
    checked = {}
    for name, field in fields.items():
        given = value.get(name)
        if given is not None:
            checked[name] = field.check(given, prefix + name)
        elif field.required:
            raise InvalidRequest(f"{prefix}{name}: this field is required")
        elif isinstance(field, Object):
            checked[name] = field.check({}, prefix + name)
        else:
            checked[name] = field.default
    return checked


def object_schema(fields: Mapping[str, Field]) -> Schema:
    """The schema of an object with these fields and no others."""
    schema: Schema = {
        "type": "object",
        "properties": {name: field.schema() for name, field in fields.items()},
        "additionalProperties": False,
    }
    if required := [name for name, field in fields.items() if field.required]:
        schema["required"] = required
    return schema
