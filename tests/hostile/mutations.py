"""Every way to spoil one place of a JSON body with one of the hostile values."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from tests.hostile.values import NAMES, VALUES

HERE = "\ue000"
"""Stands where the hostile text comes; no example holds it."""


@dataclass(frozen=True)
class Mutation:
    """A body as JSON text, and its mutation."""

    where: str
    what: str
    template: str
    """With ``HERE`` once."""
    text: str

    @property
    def body(self) -> str:
        return self.template.replace(f'"{HERE}"', self.text)


def mutations(body: Any, fields: Iterable[str] = ()) -> Iterator[Mutation]:
    """Each value of the body replaced, and each object of it given another name or one twice.

    Args:
        fields: Dotted names that the body may have beside those that it has.
    """
    for where, template in _templates(body, fields):
        for what, text in VALUES.items():
            yield Mutation(where, what, template, text)
    for where, template in _objects(body, ""):
        for what, name in NAMES.items():
            yield Mutation(where, f"a name: {what}", template, f"{name}: 1")
        yield Mutation(where, "a name twice", template, '"model_id": 1, "model_id": null')


def _templates(body: Any, fields: Iterable[str]) -> Iterator[tuple[str, str]]:
    for where, changed in _places(body, ""):
        yield where, json.dumps(changed, ensure_ascii=False)
    for name in fields:
        first, _, rest = name.partition(".")
        if first in body and not (rest and isinstance(body[first], dict)):
            continue
        inner = {**body.get(first, {}), rest: HERE} if rest else HERE
        yield name, json.dumps({**body, first: inner}, ensure_ascii=False)


def _places(value: Any, where: str) -> Iterator[tuple[str, Any]]:
    """The value with one place of it, itself first, replaced by ``HERE``."""
    yield where or "body", HERE
    if isinstance(value, dict):
        for name, item in value.items():
            for place, changed in _places(item, f"{where}.{name}".lstrip(".")):
                yield place, {**value, name: changed}
    elif isinstance(value, list):
        for index, item in enumerate(value[:2]):
            for place, changed in _places(item, f"{where}[{index}]"):
                yield place, [*value[:index], changed, *value[index + 1 :]]


def _objects(value: Any, where: str) -> Iterator[tuple[str, str]]:
    """The value as text with a place for one more member in one of its objects."""
    for place, changed in _members(value, where):
        yield place, json.dumps(changed, ensure_ascii=False).replace(f'"{HERE}": 0', f'"{HERE}"')


def _members(value: Any, where: str) -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        yield where or "body", {**value, HERE: 0}
        for name, item in value.items():
            for place, changed in _members(item, f"{where}.{name}".lstrip(".")):
                yield place, {**value, name: changed}
    elif isinstance(value, list):
        for index, item in enumerate(value[:2]):
            for place, changed in _members(item, f"{where}[{index}]"):
                yield place, [*value[:index], changed, *value[index + 1 :]]
