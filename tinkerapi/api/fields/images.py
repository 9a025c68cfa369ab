"""Images in a request body: base64 or ``data:`` addresses, and what their headers must say.

An image is refused here for what its first bytes show: another format than its label, no size, too
many pixels. A worker decodes it. An address is never opened: a server that fetches what
clients name can be used against its own network.
"""

from __future__ import annotations

import re
from base64 import b64decode
from binascii import Error
from typing import Any

from django.conf import settings

from tinkerapi.api.fields.field import Integer
from tinkerapi.api.fields.refusals import shown
from tinkerapi.api.fields.tokens import MAX_TOKEN_ID, refuse_datum
from training.errors import InvalidDatum, InvalidRequest, LimitExceeded
from training.images import FORMATS, Image, format_of, read_size

POINTERS = (
    "image_asset_pointer is not supported: this server stores no image assets and fetches none; "
    "send the image itself, in an image chunk"
)
AUDIO = "dmel (audio) is not supported; only encoded_text and image"

_DATA_ADDRESS = re.compile(r"data:image/([a-z]{1,8});base64,", re.IGNORECASE)
_EXPECTED_TOKENS = Integer(description="", minimum=1, maximum=MAX_TOKEN_ID)


def check_image(
    data: bytes, format: Any, expected_tokens: Any, where: str, *, field: str = ".data"
) -> Image:
    """An image of one of the formats, within the limits of one image.

    Args:
        format: The client's label.
        expected_tokens: None if the client does not say.
        where: The place of the chunk with these three.
        field: The place of the bytes in it.

    Raises:
        InvalidDatum: It is not an image of that format. (400)
        LimitExceeded: It has more bytes or pixels than this server takes. (400)
    """
    if not isinstance(format, str) or format not in FORMATS:
        raise refuse_datum(f"{where}.format", f"one of {', '.join(FORMATS)}", format)
    _check_num_bytes(len(data), where + field)
    found = format_of(data)
    if found != format:
        raise InvalidDatum(
            f"{where}{field}: labelled {format}, but "
            + (f"it is a {found} file" if found else f"its first bytes are not those of a {format}")
        )
    size = read_size(data, format)
    if size is None:
        raise InvalidDatum(f"{where}{field}: the {format} file is truncated or has no size")
    if size.num_pixels > settings.MAX_IMAGE_PIXELS:
        raise LimitExceeded(
            f"{where}{field}: {size.width} x {size.height} pixels; this server takes "
            f"{settings.MAX_IMAGE_PIXELS} in one image"
        )
    if expected_tokens is not None:
        try:
            _EXPECTED_TOKENS.check(expected_tokens, f"{where}.expected_tokens")
        except InvalidRequest as error:
            raise InvalidDatum(str(error)) from None
    return Image(data=data, format=format, expected_tokens=expected_tokens)


def check_base64_image(value: Any, format: Any, expected_tokens: Any, where: str) -> Image:
    """``check_image`` of base64 text.

    Raises:
        InvalidDatum: It is not base64, or not such an image. (400)
        LimitExceeded: It is larger than this server takes. (400)
    """
    if not isinstance(value, str):
        raise refuse_datum(f"{where}.data", "the image's bytes in base64", value)
    return check_image(_decoded(value, 0, f"{where}.data"), format, expected_tokens, where)


def check_image_address(value: Any, where: str) -> Image:
    """The image in a ``data:`` address, such as ``data:image/png;base64,iVBORw...``.

    Raises:
        InvalidDatum: Any other address, or no such image. (400)
        LimitExceeded: It is larger than this server takes. (400)
    """
    if not isinstance(value, str):
        raise refuse_datum(where, "a data: address", value)
    head = _DATA_ADDRESS.match(value)
    if head is None:
        raise InvalidDatum(
            f"{where}: expected data:image/png;base64,... (or jpeg or webp); this server fetches "
            f"no image from an address; got {shown(value)}"
        )
    label = head[1].lower()
    format = "jpeg" if label == "jpg" else label
    if format not in FORMATS:
        raise InvalidDatum(f"{where}: image/{label} is not one of {', '.join(FORMATS)}")
    return check_image(_decoded(value, head.end(), where), format, None, where, field="")


def _decoded(text: str, start: int, where: str) -> bytes:
    """The bytes of base64 text from ``start`` on; its size is checked first."""
    _check_num_bytes((len(text) - start) * 3 // 4 - 2, where)
    try:
        return b64decode(text[start:], validate=True)
    except (Error, ValueError):
        raise InvalidDatum(f"{where}: not base64") from None


def _check_num_bytes(number: int, where: str) -> None:
    if number > settings.MAX_IMAGE_BYTES:
        raise LimitExceeded(
            f"{where}: {number} bytes; this server takes {settings.MAX_IMAGE_BYTES} in one image"
        )
