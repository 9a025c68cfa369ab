"""The content of a message: text, or OpenAI's list of parts, texts and images."""

from __future__ import annotations

from typing import Any

from tinkerapi.api.fields.field import Schema
from tinkerapi.api.fields.images import check_image_address
from tinkerapi.api.fields.refusals import refuse_unknown
from tinkerapi.api.fields.tokens import refuse_datum
from training.errors import InvalidDatum
from training.images import Image

WITH_IMAGES = ("user", "tool")
"""The roles whose messages may have images: what the assistant says is sampled, and a model
samples no images."""

CONTENT_SCHEMA: Schema = {
    "anyOf": [
        {"type": "string"},
        {
            "type": "array",
            "minItems": 1,
            "items": {
                "anyOf": [
                    {
                        "type": "object",
                        "properties": {
                            "type": {"type": "string", "enum": ["text"]},
                            "text": {"type": "string"},
                        },
                        "required": ["type", "text"],
                        "additionalProperties": False,
                    },
                    {
                        "type": "object",
                        "properties": {
                            "type": {"type": "string", "enum": ["image_url"]},
                            "image_url": {
                                "type": "object",
                                "properties": {
                                    "url": {"type": "string", "pattern": "^data:image/"},
                                    "detail": {"type": "string", "enum": ["auto", "high"]},
                                },
                                "required": ["url"],
                                "additionalProperties": False,
                            },
                        },
                        "required": ["type", "image_url"],
                        "additionalProperties": False,
                    },
                ]
            },
        },
    ]
}

_DETAILS = ("auto", "high")
"""Values of OpenAI's ``detail`` that mean what is done: the model's processor gets the image."""


def check_parts(value: list[Any], where: str, *, role: str) -> str | tuple[str | Image, ...]:
    """Parts like ``{"type": "text", "text": "hi"}`` and ``{"type": "image_url", ...}``.

    Adjacent texts become one, without a separator, so that they are checked as the template
    writes them. Without an image the result is text.

    Raises:
        InvalidDatum: A part is of another form, or an image where none may be. (400)
        LimitExceeded: An image is larger than this server takes. (400)
    """
    if not value:
        raise InvalidDatum(f"{where}: is empty; send text or at least one part")
    parts: list[str | Image] = []
    for index, item in enumerate(value):
        part = _part(item, f"{where}[{index}]", role)
        if isinstance(part, str) and parts and isinstance(parts[-1], str):
            parts[-1] += part
        else:
            parts.append(part)
    if len(parts) == 1 and isinstance(parts[0], str):
        return parts[0]
    return tuple(parts)


def _part(value: Any, where: str, role: str) -> str | Image:
    kind = value.get("type") if isinstance(value, dict) else None
    if kind == "image_url":
        if role not in WITH_IMAGES:
            raise InvalidDatum(
                f"{where}: an image in a message of the role {role}; only those of "
                f"{' and '.join(WITH_IMAGES)} may have images"
            )
        refuse_unknown(value.keys(), ("type", "image_url"), where, error=InvalidDatum)
        return _image(value.get("image_url"), f"{where}.image_url")
    if (
        not isinstance(value, dict)
        or set(value) != {"type", "text"}
        or kind != "text"
        or type(value["text"]) is not str
    ):
        raise refuse_datum(
            where,
            'a part like {"type": "text", "text": "hi"} or {"type": "image_url", "image_url": '
            '{"url": "data:image/png;base64,..."}}',
            value,
        )
    return str(value["text"])


def _image(value: Any, where: str) -> Image:
    if not isinstance(value, dict):
        raise refuse_datum(where, 'an object like {"url": "data:image/png;base64,..."}', value)
    refuse_unknown(value.keys(), ("url", "detail"), where, error=InvalidDatum)
    detail = value.get("detail")
    if detail is not None and detail not in _DETAILS:
        raise refuse_datum(
            f"{where}.detail",
            "auto or high, because the model's processor is given the whole image; for less "
            "detail send a smaller one",
            detail,
        )
    return check_image_address(value.get("url"), f"{where}.url")
