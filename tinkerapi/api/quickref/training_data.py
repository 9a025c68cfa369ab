"""The field with a request's training examples."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from django.conf import settings

from tinkerapi.api.fields.field import Field, Schema
from tinkerapi.api.fields.tokens import refuse_datum
from tinkerapi.api.quickref.data_schema import DATA_SCHEMA
from tinkerapi.api.quickref.parse import check_conversation, check_datum
from training.errors import InvalidDatum, LimitExceeded
from training.types import Example


@dataclass(frozen=True, kw_only=True)
class TrainingData(Field):
    """Training examples, each a conversation or a token-level datum."""

    def check(self, value: Any, where: str) -> list[Example]:
        """
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
                f"{where}: {len(value)} datums; this server takes {settings.MAX_DATUMS} in one "
                "request"
            )
        return [
            check_datum(item, f"{where}[{index}]")
            if isinstance(item, dict) and "messages" not in item
            else check_conversation(item, f"{where}[{index}]")
            for index, item in enumerate(value)
        ]

    def json_schema(self) -> Schema:
        return DATA_SCHEMA
