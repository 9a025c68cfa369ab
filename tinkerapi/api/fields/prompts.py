"""Prompts as text or token ids (all dialects except the SDK's), and the limit of text."""

from __future__ import annotations

from typing import Any

from django.conf import settings

from tinkerapi.api.fields.tokens import check_token_list
from training.errors import InvalidDatum, LimitExceeded
from training.payloads import count_characters
from training.types import Prompt

CHARACTERS_PER_TOKEN = 8
"""Characters of text allowed for each token that a sequence may have."""


def check_plain_prompt(value: str | list[Any], where: str) -> Prompt:
    """Text, or a list of token ids.

    Raises:
        InvalidDatum: It is empty, or has an invalid token id. (400)
        LimitExceeded: It is longer than one sequence may be. (400)
    """
    if isinstance(value, list):
        return check_token_list(value, where)
    if not value:
        raise InvalidDatum(f"{where}: is empty")
    check_text_length(value, where)
    return value


def check_num_prompts(number: int, where: str) -> None:
    """Refuse more prompts than one request may have. Raises LimitExceeded."""
    if number > settings.MAX_DATUMS:
        raise LimitExceeded(
            f"{where}: {number} prompts; this server takes {settings.MAX_DATUMS} in one request"
        )


def check_text_length(value: Any, where: str) -> None:
    """Refuse more text than could be ``MAX_DATUM_TOKENS`` tokens.

    Tokenizing takes time and memory in proportion to the characters, so text that would be refused
    later is not tokenized at all. A token of ordinary text is four or five characters.

    Args:
        value: Text, or messages and other values for a template; all texts in it count.

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
